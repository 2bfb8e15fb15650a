"""Caches and commit rules against Fast-dLLM's own states, pass for pass, and variable length against iLLaDA's text.

tests/golden/reference/decode was made by the original PyTorch code on tiny random models.
"""

import json

import numpy as np
import pytest
from reference import REFERENCE, load
from safetensors.numpy import load_file

import llada_jax

META = json.loads((REFERENCE / "decode" / "decode.json").read_text())["cases"]
ARRAYS = load_file(REFERENCE / "decode" / "decode.safetensors")
# Left out: "quirk" pins what masks left in the output look like; "drawn" needs the original's random draws.
CASES = [case for case, meta in META.items() if not {"quirk", "drawn"} & set(meta["tags"])]
ILLADA = json.loads((REFERENCE / "decode" / "illada.json").read_text())["cases"]
ILLADA_ARRAYS = load_file(REFERENCE / "decode" / "illada.safetensors")
VARIABLE = [case for case, meta in ILLADA.items() if meta["kind"] == "variable_length"]


def options_of(meta):
    rule = {"quota": dict(steps=meta["steps"]), "threshold": dict(threshold=meta["threshold"])}
    return dict(
        gen_length=meta["gen_length"], block_length=meta["block_length"], cache=meta["method"],
        remasking=meta["remasking"], mask_id=meta["mask_id"], eos_id=meta["eos_id"], return_stats=True,
        **rule.get(meta["rule"], dict(factor=meta["factor"])),
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_state_and_every_pass_is_the_originals(case):
    meta, canvas = META[case], ARRAYS[f"{case}/canvas"]
    tokens, stats = llada_jax.generate(load(meta["ckpt"]), ARRAYS[f"{case}/prompt"], **options_of(meta))
    assert (stats.full_passes, stats.window_passes) == (meta["nfe_full"], meta["nfe"] - meta["nfe_full"])
    np.testing.assert_array_equal(stats.trajectory(), canvas[1:])
    np.testing.assert_array_equal(tokens, ARRAYS[f"{case}/tokens"])


@pytest.mark.parametrize("case", [case for case in META if "quirk" in META[case]["tags"]])
def test_no_mask_is_left_where_the_original_leaves_some(case):
    meta = META[case]
    tokens, _ = llada_jax.generate(load(meta["ckpt"]), ARRAYS[f"{case}/prompt"], **options_of(meta))
    assert not np.any(np.asarray(tokens) == meta["mask_id"])


@pytest.mark.parametrize(
    "case, cache", [("n01_quota", "two_block"), ("n03_threshold", "prefix"), ("n04_threshold_b3", "dual")]
)
def test_a_cache_that_is_renewed_in_every_pass_is_no_cache(case, cache):
    meta = META[case]
    options = options_of(meta) | dict(cache=cache, refresh_every=1)
    _, stats = llada_jax.generate(load(meta["ckpt"]), ARRAYS[f"{case}/prompt"], **options)
    assert (stats.full_passes, stats.window_passes) == (meta["nfe"], 0)
    np.testing.assert_array_equal(stats.trajectory(), ARRAYS[f"{case}/canvas"][1:])


@pytest.mark.parametrize("case", VARIABLE)
def test_blocks_are_appended_until_one_holds_eos(case):
    meta, W = ILLADA[case], ILLADA[case]["block_length"]
    wanted = {name: ILLADA_ARRAYS[f"{case}/{name}"] for name in ("prompt", "tokens", "step", "answer")}
    rule = {} if meta["threshold"] is None else dict(threshold=meta["threshold"])
    rule = rule or dict(steps=meta["steps_per_block"] * (meta["max_new_tokens"] // W))
    tokens, stats = llada_jax.generate(
        load(meta["ckpt"]), wanted["prompt"][None], gen_length=meta["max_new_tokens"], block_length=W,
        variable_length=True, mask_id=meta["mask_id"], eos_id=meta["stop_ids"][0], return_stats=True, **rule,
    )  # fmt: skip
    P, written = len(wanted["prompt"]), len(wanted["tokens"])
    np.testing.assert_array_equal(np.asarray(tokens)[0, :written], wanted["tokens"])
    np.testing.assert_array_equal(np.asarray(stats.step)[0, :written], wanted["step"])
    assert stats.full_passes == meta["nfe"]
    assert np.all(np.asarray(tokens)[0, written:] == meta["stop_ids"][0])
    np.testing.assert_array_equal(np.asarray(tokens)[0, P : P + len(wanted["answer"])], wanted["answer"])
