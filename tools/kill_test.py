"""Kills a training run again and again, and shows that nothing is lost: the same bits as a run that nobody killed.

python tools/kill_test.py --workdir=DIR [--processes=2] [--kills=20] [--seed=0]

DIR/whole trains in one go, DIR/killed with SIGKILL to one of its processes at moments drawn from the seed. At the end
every checkpoint that both kept must have one digest (tools/digest.py), and metrics.jsonl the same lines but for speed.
"""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from absl import flags

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX: what is compared is read here

from llada_jax import cli
from llada_jax.fields import InputError
from llada_jax.files import COMMIT
from llada_jax.interop.workdir import saved_steps
from llada_jax.tools.digest import digest

ROOT = Path(__file__).resolve().parents[1]
# A model that steps in milliseconds, so that most of a run is what kills may hit: beginning, saving, restoring.
RUN = """--config=configs/pretrain_tiny.py --config.model.d_model=32 --config.model.n_layers=2 --config.model.n_heads=4
--config.model.n_kv_heads=2 --config.model.mlp_hidden_size=48 --config.model.max_sequence_length=64
--config.data.row_length=32 --config.data.tokenizer_type=char --config.data.validation_fraction=0.1
--config.train.batch_size=8 --config.train.log_every=1 --config.train.eval_every=7 --config.train.eval_rows=16
--config.train.sample_every=0 --config.optimizer.schedule=(('constant',1e-3,'100%'),)
--config.checkpoint.every_steps=5 --config.checkpoint.keep=2 --config.checkpoint.keep_every_steps=50""".split()
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile
DEVICES = 4
TIMEOUT = 600  # seconds that a process may take


class Kill(NamedTuple):
    """One kill: what was going on, where the run will go on, and how the processes that were left alone ended."""

    moment: str
    process: int
    step: int
    codes: list[int]
    seconds: float  # until those had ended


class Run:
    """One start of the training program, as some processes."""

    def __init__(self, workdir: Path, processes: int, steps: int, address: str = ""):
        """workdir: of the run, or, if that is in the bucket of `address`, the name that its logs have."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}  # JAX's own
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes} {QUICK}",
            "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        place = [f"--workdir={address or workdir}", f"--config.train.steps={steps}"]
        command = [sys.executable, "-m", "llada_jax.train", *RUN, *place]
        if processes > 1:
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self.workdir, self.logs, self.children = workdir, [], []
        self.began = time.time()
        for i in range(processes):
            self.logs.append(workdir.parent / f"{workdir.name}.{i}.log")
            with self.logs[-1].open("w") as log:
                own = [f"--process_id={i}"] if processes > 1 else []
                child = subprocess.Popen([*command, *own], cwd=ROOT, env=environment, stdout=log, stderr=log)
            self.children.append(child)

    def is_running(self) -> bool:
        return all(child.poll() is None for child in self.children)

    def wait(self) -> list[int]:
        """The exit codes."""
        return [child.wait(TIMEOUT) for child in self.children]

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def moment(self) -> str:
        """What is going on, as far as the files tell."""
        lease = self.workdir / "lease.json"
        if not lease.exists() or lease.stat().st_mtime < self.began:
            return "joining"
        if " steps from " not in self.logs[0].read_text():
            if not (self.workdir / "inputs.json").exists():
                return "preparing"
            return "starting" if not self.steps() else "restoring"
        if any(not (place / COMMIT).exists() for place in self.workdir.glob("checkpoints/*")):
            return "saving" if self.steps() else "first save"
        return "computing"

    def steps(self) -> list[int]:
        return sorted(saved_steps(self.workdir / "checkpoints"))

    def lines(self) -> int:
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(run: Run, moment: str, draw: random.Random) -> Kill | None:
    """Waits for the moment, and some more, and kills one process; None if the run ended before.

    A moment that was missed is not waited for: the run goes on for 5 lines of metrics at most.
    """
    lines = run.lines()
    reached: dict[str, Callable[[], bool]] = {
        "any": lambda: run.moment() not in ("joining", "preparing"),
        "computing": lambda: run.moment() == "computing" and run.lines() > lines,
    }
    pause = {"any": 4.0, "preparing": 0.1, "restoring": 1.0, "computing": 0.3}.get(moment, 0.03)  # seconds, at most
    while not reached.get(moment, lambda: run.moment() == moment)() and run.lines() < lines + 5:
        if not run.is_running():
            return None
        time.sleep(0.01)
    time.sleep(draw.uniform(0, pause))
    victim = draw.randrange(len(run.children))
    found, began = run.moment(), time.monotonic()
    run.children[victim].kill()
    codes = run.wait()
    if codes[victim] != -9:
        return None
    others = [code for i, code in enumerate(codes) if i != victim]
    return Kill(found, victim, max(run.steps(), default=0), others, time.monotonic() - began)


def metrics(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith("4_")} for line in lines]


def finish(workdir: Path, processes: int, steps: int) -> None:
    """Trains to the end, once more where the processes of a busy machine have missed each other (Gloo waits 30 s)."""
    for _ in range(3):
        run = Run(workdir, processes, steps)
        codes = run.wait()
        if not any(codes):
            return
        if "Gloo context initialization failed" not in run.output():
            break
    raise InputError(f"{workdir}: ended with {codes}: {run.output()[-2000:]}")


def same(whole: Path, killed: Path) -> list[tuple[int, str, str]]:
    """Step and both digests of every checkpoint that both runs kept."""
    steps = [sorted(saved_steps(workdir / "checkpoints")) for workdir in (whole, killed)]
    return [(step, digest(whole, step)[1], digest(killed, step)[1]) for step in sorted({*steps[0], *steps[1]})]


MOMENTS = [
    "preparing",
    "preparing",
    "starting",
    "first save",
    "saving",
    "restoring",
    "computing",
    "computing",
    "saving",
    "any",
]


def main(_argv: list[str]) -> None:
    options = flags.FLAGS
    if not options.workdir:
        raise InputError("--workdir is needed: a new directory")
    root = Path(options.workdir).resolve()
    if root.exists() and any(root.iterdir()):
        raise InputError(f"{root}: exists and is not empty; give a new directory")
    finish(root / "whole", options.processes, options.steps)
    draw, done, tried = random.Random(options.seed), 0, 0
    print("| kill | moment | process | goes on at step | the others ended with | after s |\n|---|---|---|---|---|---|")
    while done < options.kills:
        # The first ones as they come, so that no beginning is missed; the others at random.
        moment = MOMENTS[tried] if tried < len(MOMENTS) else draw.choice(MOMENTS[4:])
        tried += 1
        struck = kill(Run(root / "killed", options.processes, options.steps), moment, draw)
        if struck is None:
            raise InputError(f"the run ended before {moment}; give more --steps")
        done += 1
        codes = ", ".join(map(str, struck.codes)) or "-"
        cells = [done, struck.moment, struck.process, struck.step, codes, round(struck.seconds)]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        if bad := [code for code in struck.codes if code in (0, 2)]:
            raise InputError(f"a process that lost another ended with {bad[0]}, which nobody starts again")
    finish(root / "killed", options.processes, options.steps)
    compared = same(root / "whole", root / "killed")
    print()
    for step, one, other in compared:
        print(f"step {step}: {one} whole\n{' ' * len(f'step {step}')}: {other} killed")
    lines = [metrics(root / name) for name in ("whole", "killed")]
    print(f"metrics.jsonl: {len(lines[0])} and {len(lines[1])} lines")
    if any(one != other for _, one, other in compared) or lines[0] != lines[1]:
        raise InputError("NOT equal")
    print("equal")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "A new directory.")
    flags.DEFINE_integer("processes", 1, "That train together.", lower_bound=1)
    flags.DEFINE_integer("kills", 20, "How many.")
    flags.DEFINE_integer("steps", 200, "Of training.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    cli.run(main)
