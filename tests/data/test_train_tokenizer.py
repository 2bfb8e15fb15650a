"""A tokenizer is trained within bounds, the same on every machine, or refused in one line."""

import random

import pytest

from llada_jax.data import train_tokenizer as module
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.fields import InputError

TEXTS = ["春风得意马蹄疾，一日看尽长安花。", "The quick  brown fox\n\n    jumps over\tthe lazy dog. "]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(tmp_path, model_type):
    files = [tmp_path / name / "t.model" for name in ("a", "b")]
    fingerprints = {train_tokenizer(TEXTS * 20, file, 330, model_type).fingerprint for file in files}
    assert len(fingerprints) == 1
    assert [path.name for path in files[0].parent.iterdir()] == ["t.model"]  # nothing else is left


def test_large_texts_are_sampled_within_bounds(monkeypatch):
    monkeypatch.setattr(module, "_TRAINING_BYTES", 1000)
    random.seed(1)  # the sample must not depend on it
    lines = module._sample_lines(f"line {i}" for i in range(5000))
    assert len(lines) < 200 and len(set(lines)) == len(lines)
    assert sum(int(line.split()[1]) > 2500 for line in lines) > len(lines) / 4
    assert lines == module._sample_lines(f"line {i}" for i in range(5000))


def test_mistakes_are_named_and_leave_nothing(tmp_path):
    for arguments, words in [((100,), "vocab_size"), ((400, "wordpiece"), "model_type")]:
        with pytest.raises(InputError, match=words):
            train_tokenizer(TEXTS, tmp_path / "t.model", *arguments)
    with pytest.raises(InputError, match="no text"):
        train_tokenizer([" \n"], tmp_path / "t.model", 400)
    assert not (tmp_path / "t.model").exists()
