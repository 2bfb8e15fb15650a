"""Dialogues: each reply is a row after all that was said before it; what is malformed is named by file and line."""

import json
from pathlib import Path

import pytest

from llada_jax.data import chat
from llada_jax.data.kind import Plan
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.fields import InputError

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "golden" / "tokenizer")
USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def plan(row_length=64, overlong="error"):
    return Plan("chat", row_length, "document", "file", overlong, 0.0, 100)


def encoded(messages, **options):
    return chat.encode(messages, "x.jsonl:1", TOKENIZER, plan(**options))


def test_dialogues_come_with_their_place(tmp_path):
    messages = [{"role": "system", "content": "s", "extra": 1}, USER, REPLY, USER]
    lines = [json.dumps({"messages": messages}), "", json.dumps({"messages": [USER, REPLY]})]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    assert list(chat.read(str(path), plan())) == [(f"{path}:1", messages), (f"{path}:3", [USER, REPLY])]
    assert chat.check_messages(messages, "x")[0] == {"role": "system", "content": "s"}


def test_dialogues_of_another_file_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"x.txt: is not .jsonl; .* one {\"messages\": "):
        list(chat.read(str(tmp_path / "x.txt"), plan()))


@pytest.mark.parametrize(
    "messages, words",
    [
        ([USER], "'assistant'"),
        ([REPLY], "message 1 has role 'assistant'"),
        ([{"role": "system", "content": "s"}, REPLY], "message 2 has role 'assistant'"),
        ([USER, USER, REPLY], "message 2 has role 'user'"),
        ([USER, {"role": "bot", "content": "a"}], "message 2 has role 'bot'"),
        ([USER, {"role": "assistant"}], r"message 2 \(assistant\) has no text"),
        ([USER, {"role": "assistant", "content": ["a"]}], "message 2"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "character 0 is none of Unicode"),
        ([USER, "hello"], "message 2 has role None"),
        ([], "messages"),
        (None, "messages"),
        ("text", "messages"),
    ],
)
def test_malformed_dialogues_name_line_and_role(messages, words):
    with pytest.raises(InputError, match=f"x.jsonl:1: .*{words}"):
        encoded(messages)


@pytest.mark.parametrize("turns", [1, 3])
def test_a_dialogue_gives_one_record_for_each_reply(turns):
    messages = [{"role": "system", "content": "be brief"}]
    for i in range(turns):
        messages += [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f" a {i} "}]
    found = encoded([*messages, {"role": "user", "content": "more"}], row_length=200)
    assert len(found.examples) == turns and found.dropped == 0
    scored = 0
    for i, record in enumerate(found.examples):
        prompt = TOKENIZER.encode_chat(messages[: 2 + 2 * i])
        whole = [*prompt, *TOKENIZER.encode(f"a {i}"), TOKENIZER.eot_id]
        assert (record["prompt_length"], record["length"]) == (len(prompt), len(whole))
        assert record["tokens"].tolist() == whole + [TOKENIZER.pad_id] * (200 - len(whole))
        assert record["segment_ids"].tolist() == [1] * len(whole) + [0] * (200 - len(whole))
        scored += len(whole) - len(prompt)
    assert (found.scored_tokens, found.bytes) == (scored, 5 * turns)  # of the replies alone


def test_replies_beyond_the_row_are_an_error_or_left_out_of_every_count():
    messages = [USER, REPLY, USER, {"role": "assistant", "content": "yes " * 40}]
    with pytest.raises(InputError, match="x.jsonl:1: the dialogue has .* row_length is 64; .*overlong=drop"):
        encoded(messages)
    short, found = encoded(messages[:2]), encoded(messages, overlong="drop")
    assert (len(found.examples), found.dropped) == (1, 1)
    assert (found.scored_tokens, found.bytes) == (short.scored_tokens, short.bytes)
