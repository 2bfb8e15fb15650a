"""Runs several commands of the project in forks of one process, so that JAX is imported once.

Reads lists of words from standard input, as JSON: `python FILE …` or `python -m MODULE …`, each in the directory of
this process. Writes [exit code, output] of each.
"""

import json
import os
import runpy
import sys
import tempfile
import traceback
import warnings

import grain  # noqa: F401
import jax  # noqa: F401
import optax  # noqa: F401
from flax import nnx  # noqa: F401
from orbax.checkpoint import v1 as ocp  # noqa: F401

import llada_jax.training.run  # noqa: F401


def run(words: list[str]) -> tuple[int, str]:
    """The exit code of a command and what it printed."""
    with tempfile.TemporaryFile("w+") as output:
        if not (child := os.fork()):
            _become(words, output)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read()


def _become(words: list[str], output) -> None:
    """Ends this process as the command would."""
    code = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        is_module = words[1] == "-m"
        sys.argv = words[2:] if is_module else words[1:]
        if is_module:
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[1], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "os.fork")  # nothing has started a thread of JAX yet
    json.dump([run(words) for words in json.load(sys.stdin)], sys.stdout)
