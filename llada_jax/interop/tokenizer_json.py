"""A SentencePiece tokenizer as the files that `AutoTokenizer` of transformers reads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from llada_jax.data.tokenizer import BOS, Tokenizer
from llada_jax.fields import InputError
from llada_jax.files import LARGEST_JSON, read_bytes

_PROTO = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
_META = "▁"  # SentencePiece's space
_NEVER = -1e6  # the score of pieces that no text becomes: bytes and control symbols


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, or copies those that the tokenizer was read from.

    A file that is there already stays. The tokenizer of transformers gives the ids of ours, BOS before them, but for
    two texts: the names of special tokens become those tokens, and U+2581 becomes a space.
    """
    if not (directory / "tokenizer.json").exists():
        if tokenizer.path.suffix == ".json":
            tokenizer.save(directory)
        else:
            _from_sentencepiece(tokenizer.path).save(str(directory / "tokenizer.json"))
    if not (directory / "tokenizer_config.json").exists():
        found = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "bos_token": found.id_to_token(tokenizer.bos_id), "eos_token": found.id_to_token(tokenizer.eos_id),
            "pad_token": found.id_to_token(tokenizer.pad_id), "mask_token": found.id_to_token(tokenizer.mask_id),
            "padding_side": "left", "model_input_names": ["input_ids", "attention_mask"],
            "chat_template": tokenizer.chat_template,
        }  # fmt: skip
        text = json.dumps(settings, ensure_ascii=False, indent=2)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """Raises InputError for what tools/train_tokenizer.py does not make: other models, text that is normalised."""
    proto: Any = _PROTO.FromString(read_bytes(path, LARGEST_JSON))
    spec, kinds = proto.normalizer_spec, proto.trainer_spec
    if spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        raise InputError(f"{path}: normalises its text, which is not converted; give a tokenizer.json instead")
    if kinds.model_type == kinds.WORD:
        raise InputError(f"{path}: a vocabulary of words is not converted; give a tokenizer.json instead")
    pieces = [piece.piece for piece in proto.pieces]
    learned = {p.piece: (i, p.score) for i, p in enumerate(proto.pieces) if p.type == p.NORMAL}
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN)
    if kinds.model_type == kinds.UNIGRAM:
        scored = [(piece, learned.get(piece, (0, _NEVER))[1]) for piece in pieces]
        model = models.Unigram(scored, unknown, byte_fallback=True)
    else:  # BPE, and single characters, which nothing merges
        ids = {piece: i for i, piece in enumerate(pieces)}
        model = models.BPE(ids, _merges(learned), unk_token=pieces[unknown], byte_fallback=True)
    made: Any = tokenizers.Tokenizer(model)
    steps: list = [decoders.ByteFallback(), decoders.Fuse()]
    if kinds.model_type == kinds.UNIGRAM:  # would find the names of bytes and of the unknown in a text
        made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("<(?=0x[0-9A-F]{2}>|unk>)"), "isolated")
    if _META in learned:  # else a space is a byte
        made.normalizer = normalizers.Replace(" ", _META)
        steps.insert(0, decoders.Replace(_META, " "))
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([p.piece for p in proto.pieces if p.type == p.CONTROL])
    made.add_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == p.USER_DEFINED])
    bos = (BOS, made.token_to_id(BOS))
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )  # fmt: skip
    return made


def _merges(learned: Mapping[str, tuple[int, float]]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third, the best first: SentencePiece merges by the score of what comes out."""
    ranked = sorted(learned, key=lambda piece: -learned[piece][1])
    splits = ((piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece)))
    return [(left, right) for left, right in splits if left in learned and right in learned]
