"""Messages become text by a chat template, which a stranger may have written: rendered where it can do no harm."""

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from llada_jax.data import template_process
from llada_jax.fields import InputError


class _Renderer:
    """The process that renders; started when it is first asked, and again after a template has brought it down."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._close()
                command = [sys.executable, "-P", template_process.__file__]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            answer = _exchange(self._process, json.dumps(request).encode() + b"\n")
            if answer.endswith(b"\n"):
                return json.loads(answer)
            code = self._close()
        if code == -signal.SIGXCPU:
            return {"error": f"takes over {template_process.SECONDS} seconds for these messages"}
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


_RENDERER = _Renderer()  # one process for all tokenizers
atexit.register(_RENDERER._close)


def render(template: str, values: dict[str, Any], where: Path) -> str:
    """The text of a template. Raises InputError that names `where` it came from, whatever the template does."""
    answer = _RENDERER.ask({"template": template, "values": values})
    if "error" in answer:
        raise InputError(f"{where}: its chat template {' '.join(answer['error'].split())}")
    return answer["text"]
