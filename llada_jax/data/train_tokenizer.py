"""Trains a SentencePiece tokenizer with LLaDA's special tokens on text."""

import io
import os
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from llada_jax.data.tokenizer import BOS, END_HEADER, EOS, EOT, MASK, ROLES, START_HEADER, Tokenizer, load_tokenizer
from llada_jax.fields import InputError
from llada_jax.files import require_place, write_file

_TRAINING_BYTES = 2**28  # a uniform sample of lines of this size is enough for any vocabulary
_LINE_CHARACTERS = 4000
MODEL_TYPES = ("bpe", "unigram", "char")
LARGEST_VOCAB_SIZE = 2**20
_FIXED = 8 + len(ROLES) + 256  # special tokens and the line end; roles; bytes


def train_tokenizer(
    texts: Iterable[str], path: str | os.PathLike, vocab_size: int, model_type: str = "bpe"
) -> Tokenizer:
    """Trains a SentencePiece model of at most `vocab_size` ids and writes it to `path` (`….model`).

    Ids 0–6 are unknown, BOS, EOS, mask, the two headers and EOT; every text can be encoded and
    comes back unchanged (bytes stand for unseen characters). Deterministic. The vocabulary is
    smaller than asked if the text does not hold that many pieces. Raises InputError for other sizes
    and types than there are, for texts of which nothing can be learned and a place that cannot be written.
    """
    path = Path(path)
    if model_type not in MODEL_TYPES:
        raise InputError(f"model_type is {model_type!r}, must be one of {', '.join(MODEL_TYPES)}")
    if path.suffix != ".model":
        raise InputError(f"{path}: the name of a SentencePiece tokenizer must end in .model")
    if not _FIXED + 1 < vocab_size <= LARGEST_VOCAB_SIZE:
        raise InputError(
            f"vocab_size is {vocab_size}, must be from {_FIXED + 2} to {LARGEST_VOCAB_SIZE}: special tokens and bytes "
            f"take {_FIXED}"
        )
    require_place(path)
    lines = _sample_lines(texts)
    if not lines:
        raise InputError(f"{path}: no text to train a tokenizer on; give files that hold text")
    model = io.BytesIO()
    try:
        _train(_cut_at_rare_characters(lines, vocab_size - _FIXED, model_type), model, vocab_size, model_type)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: SentencePiece learns nothing from these texts ({reason}); give more, or another vocab_size"
        ) from error
    write_file(path, model.getvalue())
    return load_tokenizer(path)


def _train(lines: list[str], model: io.BytesIO, vocab_size: int, model_type: str) -> None:
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,  # the padding is EOS
        bos_piece=BOS,
        eos_piece=EOS,
        control_symbols=[MASK, START_HEADER, END_HEADER, EOT],
        # Lines are cut at "\n", so it would never be learned; the roles stand in every chat row.
        user_defined_symbols=["\n", *ROLES],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=4 * _LINE_CHARACTERS,  # bytes
        num_threads=16,  # fixed: sums of the unigram model depend on it
        minloglevel=3,
    )


def _sample_lines(texts: Iterable[str]) -> list[str]:
    """Non-blank lines of the texts, a uniform sample (reservoir, fixed seed) if they are many."""
    lines: list[str] = []
    kept_bytes, seen, draw = 0, 0, random.Random(0)
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LINE_CHARACTERS):
                part = line[start : start + _LINE_CHARACTERS].replace("\0", "")  # refused in training
                if not part.strip():
                    continue
                seen += 1
                if kept_bytes < _TRAINING_BYTES:
                    lines.append(part)
                    kept_bytes += len(part.encode())
                elif (slot := draw.randrange(seen)) < len(lines):
                    lines[slot] = part
    return lines


def _cut_at_rare_characters(lines: list[str], room: int, model_type: str) -> list[str]:
    """The lines with the characters that find no room in the vocabulary replaced by line ends.

    SentencePiece refuses a `character_coverage` below 0.98 and a vocabulary smaller than its
    characters; what is cut out here is encoded as bytes.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    limit = room - 1 if model_type == "char" else room // 2  # leave half to longer pieces
    if len(counts) <= limit:
        return lines
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    rare = str.maketrans(dict.fromkeys(ranked[limit:], "\n"))
    return [line.translate(rare) for line in lines]
