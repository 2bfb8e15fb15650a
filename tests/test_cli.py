"""How commands end: one line and an exit code for what is known, a traceback for what is not."""

import errno
import signal
import subprocess
import sys

import pytest

from llada_jax import cli
from llada_jax.fields import InputError, RunFailed


@pytest.mark.parametrize(
    "error, code, line",
    [
        (InputError("no such field"), 2, "error: no such field"),
        (RunFailed("the last save failed"), 1, "error: the last save failed"),
        (OSError(errno.EIO, "Input/output error", "f"), 1, "error: Input/output error: f; look at the disk"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device: while writing; free space"),
        (OSError(errno.ETIMEDOUT, "Connection timed out", "f"), 1, "error: Connection timed out: f"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 2, "error: Permission denied: f"),
        (OSError(errno.EROFS, "Read-only file system", "f"), 2, "error: Read-only file system: f; look at the disk"),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device"), 1, "error: no space left on device while writing"),
        (cli.Preempted(7), 75, "stopped by SIGTERM; step 7 is saved, the same command continues from there"),
        (cli.Preempted(7, signal.SIGINT), 130, "stopped by Ctrl-C; step 7 is saved"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_what_is_known_ends_in_one_line(capsys, error, code, line):
    assert cli.report(error) == code
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    "error", [KeyError("x"), FileNotFoundError(errno.ENOENT, "No such file", "f"), ValueError("x")]
)
def test_what_is_not_known_keeps_its_traceback(capsys, error):
    assert cli.report(error) == 1
    assert type(error).__name__ in capsys.readouterr().err.splitlines()[-1]


def test_a_config_that_is_no_python_is_one_line(tmp_path):
    (tmp_path / "page.py").write_text("# title\n\nsome words\n")
    command = [sys.executable, "-m", "llada_jax.train", f"--config={tmp_path / 'page.py'}", "--workdir=x"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    place = f"{tmp_path / 'page.py'}, line 3"
    assert ended.stderr == f"error: {place}: not Python (invalid syntax); --config names a file of configs/\n"
