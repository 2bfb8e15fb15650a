"""A dialogue with a model: it grows with every answer, can be cut, kept in a file and continued."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llada_jax.data.chat import check_messages
from llada_jax.fields import InputError
from llada_jax.files import read_json, write_atomic
from llada_jax.sampling import prompts
from llada_jax.serving.engine import Engine, Progress
from llada_jax.serving.settings import changed, check_settings
from llada_jax.streams import stream


@dataclasses.dataclass
class Dialogue:
    """Messages, and how their answers are sampled. settings: see settings.py."""

    engine: Engine
    settings: dict[str, Any]
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def answer(self, text: str) -> Iterator[Progress]:
        """Sends a message; yields what the answer has come to after every pass. The last one is the answer.

        The dialogue grows when the answer is complete. Raises InputError where it no longer fits into the context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.engine.tokenizer.encode_chat(messages)
        key = jax.random.fold_in(stream(self.engine.seed, "sample"), len(messages))
        for progress in self.engine.submit(ids, self.settings, key=key):
            yield progress
            if progress.done:
                reply = prompts.reply_text(self.engine.tokenizer, progress.tokens)
                self.messages = [*messages, {"role": "assistant", "content": reply}]

    def set(self, name: str, text: str) -> None:
        """Changes a setting. Raises InputError for one that is unknown or out of range, and leaves all as they were."""
        self.settings = changed(self.engine.config, self.settings, name, text)

    def undo(self) -> None:
        """Forgets the last message and its answer."""
        if not self.messages:
            raise InputError("there is nothing to undo")
        self.messages = self.messages[:-2]

    def save(self, path: Path) -> None:
        """Writes the dialogue and the settings: a line of JSON that fine-tuning reads, too."""
        if not self.messages:
            raise InputError("there is nothing to save yet")
        text = json.dumps({"messages": self.messages, "settings": self.settings}, ensure_ascii=False)
        write_atomic(path, text + "\n")

    def load(self, path: Path) -> None:
        """Continues a dialogue that was saved. Raises InputError for another file, and leaves all as it was."""
        found = read_json(path)
        messages = check_messages(found.get("messages"), str(path))
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{path}: its last message has no answer")
        settings = found.get("settings", self.settings)
        if not isinstance(settings, dict):
            raise InputError(f"{path}: its settings are no object")
        check_settings(self.engine.config, settings)
        self.messages, self.settings = messages, settings
