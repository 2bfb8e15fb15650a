"""How every command line of the project starts, and how it fails: one clear line and exit code 2."""

import errno
import sys
from collections.abc import Callable

from absl import app, flags

from llada_jax.config import InputError


def run(main: Callable[[list[str]], None]) -> None:
    """`app.run(main)`; a wrong flag, an InputError or a full disk prints one line and exits with code 2."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}; flags are written --name=value")
        try:
            main(argv)
        except InputError as error:
            fail(str(error))
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

    app.run(guarded, flags_parser=_parse)


def fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    """Flags, `--config` files among them: what they raise becomes one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(f"{error}; --help lists the flags")
    except (InputError, KeyError, AttributeError, TypeError, ValueError) as error:
        # A config file or an override of it: ml_collections raises these for a field that does not exist or a
        # value of another type.
        fail(error.args[0] if error.args else repr(error))
    except OSError as error:
        fail(f"can't read {error.filename}: {error.strerror}")
    raise AssertionError
