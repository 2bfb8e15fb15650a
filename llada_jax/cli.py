"""How every command line of the project starts, and how it ends: what goes wrong is one clear line and an exit code.

0 done; 1 something failed that is no mistake of the user's, so that the same command may succeed later; 2 a mistake of
the user's, found before the first step; 75 stopped by SIGTERM, and 130 by Ctrl-C: the same command continues.
"""

import errno
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from llada_jax import help
from llada_jax.fields import InputError, RunFailed

STOPPED = {signal.SIGTERM: 75, signal.SIGINT: 130}  # exit codes; launch/babysit.py starts a run with 75 again
SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}

_USERS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Preempted(Exception):
    """The run has saved its step and stopped because a signal asked for it."""

    shared = True  # every process raises it

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM):
        super().__init__(f"stopped by {SIGNALS[number]}; step {step} is saved, the same command continues from there")
        self.step, self.number = step, number


def run(main: Callable[[list[str]], None], *, commands: Sequence[str] = (), words: bool = False) -> None:
    """`app.run(main)`, ending as the head of this file says.

    commands: words of which the command line must have one, argv[1], before or among the flags. words: whether it may
    have any others.
    """

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.FATAL)  # Orbax logs at length, and raises what matters
        sys.unraisablehook = _unraisable
        if commands and (len(argv) < 2 or argv[1] not in commands):
            fail(f"say what to do: {os.path.basename(argv[0])} {'|'.join(commands)} [--flags]")
        if not words and (unexpected := argv[1 + bool(commands) :]):
            fail(f"unexpected argument {unexpected[0]!r}; flags are written --name=value")
        try:
            main(argv)
        except (Exception, KeyboardInterrupt) as error:
            sys.exit(report(error))

    app.run(guarded, flags_parser=functools.partial(_parse, main))


def report(error: BaseException) -> int:
    """Prints what ends a command, in one line where it is known what it is; returns the exit code."""
    if isinstance(error, Preempted):
        say(str(error))
        return STOPPED[error.number]
    if isinstance(error, KeyboardInterrupt):
        say("stopped by Ctrl-C")
        return STOPPED[signal.SIGINT]
    code = 2 if is_users(error) else 1
    if isinstance(error, InputError | RunFailed):
        say(f"error: {error}")
        return code
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
        advice = "free space" if error.errno in _FULL else "look at the disk, its owner and its mount"
        say(f"error: {error.strerror}: {error.filename or 'while writing'}; {advice}, or choose another directory")
        return code
    if os.strerror(errno.ENOSPC) in str(error):  # Orbax and ArrayRecord wrap a full disk in errors of their own
        say("error: no space left on device while writing; free space or choose another directory, then run it again")
        return 1
    traceback.print_exception(error)
    return 1


def is_users(error: BaseException) -> bool:
    """Whether it is a mistake of the user's, who must change something before it can go well."""
    return isinstance(error, InputError) or (isinstance(error, OSError) and error.errno in _USERS)


def fail(message: str) -> NoReturn:
    say(f"error: {message}")
    sys.exit(2)


def say(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr, flush=True)


def end(code: int) -> NoReturn:
    """Ends the process at once, from whatever thread, with what was printed on the terminal."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _unraisable(problem) -> None:
    """Silent about what TensorStore's threads report when a write has failed and Orbax's event loop is gone."""
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


def _parse(main: Callable, argv: list[str]) -> list[str]:
    """Flags, `--config` files among them: what they raise becomes one line."""
    if help.is_asked(argv):
        sys.stdout.write(help.text(main, full=any("helpfull" in word for word in argv)))
        sys.exit(0)
    try:
        rest = flags.FLAGS(help.config_paths(argv))
        _open_config()
    except SyntaxError as error:
        fail(f"{error.filename}, line {error.lineno}: not Python ({error.msg}); --config names a file of configs/")
    except flags.Error as error:
        fail(f"{_last_line(error)}; --help lists the flags")
    except (KeyError, AttributeError) as error:  # ml_collections, for an override of a field that is not there
        named = _last_line(error).replace("\\n", " ").replace("\\'", "").strip("'\" ")
        fail(f"the config has no such field: {named}")
    except (InputError, TypeError, ValueError) as error:  # a value of another type
        fail(_last_line(error))
    return rest


def _open_config() -> None:
    """ml_collections tells of a file that it could not load only when the config is first used."""
    if "config" in flags.FLAGS and flags.FLAGS["config"].present:
        try:
            getattr(flags.FLAGS.config, "keys", None)
        except OSError:
            name = config_flags.get_config_filename(flags.FLAGS["config"])
            fail(help.no_config(name))


def _last_line(error: Exception) -> str:
    """The message without the traceback that ml_collections puts into it."""
    text = str(error.args[0] if error.args else error).strip()
    if "Traceback" not in text:
        return text
    return text.splitlines()[-1].removeprefix("llada_jax.fields.InputError: ")
