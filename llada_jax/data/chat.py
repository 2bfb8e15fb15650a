"""Dialogues: a row for each reply, with what was said before as the prompt. The reply is what may be masked."""

from collections.abc import Iterator, Sequence

import numpy as np

from llada_jax.data import packing, sources
from llada_jax.data.kind import Batch, Encoded, Kind, Place, Plan, Record, stack
from llada_jax.data.tokenizer import ROLES, Messages, Tokenizer
from llada_jax.fields import InputError


def read(path: str, plan: Plan) -> Iterator[tuple[str, object]]:
    """Pairs ("file:line", messages) of a JSONL file of `{"messages": [{"role", "content"}, …]}`."""
    for where, value in sources.read_jsonl(path, '{"messages": […]}'):
        yield where, value.get("messages") if isinstance(value, dict) else None


def encode(messages: object, where: str, tokenizer: Tokenizer, plan: Plan) -> Encoded:
    """A record for each reply; those that are too long are dropped, or an InputError."""
    checked = check_messages(messages, where)
    contents = [message["content"] for message in checked if message["role"] == "assistant"]
    replies = encode_replies(checked, tokenizer)
    longest = max(len(tokens_N) for tokens_N, _ in replies)
    if longest > plan.row_length and plan.overlong == "error":
        raise InputError(
            f"{where}: the dialogue has {longest} tokens, row_length is {plan.row_length}; "
            "raise row_length, or leave such replies out with overlong=drop"
        )
    encoded = Encoded([], scored_tokens=0, bytes=0)
    for content, (tokens_N, prompt_length) in zip(contents, replies, strict=True):
        if len(tokens_N) > plan.row_length:
            encoded.dropped += 1
            continue
        encoded.examples.append(packing.padded_row(tokens_N, plan.row_length, tokenizer.pad_id, prompt_length))
        encoded.scored_tokens += len(tokens_N) - prompt_length
        encoded.bytes += len(content.encode())
    return encoded


def check_messages(messages: object, where: str) -> list[dict[str, str]]:
    """The messages, reduced to role and content.

    A system message may come first; then user and assistant take turns, and the assistant answers at least once.
    Raises InputError, which begins with `where`, for anything else.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f'{where}: needs "messages", a list of {{"role", "content"}}')
    expected = ("system", "user")
    for i, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise InputError(f"{where}: message {i} has role {role!r}, must be one of {', '.join(ROLES)}")
        if role not in expected:
            wanted = " or ".join(expected)
            raise InputError(
                f"{where}: message {i} has role {role!r}, but {wanted} must come there; user and assistant take turns"
            )
        if not isinstance(message.get("content"), str):
            raise InputError(f'{where}: message {i} ({role}) has no text in "content"')
        sources.check_unicode(message["content"], where)
        expected = ("assistant",) if role == "user" else ("user",)
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no message has role 'assistant'; there is nothing to learn from it")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def encode_replies(messages: Messages, tokenizer: Tokenizer) -> list[tuple[np.ndarray, int]]:
    """Pairs (tokens int32 [N], length of the prompt), one for each reply: the dialogue before it, then the reply."""
    replies = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.encode_chat(messages[:i])
            answer = tokenizer.encode_answer(message["content"])
            replies.append((np.asarray(prompt + answer, np.int32), len(prompt)))
    return replies


def collate(records: Sequence[Record], place: Place) -> Batch:
    """A batch in which the replies are maskable, and so is the EOS after them (LLaDA's SFT, arXiv 2502.09992 §2.3).

    That EOS fills dialogues up to the longest of the global batch. Rows of text have no prompt: all but their padding
    is maskable.
    """
    rows = stack(records)
    tokens_BL, segment_ids_BL, prompts_B1 = rows["tokens"], rows["segment_ids"], rows["prompt_length"][:, None]
    columns_L = np.arange(tokens_BL.shape[1])
    filler_BL = (prompts_B1 > 0) & (segment_ids_BL == 0) & (columns_L < place.longest("chat"))
    tokens_BL = np.where(filler_BL, place.eos_id, tokens_BL)
    segment_ids_BL = np.where(filler_BL, 1, segment_ids_BL)
    return packing.token_batch(tokens_BL, segment_ids_BL, (segment_ids_BL > 0) & (columns_L >= prompts_B1))


KIND = Kind(read, encode, packing.row_fields, collate)
