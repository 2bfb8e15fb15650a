"""How every command line of the project starts, and how it fails: one clear line and exit code 2."""

import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from llada_jax import help
from llada_jax.fields import InputError

TRY_AGAIN = 75  # the exit code of a run that was told to stop, and has saved; launch/babysit.py starts it again


class Preempted(Exception):
    """The run has saved its step and stopped because SIGTERM asked for it."""

    shared = True  # every process raises it

    def __init__(self, step: int):
        super().__init__(f"stopped by SIGTERM; step {step} is saved, the same command continues from there")
        self.step = step


def run(main: Callable[[list[str]], None], *, commands: Sequence[str] = ()) -> None:
    """`app.run(main)`; a wrong flag, an InputError or a full disk prints one line and exits with code 2.

    commands: words of which the command line must have one, argv[1], before or among the flags.
    """

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.FATAL)  # Orbax logs at length, and raises what matters
        sys.unraisablehook = _unraisable
        if commands and (len(argv) < 2 or argv[1] not in commands):
            fail(f"say what to do: {os.path.basename(argv[0])} {'|'.join(commands)} [--flags]")
        if unexpected := argv[1 + bool(commands) :]:
            fail(f"unexpected argument {unexpected[0]!r}; flags are written --name=value")
        try:
            main(argv)
        except InputError as error:
            fail(str(error))
        except Preempted as preempted:
            print(preempted, file=sys.stderr)
            sys.exit(TRY_AGAIN)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            fail(f"{error.strerror}: {error.filename or 'while writing'}; free space or choose another directory")
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:  # Orbax and ArrayRecord wrap a full disk in errors of their own
            if "No space left on device" not in str(error):
                raise
            fail("no space left on device while writing; free space or choose another directory, then run it again")

    app.run(guarded, flags_parser=functools.partial(_parse, main))


def fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


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
    except flags.Error as error:
        fail(f"{_last_line(error)}; --help lists the flags")
    except (KeyError, AttributeError) as error:  # ml_collections, for an override of a field that is not there
        named = _last_line(error).replace("\\n", " ").replace("\\'", "").strip("'\" ")
        fail(f"the config has no such field: {named}")
    except (InputError, TypeError, ValueError) as error:  # a value of another type
        fail(_last_line(error))
    else:
        _open_config()
        return rest
    raise AssertionError


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
