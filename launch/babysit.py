"""Keeps a run going on a TPU that may be taken away: creates it, sets it up, runs, and starts over after a preemption.

python launch/babysit.py --name=NAME --type=v5litepod-16 --spot --bucket=BUCKET [--slices=N] [--project=ID]
    [--zone=ZONE] --config=configs/llada_8b_pretrain.py --workdir=bucket/run [any flag of llada_jax.train]

The same command continues what an earlier one left, also the TPU that it created. It ends with 0 when the run has
ended well, 2 when the run ended with a mistake of the user's (its line is printed), 1 when it gave up. A run that was
told to stop and has saved (code 75) starts again and counts as no retry. Only Python's standard library is needed, and
gcloud.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

TPU_VM = Path(__file__).with_name("tpu_vm.sh")
GONE = ("SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED")
OURS = ("name", "type", "slices", "runtime", "bucket", "project", "zone", "program")  # handed on to tpu_vm.sh
UNREACHABLE = 5  # polls in a row after which an ACTIVE TPU that does not answer is replaced


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    for flag in OURS:
        parser.add_argument(f"--{flag}", required=flag in ("name", "type"))
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--dry_run", action="store_true", help="print the commands of a run without incident")
    parser.add_argument("--delete_when_done", action="store_true", help="delete the TPU when the run has ended well")
    parser.add_argument("--retries", type=int, default=100, help="how often a TPU is created anew or a run restarted")
    parser.add_argument("--poll_seconds", type=float, default=60)
    options, train_flags = parser.parse_known_args()
    try:
        return babysit(options, train_flags)
    except KeyboardInterrupt:
        say("stopped; the TPU and the run go on. tpu_vm.sh stop and delete end them")
        return 130
    except Stop as stop:
        say(f"error: {stop}")
        return stop.code


class Stop(Exception):
    """The end of the watch, with an exit code."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


class Failed(Exception):
    """A command failed that may succeed later."""


def babysit(options, train_flags: list[str]) -> int:
    """Polls and does what the state asks for, until the run has ended."""

    def do(action: str, *flags: str) -> str:
        done = tpu_vm(options, action, *flags)
        if done.returncode:
            raise Failed(f"{action}: {last_line(done.stderr) or f'code {done.returncode}'}")
        return done.stdout

    def start() -> None:
        do("setup")
        do("run", *train_flags)

    if options.dry_run:
        for step in (lambda: do("create"), start, lambda: do("run_state")):
            step()
        return 0
    retries, silent, polled = Retries(options.retries, options.poll_seconds), 0, False
    while True:
        try:
            state = last_line(do("state"))
            polled = True
            if state in GONE:
                retries.use(f"the TPU is {state}")
                do("delete")
            elif state == "NONE":
                do("create")
            elif state != "ACTIVE":
                say(f"the TPU is {state}")  # WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING
            else:
                run = run_state(options)
                silent = 0 if run else silent + 1
                if run == "EXITED 0":
                    if options.delete_when_done:
                        do("delete")
                    say("the run has ended well")
                    return 0
                if run == "EXITED 2":
                    raise Stop(2, "a mistake in the flags, the config or a file; tpu_vm.sh logs shows the line")
                if run == "EXITED 75":
                    say("the run was told to stop, and has saved; it starts again")
                elif run.startswith("EXITED"):
                    retries.use(f"the run ended with code {run.split()[-1]}")
                if run.startswith("EXITED") or run == "NOTHING":
                    start()
                elif silent == UNREACHABLE:
                    retries.use("the TPU does not answer")
                    do("delete")
                    silent = 0
        except Failed as failed:
            if not polled:  # no gcloud, no project, no such zone: it will not be better later
                raise Stop(2, str(failed)) from None
            retries.use(str(failed))
        time.sleep(options.poll_seconds)


def run_state(options) -> str:
    """RUNNING, NOTHING or "EXITED code", as its first host says; "" if that does not answer."""
    lines = tpu_vm(options, "run_state").stdout.splitlines()
    return next((line for line in reversed(lines) if re.fullmatch(r"RUNNING|NOTHING|EXITED \d+", line)), "")


class Retries:
    """Counts what went wrong and waits longer each time, up to ten polls."""

    def __init__(self, most: int, seconds: float):
        self._most, self._used, self._seconds = most, 0, seconds

    def use(self, reason: str) -> None:
        if self._used == self._most:
            raise Stop(1, f"{reason}; giving up after {self._used} retries")
        self._used += 1
        say(f"{reason}; retry {self._used}")
        time.sleep(self._seconds * min(2**self._used - 1, 10))


def tpu_vm(options, action: str, *flags: str) -> subprocess.CompletedProcess:
    given = {name: getattr(options, name) for name in OURS}
    command = ["bash", str(TPU_VM), action, *(f"--{name}={value}" for name, value in given.items() if value)]
    command += ["--spot"] * options.spot + ["--dry_run"] * options.dry_run
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    for line in done.stderr.splitlines():
        if line.startswith("+") or (done.returncode and action != "run_state"):
            print(line, file=sys.stderr, flush=True)
    return done


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
