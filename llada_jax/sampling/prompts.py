"""From text to text: prompts with masks in them, completions, replies to messages."""

import re

import jax
import numpy as np

from llada_jax.data import chat
from llada_jax.fields import InputError
from llada_jax.parallel.mesh import current_mesh
from llada_jax.sampling.generate import generate

_MASK = re.compile(r"\[MASK(?:\*(\d+))?\]")


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """BOS and the ids of a plain prompt; `[MASK]` stands for one masked token, `[MASK*5]` for five."""
    ids, last = [tokenizer.bos_id], 0
    for match in _MASK.finditer(prompt):
        count = match.group(1) or "1"
        if len(count) > 6:
            raise InputError(f"{match.group()}: more masks than any model's context; write a smaller number")
        ids += tokenizer.encode(prompt[last : match.start()]) + [tokenizer.mask_id] * int(count)
        last = match.end()
    return ids + tokenizer.encode(prompt[last:])


def check_turns(messages: object, where: str) -> list[dict[str, str]]:
    """Messages that a reply can follow, role and content of each. Raises InputError that begins with `where`."""
    if not isinstance(messages, list):
        raise InputError(f'{where}: "messages" must be a list of {{"role", "content"}}')
    return chat.check_messages([*messages, {"role": "assistant", "content": ""}], where)[:-1]


def reply_text(tokenizer, ids) -> str:
    """The text of generated ids up to the first end of turn or of text."""
    ids = [int(i) for i in ids]
    for stop in (tokenizer.eot_id, tokenizer.eos_id):
        if stop in ids:
            ids = ids[: ids.index(stop)]
    return tokenizer.decode(ids)


def answers(model, tokenizer, requests, *, gen_length: int = 128, **options) -> list[str]:
    """The texts that a model answers with, made as one batch.

    requests: prompts of any lengths, which are continued, or lists of messages, which are replied to. options: those of
    `generate`. Raises InputError for requests that are neither, and as `generate` does.
    """
    rows = [
        encode_prompt(tokenizer, request) if isinstance(request, str)
        else tokenizer.encode_chat(check_turns(request, f"request {i}"))
        for i, request in enumerate(requests, start=1)
    ]  # fmt: skip
    tokens = generate(model, rows, gen_length=gen_length, **options)
    return [reply_text(tokenizer, row) for row in np.asarray(tokens)[:, -gen_length:]]


def complete(model, tokenizer, prompt: str, *, gen_length: int = 32, key: jax.Array | None = None) -> str:
    """A short greedy completion, with its prompt, for the logs of a run."""
    ids = encode_prompt(tokenizer, prompt)
    return tokenizer.decode(_continue(model, ids, gen_length, key)[1:])


def reply(model, tokenizer, message: str, *, gen_length: int = 32, key: jax.Array | None = None) -> str:
    """A short greedy reply to a message under the chat template, for the logs of a run."""
    ids = tokenizer.encode_chat([{"role": "user", "content": message}])
    return reply_text(tokenizer, _continue(model, ids, gen_length, key)[len(ids) :])


def _continue(model, ids: list[int], gen_length: int, key: jax.Array | None) -> np.ndarray:
    """int [len(ids) + at most gen_length]."""
    gen_length = min(gen_length, model.config.max_sequence_length - len(ids))
    mesh = current_mesh()
    gen_length -= (len(ids) + gen_length) % (1 if mesh is None else mesh.shape["context"])  # it splits the columns
    if gen_length < 1:
        raise InputError(f"config.train.sample_prompt: its {len(ids)} tokens leave no room in the model's context")
    out = generate(model, np.asarray([ids]), gen_length=gen_length, steps=gen_length, block_length=gen_length, key=key)
    return np.asarray(out)[0]
