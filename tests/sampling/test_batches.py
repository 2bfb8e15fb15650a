"""Many requests from a file: answers that do not depend on batches, written at once, continued after a kill."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference import REFERENCE

from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.sampling import batches
from llada_jax.streams import stream

ROOT = Path(__file__).resolve().parents[2]
VALUES = [
    "a b",
    {"prompt": "the"},
    {"text": "one [MASK*3] two [MASK] three"},
    {"messages": [{"role": "user", "content": "hi"}]},
    "x [MASK*2] y",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    place = shutil.copytree(REFERENCE / "ckpt_a_mha", tmp_path_factory.mktemp("model") / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(ROOT / "tests" / "golden" / "tokenizer" / name, place)
    return place


@pytest.fixture(scope="module")
def tokenizer(source):
    return load_tokenizer(source)


@pytest.fixture(scope="module")
def model(source):
    return hf.load(source)


def answers(model, tokenizer, values, batch_size, **options):
    requests = [batches.make_request(tokenizer, i, value, f"line {i}", False, None) for i, value in enumerate(values)]
    found = {}
    options |= {"key": stream(0, "sample")}
    batches.answer_all(
        model, tokenizer, requests, options, gen_length=8, batch_size=batch_size,
        on_answer=lambda answer: found.__setitem__(answer.request.number, answer),
    )  # fmt: skip
    assert sorted(found) == list(range(len(values)))
    return [found[i] for i in range(len(values))]


@pytest.mark.parametrize("options", [dict(temperature=0.8, cache="dual", block_length=4)])
def test_an_answer_does_not_depend_on_the_batch(model, tokenizer, options):
    together, alone = (answers(model, tokenizer, VALUES, size, **options) for size in (4, 2))
    for a, b in zip(together, alone, strict=True):
        row_a, row_b = (np.asarray(x.stats.tokens)[x.row, x.columns] for x in (a, b))
        np.testing.assert_array_equal(row_a, row_b)
        assert a.text == b.text


def test_an_infilling_gives_the_whole_text_and_a_completion_the_prompt_with_it(model, tokenizer):
    options = dict(temperature=0.8, cache="dual", block_length=4)
    plain, _, infilled, reply, _ = answers(model, tokenizer, VALUES, 4, **options)
    written = lambda answer: int((np.asarray(answer.stats.step)[answer.row] >= 0).sum())
    assert plain.text.startswith("a b") and written(plain) == 8
    assert infilled.text.startswith("one ") and written(infilled) == 4 and "MASK" not in infilled.text
    assert not reply.text.startswith("hi")


@pytest.mark.parametrize(
    "value, message",
    [
        (3, "line 0: needs a text"),
        ({"prompt": "a", "text": "b"}, 'needs a text, or one of "prompt"'),
        ({"prompt": ""}, '"prompt" must be a text that is not empty'),
        ({"text": "nothing to fill"}, r"the text has no \[MASK\] to fill"),
        ({"messages": "hi"}, '"messages" must be a list'),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "message 1 has role 'assistant'"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "message 3"),
    ],
)
def test_a_request_that_is_none_is_named(tokenizer, value, message):
    with pytest.raises(InputError, match=message):
        batches.make_request(tokenizer, 0, value, "line 0", False, None)


@pytest.mark.slow
def test_the_command_continues_where_it_was_stopped(source, tmp_path):
    lines = [json.dumps(value) for value in VALUES]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "llada_jax.sample", f"--checkpoint={source}", f"--input={tmp_path / 'in.jsonl'}",
               "--gen_length=4", "--batch_size=2"]  # fmt: skip
    done = subprocess.run([*command, f"--output={tmp_path / 'whole'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = (tmp_path / "whole").read_text().splitlines()
    found = {json.loads(line)["index"]: json.loads(line) for line in whole}
    assert sorted(found) == list(range(len(VALUES))) and found[0]["request"] == VALUES[0]
    assert all(line["full_passes"] > 0 for line in found.values())
    (tmp_path / "part").write_text("\n".join(whole[:3]) + "\n" + whole[3][:20])  # killed while it wrote
    again = subprocess.run([*command, f"--output={tmp_path / 'part'}"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    continued = [json.loads(line) for line in (tmp_path / "part").read_text().splitlines()]
    assert {line["index"]: line["answer"] for line in continued} == {i: x["answer"] for i, x in found.items()}
    assert len(continued) == len(VALUES)
    (tmp_path / "other").write_text("not an answer\n")
    refused = subprocess.run([*command, f"--output={tmp_path / 'other'}"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "holds other lines than answers" in refused.stderr
