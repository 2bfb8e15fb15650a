"""Measures the train step, the samplers, scoring, the data path and the cost of a checkpoint; prints one table each.

python tools/benchmark.py train --shape=small [--torch] [--steps=20]
python tools/benchmark.py train --shape=llada_8b --layers=8 --rows=4
python tools/benchmark.py sample [--torch] [--runs=3]
python tools/benchmark.py evaluate [--torch] [--runs=3] [--questions=4]
python tools/benchmark.py data
python tools/benchmark.py checkpoint

--torch times a plain PyTorch step of the same model beside ours, a step each in turn, in two processes, and
each waits until the machine has nothing else to do: machines are shared, so compare the ratio, not the seconds.
Before each timed step comes one that is not, as in training: a virtual machine whose program pauses for seconds may
have given back the memory that the last step freed.
"""

import dataclasses
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from llada_jax import cli
from llada_jax.config import run_config
from llada_jax.fields import InputError
from llada_jax.model.config import PRESETS, ModelConfig
from llada_jax.objectives import OBJECTIVES
from llada_jax.parallel.chips import peak_flops
from llada_jax.parallel.mesh import global_batch, make_mesh
from llada_jax.tools import evaluate_speed, sample_speed
from llada_jax.training.step import init_state, make_train_step

SHAPE = flags.DEFINE_string("shape", "small", "Of `train`: small, vocabulary, or a preset of llada_jax/config.py.")
LAYERS = flags.DEFINE_integer("layers", 0, "Of `train`: so many layers instead of the shape's own.")
ROWS = flags.DEFINE_integer("rows", 0, "Rows of a batch. Default: the shape's.")
LENGTH = flags.DEFINE_integer("length", 0, "Tokens of a row. Default: the shape's.")
RUNS = flags.DEFINE_integer("runs", 3, "Of `sample` and `evaluate`: runs of each kind.", lower_bound=1)
QUESTIONS = flags.DEFINE_integer("questions", 4, "Of `evaluate`: how many of each kind.", lower_bound=1)
PATIENCE = flags.DEFINE_float("patience", 60, "Seconds that a step waits at most for an idle machine.", lower_bound=0)
STEPS = flags.DEFINE_integer("steps", 20, "Timed steps.", lower_bound=2)
REMAT = flags.DEFINE_string("remat", "", "What the backward pass recomputes; default: the shape's.")
MU_DTYPE = flags.DEFINE_enum("mu_dtype", "float32", ["float32", "bfloat16"], "Of Adam's first moment.")
TORCH = flags.DEFINE_bool("torch", False, "Time a PyTorch step, too (CPU).")
WORKER = flags.DEFINE_enum("worker", None, ["jax", "torch"], "For internal use.")

# (model, rows, length)
_SMALL = dataclasses.replace(PRESETS["small"], max_sequence_length=256)
_SHAPES: dict[str, tuple[ModelConfig, int, int]] = {
    "small": (_SMALL, 8, 256),
    "vocabulary": (dataclasses.replace(_SMALL, n_layers=2, vocab_size=126464, embedding_size=126464), 4, 256),
}


def shape() -> tuple[ModelConfig, int, int]:
    """(model, rows, length) of the flags."""
    if SHAPE.value in _SHAPES:
        model, rows, length = _SHAPES[SHAPE.value]
    elif SHAPE.value in PRESETS:
        model = PRESETS[SHAPE.value]
        rows, length = 1, model.max_sequence_length
    else:
        raise InputError(f"--shape={SHAPE.value} is not one of {', '.join([*_SHAPES, *PRESETS])}")
    changes: dict[str, Any] = {"n_layers": LAYERS.value or model.n_layers, "remat": REMAT.value or model.remat}
    return dataclasses.replace(model, **changes), ROWS.value or rows, LENGTH.value or length


class Step:
    """The step that `llada_jax.train` runs, on random tokens."""

    def __init__(self, c: ModelConfig, rows: int, length: int):
        import jax
        import numpy as np

        from llada_jax.parallel import chips
        from llada_jax.training import optimizer

        config = run_config()
        mesh = make_mesh(dict(config.mesh))
        jax.set_mesh(mesh)
        config.optimizer.mu_dtype = MU_DTYPE.value
        config.objective.attention = "full"
        adamw = optimizer.make_optimizer(config.optimizer, total_steps=10**6, tokens_per_step=rows * length)
        options, _ = chips.of_mesh(mesh)
        init = jax.jit(init_state, static_argnums=(0, 1), compiler_options=options)
        self.state = init(c, adamw, jax.random.key(0))
        tokens_BL = np.random.default_rng(0).integers(7, c.vocab_size, (rows, length)).astype(np.int32)
        batch = dict(
            tokens=tokens_BL, segment_ids=np.ones_like(tokens_BL), maskable=np.ones_like(tokens_BL, bool),
            answer_length=np.full(rows, length, np.int32),
        )  # fmt: skip
        self.batch = {name: global_batch(x, mesh) for name, x in batch.items()}
        self.key = jax.random.key(1)
        step = make_train_step(adamw, OBJECTIVES["pretrain"], config.objective, compiler_options=options)
        start = time.perf_counter()
        self.compiled = step.lower(self.state, self.batch, self.key).compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> float:
        self.state, metrics = self.compiled(self.state, self.batch, self.key)
        return float(metrics["loss"])


def work(name: str) -> None:
    """A child process: one step for each line of standard input, its seconds as a line of standard output."""
    c, rows, length = shape()
    facts: dict[str, Any] = {}
    if name == "jax":
        import jax

        step = Step(c, rows, length)
        facts = dict(
            compile_seconds=step.compile_seconds, devices=jax.device_count(), device=jax.devices()[0].device_kind
        )
    else:
        from llada_jax.tools.torch_step import Step as TorchStep

        step = TorchStep(c, rows, length, threads=os.cpu_count() or 1)
    for _ in range(2):  # the first ones allocate
        step()
    for _ in iter(sys.stdin.readline, ""):
        step()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "bytes": _peak_bytes(name)} | facts), flush=True)


def _child(name: str) -> subprocess.Popen:
    """This program again, as the worker of that name."""
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], f"--worker={name}"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_until_idle() -> None:
    """Returns when the processors were idle for half a second, or warns after --patience seconds. Linux only."""
    end = time.monotonic() + PATIENCE.value
    while Path("/proc/stat").exists():
        before = _busy_and_all()
        time.sleep(0.5)
        busy, ticks = (b - a for a, b in zip(before, _busy_and_all(), strict=True))
        if busy < 0.1 * ticks:
            return
        if time.monotonic() > end:
            print(f"the machine is {busy / ticks:.0%} busy with other work; measured nevertheless", file=sys.stderr)
            return


def _busy_and_all() -> tuple[int, int]:
    """Clock ticks of all processors since they started."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # without idle and waiting for disks


def _peak_bytes(name: str) -> int:
    """Of the busiest device, or of this process where devices do not tell."""
    if name == "jax":
        import jax

        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        if peak := max(s.get("peak_bytes_in_use", 0) for s in stats):
            return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train() -> None:
    """Steps of each program in turn, and a row of the table for each."""
    from llada_jax.model.transformer import parameter_count
    from llada_jax.training.metrics import flops_per_step

    c, rows, length = shape()
    names = ["jax", "torch"] if TORCH.value else ["jax"]
    children = {name: _child(name) for name in names}
    told: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(STEPS.value):
        for name, child in children.items():
            assert child.stdin and child.stdout
            wait_until_idle()
            try:
                print(file=child.stdin, flush=True)
                told[name].append(json.loads(child.stdout.readline()))
            except (ValueError, BrokenPipeError):
                sys.exit(child.wait() or 1)  # it said why
    for child in children.values():
        child.communicate()
    facts = told["jax"][0]
    print(
        f"{parameter_count(c):,} parameters, {c.n_layers} layers, {rows} rows of {length}, {c.dtype}, remat {c.remat}, "
        f"{facts['devices']} x {facts['device']}; median of {STEPS.value} steps, half the positions masked\n"
    )
    print("| | s/step | spread (10-90%) | tokens/s | TFLOP/s | MFU | peak GB | compile s |\n" + "|---" * 8 + "|")
    flops = flops_per_step(c, rows, length, scored=rows * length / 2)
    peak = peak_flops(facts["device"])
    for name in names:
        seconds = sorted(t["seconds"] for t in told[name])
        median, cut = statistics.median(seconds), len(seconds) // 10
        ours = name == "jax"
        cells = [
            "llada_jax" if ours else "PyTorch",
            f"{median:.3f}",
            f"{seconds[cut]:.3f}-{seconds[-1 - cut]:.3f}",
            f"{rows * length / median:,.0f}",
            f"{flops / median / 1e12:.3f}",
            f"{flops / median / peak / facts['devices']:.1%}" if peak and ours else "-",
            f"{told[name][-1]['bytes'] / 1e9:.2f}",
            f"{facts['compile_seconds']:.1f}" if ours else "-",
        ]
        print("| " + " | ".join(cells) + " |")
    if TORCH.value:
        ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(told["jax"], told["torch"], strict=True))
        print(f"\nllada_jax / PyTorch, step by step: {statistics.median(ratios):.2f} (median)")


def data() -> None:
    """Rows on disk to batches on the device, with the pipeline that training uses."""
    import jax
    import numpy as np

    from llada_jax.data import packing, pipeline
    from llada_jax.data.dataset import FORMAT, ShardWriter, open_dataset

    length, rows, total = LENGTH.value or 4096, ROWS.value or 16, 2048
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        writer = ShardWriter(path, packing.row_fields(length, 126_464), rows_per_shard=1024)
        random = np.random.default_rng(0)
        words = (
            (126_000 * random.random(total * length) ** 3).astype(np.int32).reshape(total, length)
        )  # a few are common
        for tokens_L in words:
            writer.write(packing.padded_row(tokens_L, length, pad_id=0, prompt_length=0))
        manifest = writer.finish() | dict(
            format=FORMAT, kind="text", row_length=length, bytes=0, documents=0, dropped=0,
            tokenizer={"file": "none", "fingerprint": hashlib.sha256(b"").hexdigest(), "vocab_size": 126_464},
        )  # fmt: skip
        (path / "none").touch()
        (path / "manifest.json").write_text(json.dumps(manifest))
        mesh = make_mesh(dict(run_config().mesh))
        print("| row length | rows a batch | tokens/s | spread (10-90%) |\n|---|---|---|---|")
        order = pipeline.ordered([open_dataset(path)])
        batches = pipeline.batches(
            order, batch_size=rows, kind="text", start_step=0, num_steps=10**9, seed=0, eos_id=2,
            random_length_fraction=0.01,
        )  # fmt: skip
        rates = []
        for _ in range(STEPS.value + 1):
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < 0.5:
                batch = {k: global_batch(x, mesh) for k, x in next(batches).items()}
                count += jax.block_until_ready(batch)["tokens"].size
            rates.append(count / (time.perf_counter() - start))
    rates = sorted(rates[1:])
    cut = len(rates) // 10
    print(f"| {length} | {rows} | {statistics.median(rates):,.0f} | {rates[cut]:,.0f}-{rates[-1 - cut]:,.0f} |")


def checkpoint() -> None:
    """What the loop loses to one asynchronous save, as a share of 100 steps; and what its checksums cost."""
    from llada_jax.training import checkpoint
    from llada_jax.training.monitor import Events

    c, rows, length = shape()
    step = Step(c, rows, length)
    for _ in range(2):
        step()
    with tempfile.TemporaryDirectory() as directory:
        config = run_config()
        config.checkpoint.every_steps = 1
        config.checkpoint.keep = 1
        saver = checkpoint.Checkpointer(directory, config, Events(directory))
        lost, plain, blocked = [], [], []
        for i in range(1, 6):
            start = time.perf_counter()
            for _ in range(STEPS.value):
                step()
            without = time.perf_counter() - start
            start = time.perf_counter()
            saver.save(i, step.state)
            blocked.append(time.perf_counter() - start)
            for _ in range(STEPS.value):
                step()
            lost.append(time.perf_counter() - start - without)
            plain.append(without / STEPS.value)
        hashed, bare = [], []
        write_checksums = checkpoint.write_checksums
        for i in range(6, 16):  # in turn
            seconds = (hashed, bare)[i % 2]
            checkpoint.write_checksums = (write_checksums, lambda *_: None)[i % 2]
            start = time.perf_counter()
            saver.save(i, step.state)
            saver.wait()
            seconds.append(time.perf_counter() - start)
        saver.close()
        size = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
    per_step, extra = statistics.median(plain), statistics.median(lost)
    print(
        "| s/step | checkpoint GB | s until the loop goes on | s lost in all | share of 100 steps |\n"
        + "|---" * 5
        + "|"
    )
    print(
        f"| {per_step:.3f} | {size / 1e9:.2f} | {statistics.median(blocked):.3f} | {extra:.2f} "
        f"| {extra / (100 * per_step):.1%} |"
    )
    with_, without = min(hashed), min(bare)
    print(
        f"the quickest of 5 saves: {with_:.2f} s with checksums, {without:.2f} s without; ratio {with_ / without:.2f}"
    )


def sample() -> None:
    """Completions by each cache, and with --torch by PyTorch."""
    sample_speed.measure(TORCH.value, RUNS.value, _child, wait_until_idle)


def evaluate() -> None:
    """Multiple choice by our batches, and with --torch by the official loop."""
    evaluate_speed.measure(TORCH.value, RUNS.value, QUESTIONS.value, wait_until_idle)


_COMMANDS = {"train": train, "sample": sample, "evaluate": evaluate, "data": data, "checkpoint": checkpoint}


def main(argv: list[str]) -> None:
    if WORKER.value:
        sample_speed.work(WORKER.value) if argv[1] == "sample" else work(WORKER.value)
    else:
        _COMMANDS[argv[1]]()


if __name__ == "__main__":
    cli.run(main, commands=list(_COMMANDS))
