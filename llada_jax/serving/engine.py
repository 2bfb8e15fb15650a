"""One model and one queue: prompts go in, every answer is a stream of what it has come to, and can be cancelled.

G tokens of an answer, or of a text whose masks are filled.
"""

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.interop.workdir import load_config
from llada_jax.parallel.mesh import inference_mesh, make_mesh, under
from llada_jax.sampling import generate
from llada_jax.sampling.cache import prepare
from llada_jax.serving.settings import check_settings, default_settings
from llada_jax.streams import stream


class Busy(Exception):
    """So many answers are waiting that this one is not taken."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What an answer has come to: tokens, step, probability [G] as in `generate.Stats`.

    seconds: since its first pass began.
    """

    tokens: np.ndarray
    step: np.ndarray
    probability: np.ndarray
    passes: int
    seconds: float
    done: bool

    def speed(self) -> str:
        """Tokens, passes and their ratios, for people to read."""
        count = int((self.step >= 0).sum())
        return (
            f"{count} tokens, {self.passes} passes, {count / max(self.passes, 1):.1f} tokens a pass, "
            f"{count / max(self.seconds, 1e-9):.1f} tokens/s"
        )


class Answer:
    """An answer in the queue, or one that is being made. Iterate over it, once; stopping to do so cancels it."""

    def __init__(self, updates: Iterator[generate.Update], first: int, before):
        self._source, self._first, self._before = updates, first, before
        self._updates: queue.SimpleQueue[Progress | Exception | None] = queue.SimpleQueue()
        self._is_cancelled = False

    def __iter__(self) -> Iterator[Progress]:
        for progress in self.updates(None):
            assert progress is not None
            yield progress

    def updates(self, patience: float | None) -> Iterator[Progress | None]:
        """Progress after every part, until all is done or cancelled; None where `patience` seconds brought none."""
        try:
            while True:
                try:
                    item = self._updates.get(timeout=patience)
                except queue.Empty:
                    yield None
                    continue
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends it after the pass that is running; whoever iterates over it comes to the end at once."""
        self._is_cancelled = True
        self._updates.put(None)

    def before(self) -> int:
        """How many answers are made before this one."""
        return self._before(self)

    def _run(self) -> None:
        began = time.monotonic()
        try:
            for u in () if self._is_cancelled else self._source:
                if self._is_cancelled:
                    break
                tokens, step, probability = (x[0, self._first :] for x in (u.tokens, u.step, u.probability))
                passes = u.full_passes + u.window_passes
                self._updates.put(Progress(tokens, step, probability, passes, time.monotonic() - began, u.done))
        except Exception as error:  # the reader's; the next answer has nothing to do with it
            self._updates.put(error)
        self._updates.put(None)


class Engine:
    """A model that answers one prompt after the other, in a thread of its own. Close it, or use it in `with`.

    settings: those of an answer where the caller gives none (settings.py). mesh: the one the model lies on.
    most_waiting: beyond so many that wait, `submit` raises Busy.
    """

    def __init__(
        self, model, tokenizer: Tokenizer, settings: dict[str, Any], *, mesh=None, seed: int = 0, most_waiting: int = 16
    ):  # fmt: skip
        check_settings(model.config, settings)
        self.tokenizer, self.settings, self.config, self.seed = tokenizer, settings, model.config, seed
        self._mesh, self._most_waiting, self._count = mesh, most_waiting, 0
        with under(mesh):
            self._model = prepare(model)
        self._changed = threading.Condition()
        self._queue: collections.deque[Answer] = collections.deque()  # the first one is being made
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def submit(
        self, ids: Sequence[int], settings: dict[str, Any] | None = None, *, every: str = "step", fill: bool = False,
        key: jax.Array | None = None,
    ) -> Answer:  # fmt: skip
        """Puts a prompt of token ids into the queue. every: "step" or "block", as in `generate.stream`.

        fill: fills the masks of `ids`, and appends nothing. key: of the noise; by default another for every prompt.
        Raises InputError for settings that can't be used and prompts that don't fit, Busy where too many wait.
        """
        given = self.settings if settings is None else settings
        if fill:
            given = given | {"gen_length": 0}
        else:
            check_settings(self.config, given)
        if key is None:
            key = jax.random.fold_in(stream(self.seed, "sample"), self._count)
        with under(self._mesh):
            updates = generate.stream(self._model, np.asarray([ids]), every=every, key=key, **given)
        answer = Answer(updates, 0 if fill else len(ids), self._before)
        with self._changed:
            if len(self._queue) > self._most_waiting:
                raise Busy(f"{self._most_waiting} answers are waiting; try again when some are done")
            self._count += 1
            self._queue.append(answer)
            self._changed.notify()
        return answer

    def is_busy(self) -> bool:
        """Whether an answer is being made."""
        return bool(self._queue)

    def close(self) -> None:
        """Cancels what is being made and what waits, and returns when the model is idle."""
        with self._changed:
            self._is_closed = True
            for answer in self._queue:
                answer.cancel()
            self._changed.notify()
        self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _work(self) -> None:
        with under(self._mesh):
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._is_closed)
                    if not self._queue:
                        return
                    answer = self._queue[0]
                answer._run()
                with self._changed:
                    self._queue.remove(answer)

    def _before(self, answer: Answer) -> int:
        with self._changed:
            return self._queue.index(answer) if answer in self._queue else 0


def open_engine(checkpoint: str | Path, given: dict[str, Any], gen_length: int | None = None, **more) -> Engine:
    """The model in a directory, ready to answer. given: options of its answers; more: of the Engine.

    An answer is one row: one copy of the model, on as few devices as hold it. Raises InputError for a directory that
    holds no such model.
    """
    directory = Path(checkpoint)
    if load_config(directory).get("objective", {}).get("name") == "autoregressive":
        raise InputError(f"{directory}: holds an autoregressive control; the diffusion sampler can't use it")
    tokenizer, c = load_tokenizer(hf.tokenizer_directory(directory)), hf.load_config(directory)
    settings = default_settings(c, gen_length) | given
    check_settings(c, settings)  # before the weights are read
    mesh = inference_mesh(c)
    split = 1 if mesh is None else mesh.shape["tensor"]
    mesh = None if split == 1 else make_mesh(dict(data=1, fsdp=1, tensor=split, context=1), jax.devices()[:split])
    return Engine(hf.load(directory, mesh=mesh), tokenizer, settings, mesh=mesh, **more)
