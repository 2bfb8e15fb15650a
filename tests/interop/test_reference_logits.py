"""The official PyTorch code's own numbers: activations, losses, gradients and twenty steps of AdamW.

tests/golden/reference was made by the official modeling code, losses and torch.optim on tiny random models; its json
files tell how. The tolerances are those that came with it.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from reference import REFERENCE, load, published, vectors

import llada_jax
from llada_jax.fields import InputError
from llada_jax.model.transformer import rms_norm, rope
from llada_jax.training import optimizer


@pytest.mark.parametrize("case", ["a_basic", "b_basic"])
def test_hidden_states_enter_every_block_as_in_the_official_code(case):
    arrays, meta = vectors("logits")[0][case], vectors("logits")[1][case]
    model = load(meta["ckpt"])
    x_BLD = model.wte[...][arrays["input_ids"]]
    seen = [x_BLD]
    for layer in range(model.config.n_layers):
        x_BLD = jax.tree.map(lambda x, i=layer: x[i], model.blocks)(x_BLD)[0]
        seen.append(x_BLD)
    seen[-1] = rms_norm(x_BLD, model.ln_f[...], model.config.rms_norm_eps)
    assert np.abs(np.stack(seen) - arrays["hidden_states"]).max() <= 3e-4
    assert np.abs(model.hidden(arrays["input_ids"]) - arrays["hidden_states"][-1]).max() <= 3e-4


def test_the_inside_of_a_block_is_that_of_the_official_code():
    arrays = {name.removeprefix("block0/"): x for name, x in vectors("logits")[0]["a_basic"].items()}
    model = load("ckpt_a_mha")
    block, c = jax.tree.map(lambda x: x[0], model.blocks), model.config
    h_BLD = rms_norm(arrays["hidden_states"][0], block.attn_norm[...], c.rms_norm_eps)
    found = {"attn_norm": h_BLD}
    for name, weight in dict(q=block.q_proj, k=block.k_proj, v=block.v_proj).items():
        x_BNLH = jnp.einsum("BLD,NHD->BNLH", h_BLD, weight[...])
        found[f"{name}_proj"] = x_BNLH.swapaxes(1, 2).reshape(h_BLD.shape)
        if name != "v":
            found[f"{name}_rope"] = rope(x_BNLH, c.rope_theta)
    for name, x in found.items():
        assert np.abs(x - arrays[name]).max() <= 5e-5, name


@pytest.mark.parametrize("checkpoint", ["ckpt_a_mha", "ckpt_b_gqa_tied", "ckpt_d_options", "ckpt_e_train"])
def test_rotary_tables_are_the_official_ones(checkpoint):
    arrays = vectors("logits")[0]["rope"]
    positions, cos, sin = (arrays[f"{checkpoint}/{name}"] for name in ("positions", "cos", "sin"))
    half = cos.shape[1] // 2
    theta = json.loads((REFERENCE / checkpoint / "config.json").read_text())["rope_theta"]
    one_LH = jnp.broadcast_to(jnp.arange(2 * half) < half, (positions.max() + 1, 2 * half))  # rotated: (cos, sin)
    turned = np.asarray(rope(one_LH.astype(jnp.float32)[None, None], theta))[0, 0][positions]
    allowed = 1e-6 + 1.2e-7 * positions[:, None]
    assert (np.abs(turned[:, :half] - cos[:, :half]) <= allowed).all()
    assert (np.abs(turned[:, half:] - sin[:, half:]) <= allowed).all()


def drawn_loss(model, arrays, kind):
    """The public loss of pre-training or fine-tuning for the noise that is stored."""
    noise = arrays["input_ids"], arrays["masked_indices"], arrays["p_mask"]
    if kind == "sft":
        return llada_jax.sft_loss(model, *noise, arrays["prompt_lengths"])
    return llada_jax.pretrain_loss(model, *noise)


CASES = ["pre_a", "pre_a_onerow", "pre_a_truncated", "pre_b", "pre_a_nothing_masked", "sft_a", "sft_b"]
grad = jax.jit(jax.value_and_grad(drawn_loss), static_argnames="kind")


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_official_code(case):
    arrays, meta = vectors("losses")[0][case], vectors("losses")[1][case]
    model = load(meta["ckpt"])
    loss, gradients = grad(model, arrays, kind=meta["kind"])
    gradients = published(gradients)
    if case == "pre_a_nothing_masked":
        assert loss == 0 and all((x == 0).all() for x in gradients.values())
        return
    assert abs(loss / meta["loss_float64"] - 1) <= 1e-5
    for name, norm in zip(meta.get("grad_norm_names", []), arrays.get("grad_norms", []), strict=True):
        assert abs(np.linalg.norm(gradients[name]) / norm - 1) <= 5e-4, name
    for name in meta.get("full_grads", []):
        wanted = arrays[f"grad/{name}"]
        assert np.abs(gradients[name] - wanted).max() <= 5e-4 * np.abs(wanted).max(), name


@pytest.mark.parametrize("case", CASES)
def test_the_cross_entropy_of_each_masked_token_is_the_official_one(case):
    arrays, meta = vectors("losses")[0][case], vectors("losses")[1][case]
    logits = load(meta["ckpt"])(arrays["noisy_batch"]).astype(jnp.float32)
    ce_BL = optax.softmax_cross_entropy_with_integer_labels(logits, arrays["input_ids"])
    masked = arrays["masked_indices"]
    found = np.asarray(ce_BL)[masked] / arrays["p_mask"][masked]
    assert found == pytest.approx(arrays["token_loss"], rel=5e-4)


@pytest.mark.parametrize("case", CASES)
def test_losses_in_bfloat16_are_those_under_autocast(case):
    arrays, meta = vectors("losses")[0][case], vectors("losses")[1][case]
    loss = drawn_loss(load(meta["ckpt"], "bfloat16"), arrays, meta["kind"])
    assert loss == pytest.approx(meta["loss_autocast_bf16"], rel=2e-2)


@pytest.mark.parametrize("case", ["pre_a", "pre_b"])
def test_noise_is_drawn_as_in_the_official_code(case):
    arrays, model = vectors("losses")[0][case], load(vectors("losses")[1][case]["ckpt"])
    ratio_B = (1 - 1e-3) * arrays["t"] + 1e-3
    assert ratio_B == pytest.approx(arrays["p_mask"][:, 0], rel=1e-6)
    masked_BL = arrays["uniform_draws"] < ratio_B[:, None]
    assert (masked_BL == arrays["masked_indices"]).all()
    noisy_BL = np.where(masked_BL, model.config.mask_token_id, arrays["input_ids"])
    assert (noisy_BL == arrays["noisy_batch"]).all()


def test_twenty_steps_of_adamw_follow_torch():
    arrays, meta = vectors("optim")[0]["o01_pretrain"], vectors("optim")[1]["o01_pretrain"]
    model = load(meta["ckpt"])
    steps, rows, length = arrays["input_ids"].shape
    config = ConfigDict(
        dict(
            b1=meta["betas"][0], b2=meta["betas"][1], eps=meta["eps"], weight_decay=meta["weight_decay"],
            decay="all", clip_norm=meta["clip"], mu_dtype="float32",
            schedule=tuple(("constant", float(rate), f"{i + 1} steps") for i, rate in enumerate(arrays["lr"])),
        )
    )  # fmt: skip
    adamw = optimizer.make_optimizer(config, total_steps=steps, tokens_per_step=rows * length)

    @jax.jit
    def step(model, state, *noise):
        loss, gradients = jax.value_and_grad(llada_jax.pretrain_loss)(model, *noise)
        updates, state = adamw.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, loss, optax.tree.norm(gradients)

    state = adamw.init(model)
    for i in range(steps):
        noise = (arrays[name][i] for name in ("input_ids", "masked_indices", "p_mask"))
        model, state, loss, norm = step(model, state, *noise)
        assert abs(loss - arrays["loss"][i]) <= 5e-5, i
        assert abs(norm / arrays["grad_norm"][i] - 1) <= 1e-4, i
        if i == 0:
            compare(published(model), arrays, "after_step_1", 2e-4)
    parameters = published(model)
    compare(parameters, arrays, "final", 5e-4)
    for name, norm in zip(meta["param_names"], arrays["final_param_norms"], strict=True):
        assert abs(np.linalg.norm(parameters[name]) - norm) <= 5e-4 * max(norm, 1), name


@pytest.mark.parametrize("case", ["pre_b", "sft_b"])
def test_a_ratio_may_be_given_by_row_or_by_token_and_a_prompt_is_never_scored(case):
    arrays, meta = vectors("losses")[0][case], vectors("losses")[1][case]
    model, wanted = load(meta["ckpt"]), arrays["loss"][0]
    by_row = arrays | {"p_mask": arrays["p_mask"][:, 0]}
    if meta["kind"] == "sft":
        prompt_BL = np.arange(arrays["input_ids"].shape[1]) < arrays["prompt_lengths"][:, None]
        by_row["masked_indices"] = by_row["masked_indices"] | prompt_BL
    assert drawn_loss(model, by_row, meta["kind"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(masked_indices=np.ones((2, 3), bool)), r"tokens has shape \(2, 24\) and masked \(2, 3\)"),
        (dict(p_mask=np.ones(3)), r"mask_ratio has shape \(3,\); it must be \(2,\) or \(2, 24\)"),
        (dict(prompt_lengths=np.ones(1, int)), r"prompt_lengths has shape \(1,\); it must be \(2,\)"),
    ],
)
def test_noise_of_another_shape_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        drawn_loss(load("ckpt_b_gqa_tied"), vectors("losses")[0]["sft_b"] | changes, "sft")


def compare(parameters, arrays, when, allowed):
    stored = {name: x for name, x in arrays.items() if name.startswith(f"{when}/")}
    assert stored
    for name, wanted in stored.items():
        assert np.abs(parameters[name.removeprefix(f"{when}/")] - wanted).max() <= allowed, name
