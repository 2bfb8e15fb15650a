"""Renders messages with chat templates, which strangers may have written, in a process with limits.

`render` starts this file as that process. It reads lines of JSON, {"template", "values"}, and answers each with a line,
{"text"} or {"error"}. jinja2's sandbox keeps Python's objects out of reach of a template; limits of the process bound
what the sandbox cannot: time (loops in loops), memory (texts that double) and the size of the result.
"""

import atexit
import contextlib
import functools
import json
import math
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

SECONDS = 2  # of the processor for one rendering, which takes a millisecond
MEMORY = 2**30  # bytes of address space
CHARACTERS = 2**22  # of the rendered text


class _Renderer:
    """The process that renders; started when it is first asked, and again after a template has brought it down."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._close()
                command = [sys.executable, "-P", __file__]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            answer = _exchange(self._process, json.dumps(request).encode() + b"\n")
            if answer.endswith(b"\n"):
                return json.loads(answer)
            code = self._close()
        if code == -signal.SIGXCPU:
            return {"error": f"takes over {SECONDS} seconds for these messages"}
        return {"error": f"brings the process that renders it down (exit code {code})"}

    def _close(self) -> int | None:
        """Closes both ends, at which the process ends; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(BrokenPipeError), process:
            pass
        return process.wait()


def _exchange(process: subprocess.Popen, line: bytes) -> bytes:
    """The line that comes back, incomplete if the process ended."""
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None
    try:
        stdin.write(line)
        stdin.flush()
    except BrokenPipeError:
        return b""
    return stdout.readline()


_RENDERER = _Renderer()  # one process renders for all tokenizers
atexit.register(_RENDERER._close)


def render(template: str, values: dict[str, Any], where: Path) -> str:
    """The text of a template. Raises InputError that names `where` it came from, whatever the template does."""
    from llada_jax.data.sources import check_unicode  # not above: the process that renders starts without the package
    from llada_jax.fields import InputError

    answer = _RENDERER.ask({"template": template, "values": values})
    if "error" in answer:
        raise InputError(f"{where}: its chat template {' '.join(answer['error'].split())}")
    return check_unicode(answer["text"], f"{where}: what its chat template makes")


class _Refusal(Exception):
    """What a template raises by raise_exception()."""


def environment() -> jinja2.Environment:
    """How chat templates are written: as transformers renders them."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    made.globals["raise_exception"] = _refuse
    return made


def _refuse(reason):
    raise _Refusal(reason)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def _render(template: str, values: dict) -> dict[str, str]:
    parts, length = [], 0
    try:
        for part in _compiled(template).generate(**values):
            parts.append(part)
            length += len(part)
            if length > CHARACTERS:
                return {"error": f"makes over {CHARACTERS} characters of these messages"}
    except _Refusal as error:
        return {"error": f"refuses these messages: {error}"}
    except MemoryError:
        return {"error": "needs more memory than a chat template may"}
    except Exception as error:  # whatever a template does wrong, from its syntax to adding a number to a text
        return {"error": f"fails ({type(error).__name__}: {str(error)[:200]})"}
    return {"text": "".join(parts)}


def _main() -> None:
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (most, most))
    for line in sys.stdin:
        allowed = math.ceil(time.process_time()) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        request = json.loads(line)
        sys.stdout.write(json.dumps(_render(request["template"], request["values"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
