"""What happened to a run besides its steps: one JSON line each in workdir/events.jsonl."""

import json
import time
from pathlib import Path

from llada_jax.parallel import processes


class Events:
    """Appends lines {"time", "step", "event", "cause", "action"} to `workdir`/events.jsonl, on the first process only.

    time: seconds since 1970.
    """

    def __init__(self, workdir: str | Path):
        self._path = Path(workdir) / "events.jsonl"

    def write(self, event: str, *, step: int, cause: str, action: str) -> None:
        line = {"time": time.time(), "step": step, "event": event, "cause": cause, "action": action}
        if processes.is_first():
            with self._path.open("a", encoding="utf-8") as file:  # closed at once: a kill loses nothing
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
