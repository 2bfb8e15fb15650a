"""Eight simulated CPU devices for every test, and a compilation cache that the test processes share."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of a test's time is compiling: optimised code would not earn it back.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)  # fmt: skip

import json

import jax
import numpy as np
import pytest
from tiny import TINY

from llada_jax.config import run_config
from llada_jax.interop.workdir import saved_steps

jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "llada_jax_tests_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that take long and guard little")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes long; --slow runs it"))


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs before they take all memory maps of a process: Linux allows 65,530, then it aborts."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture
def tiny():
    """A model config small enough to enumerate."""
    return TINY


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def tiny_run(make_tiny_run):
    """A run config that trains in seconds on couplets."""
    return make_tiny_run()


@pytest.fixture(scope="session")
def make_tiny_run():
    """Makes such configs, for fixtures that outlive a test."""
    return _tiny_run


def _tiny_run():
    config = run_config("tiny")
    config.model.update(dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=48))
    config.model.vocab_size = config.model.embedding_size = 0
    config.model.max_sequence_length = 64
    config.data.update(dict(documents="file", packing="document", row_length=24, validation_fraction=0.1))
    config.data.tokenizer_type = "char"
    config.optimizer.schedule = (("linear", 1e-3, "2 steps"), ("constant", 1e-3, "100%"))
    config.train.update(dict(steps=4, batch_size=8, log_every=2, eval_every=4, eval_rows=8))
    config.checkpoint.update(dict(every_steps=2, keep=2))
    return config


@pytest.fixture
def steps():
    """The steps of the checkpoints of a workdir."""
    return lambda workdir: sorted(saved_steps(workdir / "checkpoints"))


@pytest.fixture
def events():
    """The events of a workdir, by name."""

    def read(workdir, *names):
        path = workdir / "events.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if not names or line["event"] in names]

    return read
