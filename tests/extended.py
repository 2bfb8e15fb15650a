"""Uses each extension that a README shows; test_extend.py runs this in a copy of the package that has them."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import TINY

import llada_jax
from llada_jax.config import run_config
from llada_jax.data.dataset import open_dataset
from llada_jax.data.pipeline import batches, ordered
from llada_jax.data.prepare import prepare_dataset
from llada_jax.fields import InputError
from llada_jax.model.transformer import Transformer
from llada_jax.objectives import OBJECTIVES
from llada_jax.sampling.rules import Candidates, commit

GOLDEN = Path(__file__).parent / "golden"


def objective() -> None:
    config = run_config("tiny")
    config.model.update(d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, mlp_hidden_size=48, vocab_size=0)
    config.model.embedding_size = 0
    config.data.row_length, config.objective.name = 16, "mean_masked"
    config.train.update(steps=1, batch_size=4)
    seen = []
    tokenizer = llada_jax.load_tokenizer(GOLDEN / "tokenizer")
    llada_jax.fit(config, ["one two three four"] * 20, tokenizer, callbacks=[lambda *given: seen.append(given)])
    ((_, model, scalars),) = seen
    untrained = np.log(model.config.vocab_size) + 0.5  # a mean of cross-entropies, of logits with variance 1
    assert abs(scalars["loss"] - untrained) < 0.5

    ids = jnp.ones((4, 16), jnp.int32)
    batch = {"tokens": ids, "maskable": ids > 0, "segment_ids": ids}
    noisy = OBJECTIVES["mean_masked"].corrupt(batch, jax.random.key(0), model.config, config.objective)
    masked = np.asarray(noisy.inputs) == model.config.mask_token_id
    assert 0 < masked.sum() < masked.size and len(set(np.asarray(noisy.ratio))) == 4
    np.testing.assert_allclose(noisy.weights, masked / masked.sum(), rtol=1e-6)


def rule() -> None:
    p = jnp.asarray([[0.5, 0.9, 1.0, 0.8]])
    for limit, wanted in [(0.7, [0, 1, 0, 1]), (0.73, [0, 1, 0, 0]), (0.3, [1, 1, 0, 1]), (0.95, [0, 1, 0, 0])]:
        found = commit("all_right", Candidates(p, p, p < 1.0, jnp.ones(1, jnp.int32), jnp.float32(limit)))
        assert found.tolist() == [list(map(bool, wanted))], limit
    model: Any = Transformer(TINY, jax.random.key(0))
    for limit, passes in [(0.0, 1), (1.0, 8)]:
        _, stats = llada_jax.generate(model, [[5, 6, 7]], gen_length=8, all_right=limit, return_stats=True)
        assert stats.full_passes == passes


def family(place: Path) -> None:
    model = Transformer(dataclasses.replace(TINY, family="other"), jax.random.key(0))
    llada_jax.save_hf(model, place)
    config = json.loads((place / "config.json").read_text())
    assert (config["model_type"], config["mask_id"], config["qk_norm"]) == ("other", TINY.mask_token_id, False)
    assert b"backbone.layers.1.self_attn.q_proj.weight" in (place / "model.safetensors").read_bytes()
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(llada_jax.load(place)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (place / "config.json").write_text(json.dumps(config | {"qk_norm": True}))
    try:
        llada_jax.load(place)
    except InputError as error:
        assert "qk_norm" in str(error)
    else:
        raise AssertionError("a network that is not ours was loaded")


def kind(place: Path) -> None:
    lines = [{"prompt": f"q {i}", "chosen": "yes " * i, "rejected": "no"} for i in range(6)]
    place.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare_dataset(
        place, kind="preference", files=str(place.with_suffix(".jsonl")), row_length=64, workers=1, progress=False,
        tokenizer=llada_jax.load_tokenizer(GOLDEN / "tokenizer"),
    )  # fmt: skip
    order = ordered([open_dataset(place)])
    for batch in batches(order, batch_size=3, kind="preference", start_step=0, num_steps=2, seed=0, eos_id=2):
        assert batch["chosen"].shape == batch["rejected"].shape == batch["maskable"].shape == (3, 64)
        same = batch["chosen"] == batch["rejected"]
        assert same[~batch["maskable"]].all() and not same.all()  # the prompt


if __name__ == "__main__":
    assert Path(llada_jax.__file__).parents[1] == Path.cwd(), llada_jax.__file__
    objective()
    rule()
    family(Path(sys.argv[1], "family"))
    kind(Path(sys.argv[1], "kind"))
