"""What the sampler is compared with does the same work, and the tasks of the accuracy table can be got right."""

import jax
import numpy as np
import pytest
import torch
from tiny import TINY

from llada_jax.model.transformer import Transformer
from llada_jax.sampling.generate import generate
from llada_jax.tools import decode_accuracy
from llada_jax.tools.ahead.sampler import Job, compile_sampler
from llada_jax.tools.ahead.slices import parse_topology
from llada_jax.tools.torch_sample import Sampler


def test_the_official_rule_in_pytorch_gives_our_tokens():
    ours = Transformer(TINY, jax.random.key(3))
    theirs = Sampler(TINY, threads=1)
    arrays = {name: np.asarray(getattr(ours, name)[...]) for name in ("wte", "ln_f", "ff_out")}
    state = {f"{name}.weight": torch.tensor(x) for name, x in arrays.items()}
    for name in theirs.model.blocks[0].state_dict():  # type: ignore[reportCallIssue]
        stacked = np.asarray(getattr(ours.blocks, name.removesuffix(".weight"))[...])
        for i, x in enumerate(stacked):
            state[f"blocks.{i}.{name}"] = torch.tensor(x).reshape(theirs.model.state_dict()[f"blocks.{i}.{name}"].shape)
    theirs.model.load_state_dict(state)
    prompt = np.random.default_rng(0).integers(7, 60, (3, 9))
    found = generate(ours, prompt, gen_length=16, steps=8, block_length=8)
    assert np.array_equal(theirs(torch.tensor(prompt), 16, 8, 8).numpy(), np.asarray(found))


def test_lines_of_the_corpus_are_right_answers_and_others_are_not(tmp_path):
    decode_accuracy.write_corpus(tmp_path / "corpus.txt", 50)
    lines = (tmp_path / "corpus.txt").read_text(encoding="utf-8").splitlines()
    tasks = decode_accuracy.tasks()
    for sort, copy, couplet in zip(*[iter(lines)] * 3, strict=True):
        for name, prompt_length, line in (("sort", 9, sort), ("copy", 3, copy), ("couplets", 8, couplet)):
            prompt, text = line[:prompt_length], line[prompt_length:]
            assert len(text) == tasks[name].gen_length - 1  # and an end of text
            assert tasks[name].is_right(prompt, text)
            assert not tasks[name].is_right(prompt, text[:-1] + "x")
    assert not tasks["copy"].is_right("c12", "3456=123457")


@pytest.mark.slow
def test_a_sampler_is_compiled_for_tpus_that_are_not_there():
    found = compile_sampler("small", parse_topology("v5e:2x2"), Job(rows=2, prompt_length=96, gen_length=32))
    assert found["mesh"]["tensor"] == 4
    assert 0 < found["seconds_per_window_pass"] < found["seconds_per_full_pass"]
    weights = 2 * found["parameters"] / 4
    assert all(weights < size < 3 * weights + 2**28 for size in found["bytes_per_device"].values())
