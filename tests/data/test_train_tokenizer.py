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


SIZES = [269, 275, 300, 333, 2**20]


@pytest.mark.parametrize("model_type", module.MODEL_TYPES)
@pytest.mark.parametrize("text", ["user", "a", "\x01", "a b\tc", "春风得意马蹄疾，一日看尽长安花。", "▁ ▁"])
def test_any_size_in_range_and_any_text_trains_or_is_refused_in_one_line(tmp_path, model_type, text):
    """Texts that SentencePiece can learn nothing from included, such as those of one role."""
    for vocab_size in SIZES:
        try:
            tokenizer = train_tokenizer([text] * 9, tmp_path / str(vocab_size) / "t.model", vocab_size, model_type)
            assert tokenizer.decode(tokenizer.encode(f"{text} 春 x")) == f"{text} 春 x"
        except InputError as error:
            assert "t.model: SentencePiece learns nothing" in str(error) and "\n" not in str(error)
            assert not (tmp_path / str(vocab_size)).exists()


@pytest.mark.parametrize("vocab_size", [-1, 0, 100, 267, 268, 2**20 + 1, 2**31, 2**63])
def test_sizes_out_of_range_are_refused(tmp_path, vocab_size):
    with pytest.raises(InputError, match=f"vocab_size is {vocab_size}, must be from 269 to 1048576"):
        train_tokenizer(TEXTS, tmp_path / "t.model", vocab_size)


@pytest.mark.parametrize(
    "place", ["d/t.model", "file/t.model", "file/x/t.model", "x" * 300 + ".model", "x" * 250 + ".model"]
)
def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path, place):
    (tmp_path / "d" / "t.model").mkdir(parents=True)
    (tmp_path / "file").touch()
    kept = sorted(tmp_path.rglob("*"))

    def texts():
        raise AssertionError
        yield

    with pytest.raises(InputError, match="model: cannot be written .*; choose another place"):
        train_tokenizer(texts(), tmp_path / place, 400)
    assert sorted(tmp_path.rglob("*")) == kept


def test_mistakes_are_named_and_leave_nothing(tmp_path):
    for arguments, words in [((400, "wordpiece"), "model_type")]:
        with pytest.raises(InputError, match=words):
            train_tokenizer(TEXTS, tmp_path / "t.model", *arguments)
    with pytest.raises(InputError, match="no text"):
        train_tokenizer([" \n"], tmp_path / "new" / "t.model", 400)
    assert list(tmp_path.iterdir()) == []
