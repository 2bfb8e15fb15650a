"""Objectives whose loss is not a sum over rows, and models of which only a part is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest
from ml_collections import ConfigDict

from llada_jax.config import Lora, run_config
from llada_jax.model import lora
from llada_jax.model.transformer import Transformer
from llada_jax.objectives import OBJECTIVES, diffusion
from llada_jax.objectives.cross_entropy import chunk_size
from llada_jax.objectives.elbo import Objective
from llada_jax.parallel.mesh import global_batch, make_mesh
from llada_jax.training import optimizer, stability
from llada_jax.training.step import TrainState, adapted_state, init_state, make_eval_step, make_train_step, merge, split

CONFIG = ConfigDict(dict(eps=1e-3, stratified=True, balanced=False, attention="padding"))
BETA = 0.3


def corrupt(batch, key, model, config):
    """Rows with the ELBO of their text; 2i is preferred to 2i + 1. A reference model is stood in for by numbers."""
    noisy = diffusion.pretrain(batch, key, model, config)
    weights_BL = jnp.where(noisy.weights > 0, 1 / noisy.ratio[:, None], 0.0)
    return dataclasses.replace(noisy, weights=weights_BL, extras={"reference": batch["reference"]})


def combine(elbos_B, extras):
    """Logistic preference over two rows (DPO): -log sigmoid of the scaled difference of the gains."""
    score = BETA * (elbos_B - extras["reference"]).reshape(-1, 2) @ jnp.array([1.0, -1.0])
    return -jnp.mean(jax.nn.log_sigmoid(score)), {"accuracy": jnp.mean(score > 0)}


PREFERENCE = Objective(corrupt, combine)

# Its state is the gradient of the last step; it changes nothing.
RECORDER = optax.GradientTransformationExtraArgs(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params, **_: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def make_batch(rows=16, length=32):
    rng = np.random.default_rng(3)
    tokens = rng.integers(7, 60, (rows, length)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1::3, 25:] = 0
    return dict(
        tokens=tokens, segment_ids=segments, maskable=segments > 0, answer_length=segments.sum(1, dtype=np.int32),
        reference=rng.normal(-60, 5, rows).astype(np.float32),
    )  # fmt: skip


def plain_loss_and_gradients(config, batch):
    """The same by plain autodiff of the whole thing in float64; only the masks are ours."""
    with jax.enable_x64(False):
        model = Transformer(config, jax.random.key(0))
        key = jax.random.fold_in(jax.random.key(1), 0)
        noisy = corrupt(jax.tree.map(jnp.asarray, batch), key, config, CONFIG)
        inputs, targets, weights = (np.asarray(x) for x in (noisy.inputs, noisy.targets, noisy.weights))
        parameters = plain.parameters(model)

    def loss(parameters):
        visible = plain.of_segments(batch["segment_ids"])
        log_p = plain.log_softmax(plain.forward(parameters, config, inputs, visible, xp=jnp), jnp)
        elbo = (weights.astype(np.float64) * jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]).sum(1)
        gain = BETA * (elbo - batch["reference"].astype(np.float64))
        return -jnp.mean(jax.nn.log_sigmoid(gain[::2] - gain[1::2]))

    return plain.in_float64(jax.jit(jax.value_and_grad(loss)), parameters)


@pytest.fixture(scope="module")
def wanted(request):
    from tiny import TINY

    return plain_loss_and_gradients(TINY, make_batch())


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=["one device", "2x2x2"])
def test_a_loss_that_is_no_sum_over_rows_has_the_gradients_of_plain_autodiff(tiny, wanted, sizes, microbatches):
    mesh = make_mesh(
        dict(zip(("data", "fsdp", "tensor"), sizes, strict=True), context=1), jax.devices()[: np.prod(sizes)]
    )
    with jax.set_mesh(mesh):
        state = jax.jit(init_state, static_argnums=(0, 1))(tiny, RECORDER, jax.random.key(0))
        batch = {name: global_batch(x, mesh) for name, x in make_batch().items()}
        step = make_train_step(RECORDER, PREFERENCE, CONFIG, microbatches=microbatches)
        state, metrics = step(state, batch, jax.random.key(1))
    loss, gradients = wanted
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=2e-5)
    assert 0 < float(metrics["accuracy"]) < 1
    found = plain.parameters(state.opt_state)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(found[name], gradient, atol=2e-5 * np.abs(gradient).max(), err_msg=name)


def test_validation_reports_the_combined_loss(tiny, wanted):
    batch = jax.tree.map(jnp.asarray, make_batch())
    evaluate = make_eval_step(PREFERENCE, CONFIG)
    key = jax.random.fold_in(jax.random.key(1), 0)
    found = evaluate(Transformer(tiny, jax.random.key(0)), batch, key)
    assert float(found["loss"]) == pytest.approx(float(wanted[0]), rel=2e-5)


WIDE = dict(d_model=128, mlp_hidden_size=512, n_layers=4, n_heads=2, n_kv_heads=2, max_sequence_length=256)


def compiled(config, objective, batch, is_trainable=None, adapters=None, microbatches=1):
    """The step as compiled, its FLOPs and the bytes of its temporaries."""
    settings = run_config("tiny").optimizer
    settings.schedule = (("constant", 1e-3, "100%"),)
    update = optimizer.make_optimizer(settings, total_steps=10, tokens_per_step=1)

    def init(key):
        if adapters is not None:
            return adapted_state(lora.frozen_base(Transformer(config, key), adapters.base), adapters, update, key)
        if is_trainable is None:
            return init_state(config, update, key)
        trainable, frozen = split(Transformer(config, key), is_trainable)
        return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, update.init(trainable), stability.fresh_state())

    state = jax.jit(init)(jax.random.key(0))
    step = (
        make_train_step(update, objective, CONFIG, microbatches=microbatches)
        .lower(state, batch, jax.random.key(1))
        .compile()
    )
    return step, state, step.cost_analysis()["flops"], step.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("microbatches, ratio", [(1, 1), (2, 8 / 6)])
def test_two_passes_cost_a_forward_pass_more_and_no_memory(tiny, microbatches, ratio):
    """Nothing of the first pass is kept: the temporaries are those of one pass, not of two stored graphs.

    Of a single microbatch the compiler finds the forward passes of both to be one."""
    config = dataclasses.replace(tiny, **WIDE, remat="none")
    batch = jax.tree.map(jnp.asarray, make_batch(rows=8, length=256))
    _, _, once, memory = compiled(config, OBJECTIVES["pretrain"], batch, microbatches=microbatches)
    _, _, twice, more = compiled(config, PREFERENCE, batch, microbatches=microbatches)
    assert twice / once == pytest.approx(ratio, rel=0.05)
    assert more < 1.1 * memory


def test_frozen_parameters_have_neither_gradients_nor_moments_nor_their_flops(tiny):
    """2 FLOPs a weight and token forward, 2 for the gradient of its input, and 2 only if the weight is trained."""
    config = dataclasses.replace(tiny, **WIDE, remat="none")
    batch = jax.tree.map(jnp.asarray, make_batch(rows=8, length=256))
    is_norm = lambda name: "norm" in name or name == "ln_f"
    _, full, all_flops, _ = compiled(config, OBJECTIVES["pretrain"], batch)
    step, state, flops, _ = compiled(config, OBJECTIVES["pretrain"], batch, is_norm)
    per_layer = 4 * 128 * 128 + 3 * 128 * 512
    weights = 4 * per_layer * 8 * 256  # times tokens; the head has few rows here
    assert (all_flops - flops) / weights == pytest.approx(2, rel=0.06)
    assert len(jax.tree.leaves(state.opt_state)) == 2 * 3 + 2 < len(jax.tree.leaves(full.opt_state))
    before = [np.asarray(x) for x in jax.tree.leaves((state.trainable, state.frozen))]
    after, _ = step(state, batch, jax.random.key(1))
    changed = [
        not np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves((after.trainable, after.frozen)), strict=True)
    ]
    assert changed == [True] * 3 + [False] * 9


@pytest.mark.slow
@pytest.mark.parametrize("base", ["bfloat16", "int8"])
def test_adapters_cost_four_flops_a_frozen_weight_and_six_of_their_own(tiny, base):
    """And what the adapters hold is all that has moments."""
    config = dataclasses.replace(tiny, **WIDE, remat="none")
    batch = jax.tree.map(jnp.asarray, make_batch(rows=8, length=256))
    rank = 4
    _, _, all_flops, _ = compiled(config, OBJECTIVES["pretrain"], batch)
    _, state, flops, _ = compiled(config, OBJECTIVES["pretrain"], batch, adapters=Lora(rank=rank, base=base))
    weights = 4 * (4 * 128 * 128 + 3 * 128 * 512)
    own = 4 * rank * (4 * (128 + 128) + 3 * (128 + 512))
    assert optax.tree.size(state.trainable) == own and optax.tree.size(state.opt_state) == 2 * own + 2
    assert (all_flops - flops + 6 * own * 8 * 256) / (weights * 8 * 256) == pytest.approx(2, rel=0.06)


def test_a_frozen_head_costs_no_gradient(tiny):
    """Its gradient is formed in the forward pass where it is wanted, and not where it is frozen."""
    config = dataclasses.replace(tiny, vocab_size=4096, embedding_size=4096)
    batch = jax.tree.map(jnp.asarray, make_batch(rows=8, length=64))
    flops = [compiled(config, OBJECTIVES["pretrain"], batch, lambda n, f=f: n != f)[2] for f in ("none", "ff_out")]
    rows = chunk_size(8 * 64, 4096)  # of the loop, whose body is counted once
    assert flops[0] - flops[1] == pytest.approx(2 * rows * 4096 * 32, rel=0.25)


def test_merge_undoes_split(tiny):
    model = Transformer(tiny, jax.random.key(0))
    trainable, frozen = split(model, lambda name: name in ("wte", "blocks.q_proj"))
    assert len(jax.tree.leaves(trainable)) == 2 and len(jax.tree.leaves(frozen)) == 10
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(merge(trainable, frozen)), strict=True):
        assert a is b
    assert merge(model, None) is model
