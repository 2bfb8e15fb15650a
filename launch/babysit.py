"""Keeps a run going on a TPU that may be taken away: creates it, sets it up, runs, and starts over after a preemption.

python launch/babysit.py --name=NAME --type=v5litepod-16 --spot [--project=ID] [--zone=ZONE]
    --config=configs/llada_8b_pretrain.py --workdir=gs://BUCKET/run [any flag of llada_jax.train]

It takes the flags of launch/tpu_vm.sh, too (--slices, --bucket, --reserved, --network, …). The same command continues
what an earlier one left, also the TPU that it created.

What may pass is waited for, without end and each time a little longer: no capacity, preemption, a network that is
down, a TPU that does not answer and is replaced. What will not pass ends the watch with one line: no login, no
permission, a wrong zone or type, no quota, a mistake in the run's flags. A run that crashes is started again; after
--retries crashes in a row without a new step the watch gives up.

Exit codes: 0 the run has ended well, 1 it crashes at the same place, 2 a mistake of the user's, 130 or 143 interrupted
(the run goes on). Only Python's standard library is needed, and gcloud.
"""

import argparse
import enum
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

TPU_VM = Path(__file__).with_name("tpu_vm.sh")
NAMED = (
    "name", "type", "slices", "runtime", "bucket", "project", "zone", "program", "cache",
    "network", "subnetwork", "service-account", "labels", "tags",
)  # fmt: skip
SWITCHES = ("spot", "reserved", "internal-ips", "internal-ip", "tunnel-through-iap")
GONE = ("SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED")
UNREACHABLE = 5  # times in a row after which an ACTIVE TPU that does not answer is replaced
LONGEST_WAIT = 30  # polls
LONG_RUN = 60  # polls, after which a run whose log names no step counts as one that works
SECONDS = {"setup": 3600, "run": 1800, "create": 1800, "delete": 1800}  # that an action may take; others, 300


class Trouble(enum.Enum):
    """What an error of gcloud means for the watch."""

    NETWORK = "the network"
    STOCKOUT = "no capacity"
    QUOTA = "quota"
    PREEMPTED = "preempted"
    MISTAKE = "a mistake"
    OTHER = "an error"


# The first pattern that is found decides. Between a login that has expired and a network that is down, gcloud's message
# differs by the reason alone.
TROUBLES = (
    (Trouble.NETWORK, r"Max retries exceeded|resolve|ConnectionError|[Cc]onnection (refused|reset|timed out|aborted)"),
    (Trouble.NETWORK, r"UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|[Tt]imed out|status'?: '?50[0234]|did not answer"),
    (Trouble.PREEMPTED, r"terminal state|PREEMPTED"),
    (Trouble.STOCKOUT, r"no more capacity|[Ii]nsufficient .*capacity|stockout|currently unavailable"),
    (Trouble.QUOTA, r"[Qq]uota|QUOTA"),
    (Trouble.STOCKOUT, r"RESOURCE_EXHAUSTED"),
    (Trouble.MISTAKE, r"PERMISSION_DENIED|[Pp]ermission ('.*)?denied on|UNAUTHENTICATED|INVALID_ARGUMENT"),
    (Trouble.MISTAKE, r"active account|auth tokens|[Rr]eauthenticat|invalid_grant|SSH Key is not present"),
    (Trouble.MISTAKE, r"(?i)location .*(not found|does not exist)|accelerator ?type|runtime ?version"),
)


def trouble(message: str) -> Trouble:
    """The kind of an error message of gcloud."""
    return next((kind for kind, pattern in TROUBLES if re.search(pattern, message)), Trouble.OTHER)


def main() -> int:
    options, train_flags = parser().parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    watch = Watch(options, train_flags)
    try:
        return watch.dry_run() if options.dry_run else watch.until_the_end()
    except Stop as stop:
        say(f"error: {stop}")
        return stop.code
    except (KeyboardInterrupt, SystemExit) as end:
        say("interrupted; the TPU and the run go on. tpu_vm.sh stop and delete end them")
        return 130 if isinstance(end, KeyboardInterrupt) else 143


def parser() -> argparse.ArgumentParser:
    """The flags of this program and of tpu_vm.sh; others are the run's."""
    flags = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    for flag in NAMED:
        flags.add_argument(f"--{flag}", required=flag in ("name", "type"))
    for flag in SWITCHES:
        flags.add_argument(f"--{flag}", action="store_true")
    flags.add_argument("--dry_run", action="store_true", help="print the commands of a run without incident")
    flags.add_argument("--delete_when_done", action="store_true", help="delete the TPU when the run has ended well")
    flags.add_argument("--retries", type=int, default=5, help="crashes in a row, without a new step, that are retried")
    flags.add_argument("--poll_seconds", type=float, default=60)
    return flags


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; --help lists the flags\n")


class Stop(Exception):
    """The end of the watch, with an exit code."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


class Failed(Exception):
    """A command failed."""


class Watch:
    """Polls the TPU and its run, and does what their states ask for."""

    def __init__(self, options: argparse.Namespace, train_flags: list[str]):
        given = {flag: getattr(options, flag.replace("-", "_")) for flag in (*NAMED, *SWITCHES)}
        self._flags = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in given.items() if value]
        self._options, self._train_flags = options, train_flags
        self._newest_step = -1
        self._waits = self._crashes = 0  # in a row, without a new step; they make the next wait longer
        self._silent = 0  # polls in a row that an ACTIVE TPU did not answer
        self._running = 0  # polls in a row that the run went on
        self._had_tpu = self._has_answered = False

    def dry_run(self) -> int:
        """Prints the commands of a run without incident."""
        for action in ("create", "setup", "run"):
            self._do(action)
        return 0

    def until_the_end(self) -> int:
        """Returns 0 when the run has ended well; raises Stop when the watch must end before."""
        while True:
            try:
                if self._look():
                    return 0
            except Failed as failed:
                self._heed(str(failed))
            time.sleep(self._options.poll_seconds)

    def _look(self) -> bool:
        """One poll; True if the run has ended well."""
        state, _, reason = last_line(self._do("state")).partition(": ")
        if state == "NONE":
            self._do("create")
        elif state in GONE:
            self._do("delete")
            self._heed(reason or f"the TPU is {state}", preempted=state != "FAILED")
        elif state == "ACTIVE":
            self._had_tpu = True
            try:
                ended = self._look_at_run()
                self._silent = 0
                return ended
            except Failed as failed:
                self._heed_silence(str(failed))
        else:
            say(f"the TPU is {state}")  # WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING
        return False

    def _look_at_run(self) -> bool:
        now, code, step, said = self._run_state()
        self._has_answered = True
        if step > self._newest_step:
            self._newest_step, self._waits, self._crashes = step, 0, 0
        if now == "RUNNING":
            self._running += 1
            if step < 0 and self._running >= LONG_RUN:
                self._waits = self._crashes = 0
            return False
        self._running = 0
        if code == 0:
            if self._options.delete_when_done:
                self._do("delete")
            say("the run has ended well")
            return True
        if code == 2:
            raise Stop(2, said.removeprefix("error: ") or "a mistake in the run's flags; tpu_vm.sh logs shows it")
        if code == 130:
            raise Stop(130, f"somebody interrupted the run on the TPU: {said}")
        if code == 75:
            say("the run was asked to stop, and has saved; it starts again")
        elif code is not None:
            self._crash(f"the run ended with code {code}: {said}")
        self._do("setup")
        self._do("run")
        return False

    def _run_state(self) -> tuple[str, int | None, int, str]:
        """(RUNNING, EXITED or NOTHING; exit code; newest step, else -1; last words), as the first host says.

        Raises Failed if it does not answer.
        """
        answer = self._do("run_state")
        lines = re.findall(r"^(RUNNING|NOTHING|EXITED (\d+))(?: step (\d+))?$", answer, re.M)
        if not lines:
            raise Failed("the TPU did not answer")
        now, code, step = lines[-1]
        said = re.findall(r"^said: (.*)$", answer, re.M)
        return now.split()[0], int(code) if code else None, int(step or -1), said[-1] if said else ""

    def _heed(self, message: str, preempted: bool = False) -> None:
        """Waits for what may pass; raises Stop for what will not."""
        kind = Trouble.PREEMPTED if preempted else trouble(message)
        if kind is Trouble.MISTAKE or (kind is Trouble.QUOTA and not self._had_tpu):
            raise Stop(2, message)
        if kind is Trouble.PREEMPTED:
            say(f"preempted: {message}")
        else:
            self._waits += 1
            self._wait(f"{kind.value}: {message}", self._waits)

    def _heed_silence(self, message: str) -> None:
        """What to do about a TPU that is there but does not answer, or can't be set up."""
        self._silent += 1
        if trouble(message) is Trouble.PREEMPTED:
            say(f"preempted: {message}")
        elif self._silent < UNREACHABLE:
            return self._heed(message)
        elif not self._has_answered:
            raise Stop(2, f"no TPU has ever answered ({message}); is a firewall in the way, or the ssh key missing?")
        elif self._newest_step < 0:  # nothing has ever worked, so that it may be a mistake of the user's
            self._crash(f"the TPU can't be used and is replaced: {message}")
        else:
            self._waits += 1
            self._wait(f"the TPU can't be used and is replaced: {message}", self._waits)
        self._silent = 0
        self._do("delete")

    def _crash(self, reason: str) -> None:
        if self._crashes == self._options.retries:
            raise Stop(1, f"{reason}; no new step after {self._crashes} retries, giving up")
        self._crashes += 1
        self._wait(f"{reason}; retry {self._crashes} of {self._options.retries}", self._crashes)

    def _wait(self, reason: str, times: int) -> None:
        say(reason)
        time.sleep(self._options.poll_seconds * min(2 ** min(times, 10) - 1, LONGEST_WAIT))

    def _do(self, action: str) -> str:
        """What an action of tpu_vm.sh prints. Raises Failed, or Stop if it says that the user must change something."""
        command = ["bash", str(TPU_VM), action, *self._flags]
        command += ["--dry_run"] * self._options.dry_run + ["--quiet"] * (action in ("state", "run_state"))
        command += self._train_flags if action == "run" else []
        code, output, errors = run(command, SECONDS.get(action, 300))
        for line in errors.splitlines():
            if line.startswith("+"):
                print(line, file=sys.stderr, flush=True)
        if code:
            message = error_line(errors)
            if code == 2 and re.search(r"^(error: |ERROR: \(gcloud)", errors, re.M):
                raise Stop(2, message)
            raise Failed(f"{action}: {message or f'code {code}'}")
        return output


def run(command: list[str], seconds: float) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command, which is ended with all that it started if it takes longer."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=seconds)
        return process.returncode, output, errors
    except subprocess.TimeoutExpired:
        return 1, "", f"error: did not answer for {seconds} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def error_line(text: str) -> str:
    """The line of a program's stderr that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("+")]
    for start in ("error: ", "ERROR"):
        for line in reversed(lines):
            if line.startswith(start):
                return line.removeprefix("error: ")
    return lines[-1] if lines else ""


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


def say(line: str) -> None:
    print(f"{time.strftime('%F %T')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
