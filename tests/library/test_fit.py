"""Training from a program, as the README of training/ shows it."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.fields import InputError
from llada_jax.library.fit import fit
from llada_jax.objectives import OBJECTIVES
from llada_jax.objectives.elbo import Objective

README = Path(__file__).parents[2] / "llada_jax" / "training" / "README.md"
TEXTS = ["床前明月光，疑是地上霜。", "举头望明月，低头思故乡。"] * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300, "char")


@pytest.fixture(scope="module")
def config(make_tiny_run):
    config = make_tiny_run()
    config.data.packing, config.train.steps = "concatenate", 3
    return config


def losses(config, data, tokenizer, **more):
    seen = []
    model = fit(config, data, tokenizer, callbacks=[lambda step, model, s: seen.append((step, s["loss"]))], **more)
    assert [step for step, _ in seen] == list(range(1, len(seen) + 1))
    return model, [loss for _, loss in seen]


def test_the_twenty_lines_of_the_readme_do_what_they_say(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"## From a notebook\n+```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 22
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    *steps, answers = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in steps] == [str(step) for step in range(1, 21)]
    elbos = [float(line.split()[1]) for line in steps]
    assert np.mean(elbos[-5:]) < np.mean(elbos[:5])
    assert len(eval(answers)) == 2 and (tmp_path / "exported" / "config.json").exists()


@pytest.mark.slow
def test_batches_texts_and_a_loss_of_ones_own_give_what_they_should(config, tokenizer):
    model, wanted = losses(config, TEXTS, tokenizer)
    assert len(wanted) == 3
    corrupt = OBJECTIVES["pretrain"].corrupt
    halved = Objective(corrupt, lambda elbos, extras: (-elbos.sum() / 2, {}))
    _, got = losses(config, TEXTS, tokenizer, objective=halved)
    assert got[0] == pytest.approx(wanted[0] / 2, rel=1e-5)  # of the same masks; Adam's steps are of one size
    rows = np.tile(np.asarray(tokenizer.encode("床前明月光")[:5], np.int32), (8, 1))
    batches = [{"tokens": rows, "maskable": rows > 0, "segment_ids": np.ones_like(rows)}] * 2
    before = jax.tree.map(np.asarray, jax.tree.leaves(model))
    longer, of_batches = losses(config, batches, tokenizer, model=model)
    assert len(of_batches) == 2  # the data ended
    for kept, old, new in zip(jax.tree.leaves(model), before, jax.tree.leaves(longer), strict=True):
        np.testing.assert_array_equal(kept, old)  # what was given is left as it is
        assert (np.asarray(new) != old).any()


@pytest.mark.parametrize(
    "change, data, message",
    [
        ({}, [], "the data is empty"),
        ({}, ["床"], "the data gives 1 rows; config.train.batch_size is 8"),
        ({}, [3], "item 1 of the data: is a int, not text"),
        ({}, [{"tokens": np.zeros((3, 4), np.int32)}], "a batch has {'tokens': 3} rows; config.train.batch_size is 8"),
        ({"init_from": "x"}, TEXTS, "give fit a model="),
        ({"batch_size": 7}, TEXTS, "does not split into"),
    ],
)
def test_mistakes_are_one_line(config, tokenizer, change, data, message):
    changed = config.copy_and_resolve_references()
    changed.train.update(change)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        fit(changed, data, tokenizer)
    assert "\n" not in str(caught.value)
