"""A tiny model with a tokenizer, an engine that answers with it, and the workdir that it comes from."""

import dataclasses
import json

import jax
import pytest
from tiny import TINY

from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.interop import hf
from llada_jax.model.transformer import Transformer
from llada_jax.serving.engine import Engine


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    texts = ["the quick brown fox 床前明月光\n"] * 9
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300, "char")


@pytest.fixture(scope="session")
def model(tokenizer):
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("mask", "bos", "eos", "pad", "eot")}
    c = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, embedding_size=320, max_sequence_length=1024, **ids)
    return Transformer(c, jax.random.key(0))


@pytest.fixture(scope="session")
def engine(model, tokenizer):
    settings = dict(gen_length=8, block_length=4, temperature=0.5)
    with Engine(model, tokenizer, settings, most_waiting=2) as engine:
        yield engine


@pytest.fixture(scope="session")
def checkpoint(model, tokenizer, tmp_path_factory):
    """A workdir as fine-tuning leaves it."""
    place = tmp_path_factory.mktemp("runs") / "chat"
    hf.save_workdir(model, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"data": {"kind": "chat"}}))
    tokenizer.save(place / "tokenizer")
    return place
