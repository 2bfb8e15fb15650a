"""A tiny model with a tokenizer, an engine that answers with it, and the workdir that it comes from."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from ports import free_port
from tiny import TINY

from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.interop import hf
from llada_jax.model.transformer import Transformer
from llada_jax.serving.engine import Engine

ROOT = Path(__file__).resolve().parents[2]


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


def environment():
    """Programs as quickly compiled as the tests' own, and kept beside them."""
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    return dict(os.environ, PYTHONPATH=str(ROOT), XLA_FLAGS=flags, **cache)


@pytest.fixture(scope="session")
def url(checkpoint, tmp_path_factory):
    """The command, in a process of its own: Gradio leaves sockets and loops open, and here warnings are errors."""
    port = free_port()
    command = [sys.executable, "-m", "llada_jax.demo", f"--checkpoint={checkpoint}", f"--port={port}", "--api"]
    log = tmp_path_factory.mktemp("demo") / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=environment())
    while "the API: " not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = log.read_text().splitlines()
    assert [line.partition(":")[0] for line in said] == ["the page", "the API", "stopped by Ctrl-C"]
