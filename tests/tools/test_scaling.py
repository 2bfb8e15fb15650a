"""The scaling study: a law is found again, a grid goes on after a kill, and mistakes are said in a line."""

import pytest

from llada_jax.config import run_config
from llada_jax.fields import InputError
from llada_jax.model.config import PRESETS
from llada_jax.tools import scaling
from llada_jax.tools.claims import laws, runs

BUDGETS = [1e10, 3e10, 1e11, 3e11]


def lines(kind, law, sizes=("24x2", "48x3")):
    """Cells on a law, the second size a tenth worse; two seeds on both sides of it."""
    return [
        {"kind": kind, "size": size, "budget": budget, "seed": seed, "score": 0.5, "tokens": 1,
         "loss": law.loss(budget) * (1.1 if i else 1.0) + (0.01, -0.01)[seed]}
        for budget in BUDGETS for i, size in enumerate(sizes) for seed in (0, 1)
    ]  # fmt: skip


def test_a_known_law_and_a_known_ratio_are_found_again():
    control, llada = laws.Law(50.0, 0.1), laws.Law(50.0 * 16**0.1, 0.1)  # the same loss at 16 times the compute
    best = {kind: laws.frontier(lines(kind, law), kind) for kind, law in (("llada", llada), ("arm", control))}
    assert [cell["size"] for cell in best["arm"]] == ["24x2"] * 4
    found = laws.fit(BUDGETS, [cell["loss"] for cell in best["arm"]])
    assert found == pytest.approx(control)
    ratio, loss = laws.ratio_at_equal_loss(best["llada"], best["arm"])
    assert ratio == pytest.approx(16) and loss == best["llada"][-1]["loss"]


def test_losses_that_are_apart_have_no_ratio():
    best = {kind: laws.frontier(lines(kind, law), kind) for kind, law in
            (("llada", laws.Law(500.0, 0.1)), ("arm", laws.Law(50.0, 0.1)))}  # fmt: skip
    with pytest.raises(InputError, match="no loss is reached by both"):
        laws.ratio_at_equal_loss(best["llada"], best["arm"])


def test_a_loss_that_does_not_fall_has_no_law():
    with pytest.raises(InputError, match="--budgets"):
        laws.fit(BUDGETS, [2.0, 2.0, 2.1, 2.2])


def test_parameters_are_those_without_embedding_and_head():
    config = run_config("tiny")
    config.model.vocab_size = config.model.embedding_size = 0
    c = PRESETS["tiny"]
    layer = 4 * c.d_model**2 + 3 * c.d_model * c.mlp_hidden_size + 2 * c.d_model
    for vocabulary in (64, 512):
        assert scaling.body_parameters(config, vocabulary) == c.n_layers * layer + c.d_model


@pytest.mark.parametrize("text", ["64", "64x", "64x2x3", ""])
def test_sizes_are_width_and_layers(text):
    with pytest.raises(InputError, match="--sizes"):
        scaling.read_sizes(text)


@pytest.mark.parametrize("text", ["1e10", "1e10,x", "-1e10,1e10", "1e10,nan"])
def test_budgets_are_two_numbers_or_more(text):
    with pytest.raises(InputError, match="--budgets"):
        scaling.read_budgets(text)


SIZES, TWO = [runs.Shape(16, 1)], [1e9, 1e10]


def test_a_grid_goes_on_after_a_kill(tmp_path, monkeypatch):
    made = []

    def cell(workdir, kind, size, budget, seed):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((kind, budget))
        return {"loss": 1e11**0.1 / budget**0.1 + (kind == "llada") * 0.01, "score": 0.5, "tokens": 1}

    monkeypatch.setattr(scaling, "cell", cell)
    monkeypatch.setattr(scaling, "prepare", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        scaling.scale(tmp_path, SIZES, TWO, 1, "couplets")
    before = (tmp_path / "results.jsonl").read_text()
    assert len(before.splitlines()) == 3
    last = made.pop()  # one more may be made
    said = scaling.scale(tmp_path, SIZES, TWO, 1, "couplets")
    after = (tmp_path / "results.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 4
    assert (
        last != made[-1]
        and len({(line["kind"], line["budget"]) for line in runs.finished(tmp_path / "results.jsonl")}) == 4
    )
    assert said in (tmp_path / "scaling.md").read_text() and "</svg>" in (tmp_path / "scaling.svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", runs.KINDS)
def test_a_cell_spends_its_budget_and_is_measured(tmp_path, kind):
    scaling.prepare(tmp_path, "couplets")
    found = scaling.cell(tmp_path, kind, SIZES[0], 1.1e8, 0)
    assert found["tokens"] == found["steps"] * 512
    assert abs(6 * found["parameters"] * found["tokens"] / 1.1e8 - 1) < 0.2
    assert 0 < found["loss"] < 10 and 0 <= found["score"] <= 1
    assert not (tmp_path / f"{kind}-16x1-1.1e+08-0").exists()
