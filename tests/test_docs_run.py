"""Every Python block of the READMEs runs, on a tiny model in place of the one that it names."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from test_docs import PAGES, ROOT
from tiny import TINY

import llada_jax
from llada_jax.model.transformer import Transformer

ELSEWHERE = {"llada_jax/training/README.md", "llada_jax/serving/README.md"}  # library/test_fit.py, serving/test_page.py
BLOCKS = [
    (str(page.relative_to(ROOT)), code)
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if str(page.relative_to(ROOT)) not in ELSEWHERE
    and "simple_evaluate" not in code  # needs a data set; evaluation/test_harness.py calls it with tasks of its own
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("docs")
    model = Transformer(dataclasses.replace(TINY, max_sequence_length=128), jax.random.key(0))
    llada_jax.save_hf(model, place / "LLaDA-8B-Instruct")
    return place


@pytest.mark.parametrize("page, code", BLOCKS, ids=[f"{page}:{code[:20]!r}" for page, code in BLOCKS])
def test_python_of_the_readmes_runs(page, code, place, monkeypatch):
    monkeypatch.chdir(place)
    ids = np.asarray([[5, 6, 7, 8]])
    names = {
        "prompt_ids": ids, "answer_ids": [9, 10], "prompt": [5, 6], "answer": [7, 8], "answer_a": [7, 8],
        "answer_b": [9, 10], "prompts": [[5], [6, 7]], "answers": [[8, 9], [10, 11]], "tokens": list(range(5, 12)),
        "model": llada_jax.load("LLaDA-8B-Instruct"),
    }  # fmt: skip
    exec(code.replace("gen_length=128", "gen_length=32").replace("mc_num=128", "mc_num=16"), names)


def test_no_block_is_forgotten():
    assert len(BLOCKS) >= 3 and all((Path(ROOT) / page).exists() for page in ELSEWHERE)
