"""A run of six steps, which tests copy, continue and damage."""

import json
import shutil

import pytest

from llada_jax.data import sources
from llada_jax.training import run as train


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, make_tiny_run):
    """Makes configs of a run that saves every second step."""
    file = tmp_path_factory.mktemp("files") / "poems.jsonl"
    texts = [
        json.dumps({"text": sources.couplet_text(a, b)}, ensure_ascii=False) for a, b, _ in sources.couplets()[:60]
    ]
    file.write_text("\n".join(texts), encoding="utf-8")

    def make(**train_fields):
        run = make_tiny_run()
        run.data.files = str(file)
        run.optimizer.schedule = (("constant", 1e-3, "100%"),)
        run.train.update(dict(log_every=1, eval_every=0) | train_fields)
        run.checkpoint.update(dict(every_steps=2, keep=5))
        return run

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory, make_run):
    """A run of six steps with the checkpoints 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("trained") / "w"
    train.train(make_run(steps=6), workdir)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "w")
