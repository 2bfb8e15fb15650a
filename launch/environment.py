"""Makes or updates the virtual environment of the scripts beside it. Needs Python's standard library alone.

python launch/environment.py DIRECTORY [EXTRA…]

Installs this checkout and the extras of pyproject.toml, unless the last call did so and neither requirements.txt nor
pyproject.toml changed since. An environment is updated in place by pip and never removed: a run may be using it. A
directory that this program did not make is refused. Of two calls at once the second waits.
"""

import contextlib
import fcntl
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
# In every environment of ours; it holds what was installed last (nothing while pip works), and is the lock.
MARKER = ".llada_jax"


def main() -> int:
    directory, extras = Path(sys.argv[1]), sys.argv[2:]
    try:
        prepare(directory, extras)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return refused.code
    except KeyboardInterrupt:
        return 130
    return 0


class Refused(Exception):
    """The environment can't be made; the message says why. code: 2 for what the user must change, else 1."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def prepare(directory: Path, extras: list[str]) -> None:
    """Brings the environment in `directory` up to date. Raises Refused."""
    now, marker, python = wanted(extras), directory / MARKER, directory / "bin" / "python"
    if _is_ready(marker, python, now):
        return
    if directory.exists() and not marker.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise Refused(2, f"{directory} was not made by this script, which leaves it alone; move it away")
    directory.mkdir(parents=True, exist_ok=True)
    with marker.open("a+") as file:
        _lock(file, directory)
        if _is_ready(marker, python, now):  # another call has just done it
            return
        file.truncate(0)
        if not _works(python):
            print(f"Setting up {directory} with Python {sys.version.split()[0]} (a minute or two)", file=sys.stderr)
            _run([sys.executable, "-m", "venv", directory], 2, "can't make a virtual environment")
        else:
            print(f"Updating {directory}", file=sys.stderr)
        target = f".[{','.join(extras)}]" if extras else "."
        pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input"]
        _run([*pip, "--editable", target], 1, "pip could not install the requirements")
        file.write(now)


def wanted(extras: list[str]) -> str:
    """What the marker of an environment holds when it is up to date."""
    facts = [(ROOT / name).read_bytes() for name in ("requirements.txt", "pyproject.toml")]
    return hashlib.sha256(b"\0".join([*facts, *(extra.encode() for extra in extras)])).hexdigest()


def _is_ready(marker: Path, python: Path, now: str) -> bool:
    return python.exists() and marker.exists() and marker.read_text() == now


def _works(python: Path) -> bool:
    """Whether an environment is there whose Python starts: the one that it was made from may be gone or too old."""
    test = "import pip, sys; sys.exit(sys.version_info < (3, 11))"
    return python.exists() and subprocess.run([python, "-c", test], capture_output=True).returncode == 0


def _lock(file: TextIO, directory: Path) -> None:
    """Waits until no other call works on the environment. A call that was killed holds no lock."""
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        print(f"Another script sets up {directory}; waiting for it", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # some cluster file systems have no locks
        print(f"{directory}: can't be locked ({error.strerror}); start one script at a time", file=sys.stderr)


def _run(command: list, code: int, failure: str) -> None:
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr, stdin=subprocess.DEVNULL).returncode:
        raise Refused(code, f"{failure}; its message is above")


if __name__ == "__main__":
    sys.exit(main())
