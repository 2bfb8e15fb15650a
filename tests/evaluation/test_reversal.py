"""The reversal evaluation against plain loops, and the quickstart end to end."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY

from llada_jax.data import sources
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.evaluation import reversal
from llada_jax.model.transformer import Transformer
from llada_jax.tools.kill_test import QUICK

ROOT = Path(__file__).resolve().parents[2]
COUPLETS = [(a, b) for a, b, _ in sources.couplets()[:12]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [sources.couplet_text(*couplet) for couplet in COUPLETS]
    return train_tokenizer(texts, tmp_path_factory.mktemp("t") / "t.model", 2000, "char")


def test_hidden_lines_are_masked_in_place_and_nothing_else(tokenizer):
    first, second = COUPLETS[0]
    for direction, hidden, given in (("forward", second, first), ("backward", first, second)):
        row, where = reversal._masked_row(tokenizer, COUPLETS[0], direction)
        assert row.count(tokenizer.mask_id) == len(hidden) == where.stop - where.start
        assert set(row[where]) == {tokenizer.mask_id}
        filled = [*row[: where.start], *tokenizer.encode(hidden), *row[where.stop :]]
        assert tokenizer.decode(filled) == sources.couplet_text(first, second)
        assert given in tokenizer.decode(row)


@pytest.mark.parametrize(
    "text, right",
    [("床前明月光。", True), ("，床前明月光", True), ("床前明月光光", False), ("床前明月", False), ("", False)],
)
def test_a_continuation_counts_only_if_the_whole_line_comes_first(text, right):
    assert reversal._begins_with(text, "床前明月光") == right


def test_accuracy_wants_every_character():
    lines = [COUPLETS[0][1], COUPLETS[1][1][:-1]]
    assert reversal.accuracy(lines, COUPLETS[:2], "forward") == 0.5
    assert reversal.accuracy(lines, COUPLETS[:2], "backward") == 0.0


@pytest.fixture(scope="module")
def causal(tokenizer):
    size = tokenizer.vocab_size
    c = dataclasses.replace(TINY, vocab_size=size, embedding_size=size, causal=True, mask_token_id=tokenizer.mask_id)
    return Transformer(c, jax.random.key(0))


def test_ties_and_nan_never_count_as_right():
    nan, inf = float("nan"), float("inf")
    right = [[-1, -2, -3], [-1, -2, -inf]]
    wrong = [
        [-2, -1, -3],
        [-1, -1, -3],
        [nan, -2, -3],
        [-1, nan, -3],
        [nan, nan, nan],
        [inf, -1, -2],
        [-inf, -inf, -inf],
    ]
    assert reversal._first_is_best(np.asarray(right + wrong, float)).tolist() == [True] * 2 + [False] * 7


def test_ranking_is_by_the_likelihood_of_the_whole_text(causal, tokenizer):
    def log_p(first, second):
        row = np.asarray([[tokenizer.bos_id, *tokenizer.encode(sources.couplet_text(first, second)), tokenizer.eos_id]])
        log_p = jax.nn.log_softmax(causal(jnp.asarray(row))[0, :-1])
        return float(np.take_along_axis(np.asarray(log_p), row[0, 1:, None], 1).sum())

    couplets = COUPLETS[:4:2]  # of one length, so of one program
    for direction in ("forward", "backward"):
        right = []
        for i, (first, second) in enumerate(couplets):
            lines = [log_p(first, c[1]) if direction == "forward" else log_p(c[0], second) for c in couplets]
            right.append(int(np.argmax(lines)) == i)
        assert reversal.rank(causal, tokenizer, couplets, direction, candidates=12) == np.mean(right)


@pytest.mark.slow
def test_the_quickstart_makes_its_report(tmp_path):
    command = [
        sys.executable, "tools/quickstart.py", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'w'}",
        "--config.train.steps=3", "--config.train.batch_size=8", "--config.quickstart.couplets=8",
        "--config.quickstart.sft_steps=2", "--config.quickstart.sft_batch_size=8", "--config.model.d_model=32",
        "--config.model.n_layers=1", "--config.model.mlp_hidden_size=32",
    ]  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": QUICK}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "w/report.json").read_text())
    assert set(report["reversal"]["llada"]) == set(report["reversal"]["arm"]) == {"forward", "backward"}
    assert report["questions"]["arm"]["unseen"]["count"] == 2 and report["seconds"] > 0
    assert str(tmp_path / "w/report.html") in done.stdout and (tmp_path / "w/report.html").stat().st_size > 10_000
    assert "Reversal, 8 couplets" in done.stdout and "▒▒▒▒▒" in done.stdout
