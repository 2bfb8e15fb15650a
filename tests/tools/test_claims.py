"""The claims' commands: lines on disk that are made once, laws that are found again, questions that can be answered."""

import dataclasses
import itertools
import json
import random

import jax
import numpy as np
import pytest
from reference import REFERENCE

from llada_jax.evaluation.draws import bits
from llada_jax.fields import InputError
from llada_jax.model.transformer import Transformer
from llada_jax.tools.claims import bound, chat, context, lora, reversal, runs


def test_a_finished_cell_is_not_made_again_and_another_setting_is(tmp_path):
    path, made = tmp_path / "results.jsonl", []

    def cell():
        made.append(1)
        return {"loss": 2.0}

    first = runs.once(path, {"kind": "arm", "seed": 0}, cell)
    assert runs.once(path, {"kind": "arm", "seed": 0}, cell) == first
    assert len(made) == 1 and first["loss"] == 2.0
    runs.once(path, {"kind": "arm", "seed": 1}, cell)
    assert len(made) == 2 and [line["seed"] for line in runs.finished(path)] == [0, 1]


def test_a_file_of_something_else_is_refused_and_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    for content in ('{"kind": "arm"}\nnot JSON\n', "[1]\n"):
        path.write_text(content)
        with pytest.raises(InputError, match="results.jsonl"):
            runs.once(path, {"kind": "llada"}, dict)
        assert path.read_text() == content


def test_the_next_token_s_probability_is_the_softmax_s(tiny):
    model = Transformer(dataclasses.replace(tiny, causal=True), jax.random.key(0))
    rows = np.random.default_rng(0).integers(7, 60, (2, 8)).astype(np.int32)
    logits = np.asarray(model(rows), np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    wanted = [[np.log(p[b, i, rows[b, i + 1]]) for i in range(7)] for b in range(2)]
    np.testing.assert_allclose(runs.next_token_log_p(model, rows), wanted, rtol=1e-4)


def test_every_way_to_draw_masks_estimates_the_bound():
    length = 5
    masks = bits(length)
    sums = masks @ np.arange(1.0, length + 1) * (1 + masks.sum(axis=1))  # any function of the mask
    sizes = masks.sum(axis=1)
    exact = -np.mean([np.mean(sums[sizes == n] * length / n) for n in range(1, length + 1)])
    for way in bound.WAYS:
        found = bound.estimates(way, sums, 64, 4000, np.random.default_rng(0))
        # A ratio below 0.001 is never drawn, which leaves out less than 0.2% here.
        assert abs(found.mean() - exact) < 4 * found.std() / 4000**0.5 + 0.002 * abs(exact), way
    errors = {way: bound.estimates(way, sums, 64, 4000, np.random.default_rng(1)).std() for way in bound.WAYS}
    assert errors["counts, stratified"] < 0.9 * errors["counts, independent"]
    assert errors["ratios, stratified"] < errors["ratios, independent"]


@pytest.mark.parametrize("examples", [0, 1, 3])
def test_the_best_guesser_is_right_as_often_as_a_count_says(examples):
    """Over all prompts of so many letters and all queries; a letter that was not shown is guessed among the others."""
    right = []
    for shown in itertools.product(range(6), repeat=examples):
        right += [1.0 if letter in shown else 1 / (6 - len(set(shown))) for letter in range(6)]
    assert context.best(examples) == pytest.approx(np.mean(right))


def test_examples_and_pairs_of_a_line_follow_one_map():
    words = context.line(random.Random(0), 40, 40).split()
    examples, pairs = {tuple(word) for word in words[:40]}, set(zip(words[40::2], words[41::2], strict=True))
    assert examples == pairs and len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs}) == 6
    *_, usual = context.corpus(random.Random(0), 20)
    assert all(x.upper() == y for x, y in zip(*[iter(usual.replace(" ", ""))] * 2, strict=True))


def test_facts_are_stated_one_way_and_asked_both_ways():
    known = reversal.facts(20)
    assert len({name for fact in known for name in fact}) == 40
    for statement in reversal.STATEMENTS:
        assert statement.index("{p}") < statement.index("{w}")
    (p, w), new = known[0], list(reversal.PHRASINGS.values())[-1]
    for direction, given, wanted in (("forward", p, w), ("backward", w, p)):
        question, answer = reversal.question((p, w), direction, new)
        assert given in question and wanted not in question and answer == f" {p} composed {w}."
        assert reversal.named(answer, direction) == wanted and reversal.named("", direction) == ""


def test_what_is_asked_after_fine_tuning_was_not_taught():
    asked, taught = chat.dialogues(random.Random(0), 300)
    questions = {talk[-2]["content"] for talk in taught if len(talk) == 2} | {t[2]["content"] for t in taught if t[2:]}
    for skill in chat.SKILLS:
        assert not questions & {talk[0]["content"] for talk in asked[skill]}
    names = {talk[0]["content"] for talk in taught if len(talk) > 2}
    assert names and not names & {talk[0]["content"] for talk in asked["name after a turn"]}
    assert chat.instruction("reverse", ["a", "b", "c"])[1]["content"] == "It is c b a"


def test_every_way_to_tune_trains_on_the_same_rows_from_the_same_base(tmp_path):
    (tmp_path / "tokenizer.model").touch()
    every, *adapters = (lora.tuning(lora.small(), base, tmp_path) for base in lora.WAYS.values())
    assert every.lora.rank == 0 and [run.lora.base for run in adapters] == ["bfloat16", "int8", "int4"]
    for run in adapters:
        assert run.lora.rank and run.optimizer.schedule != every.optimizer.schedule
        run.lora, run.optimizer = every.lora, every.optimizer
        assert run.to_dict() == every.to_dict()


@pytest.mark.slow
def test_tuning_by_lora_and_weights_in_few_bits_make_two_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "WAYS", {"all parameters": None, "LoRA on int4": "int4"})
    monkeypatch.setattr(lora, "PRECISIONS", {bits: {"dtype": "float32", "quantize": bits} for bits in ("int8", "int4")})
    config = lora.small()
    config.mesh.update(dict(data=8, fsdp=1))
    config.model.update(dict(d_model=32, mlp_hidden_size=48))
    config.train.steps = config.quickstart.sft_steps = 2
    config.quickstart.couplets = config.quickstart.sft_batch_size = config.train.batch_size = 8
    said = lora.claim(tmp_path, config, [REFERENCE / "ckpt_e_train"])
    lines = runs.finished(tmp_path / "results.jsonl")
    every, adapters, *compared = lines
    assert (every["way"], adapters["way"]) == tuple(lora.WAYS)
    assert every["state_mib"] > adapters["state_mib"] and adapters["frozen_mib"] > every["frozen_mib"] == 0
    for line in compared:
        assert 0 < line["int8"]["nats"] < line["int4"]["nats"] and 0 <= line["int4"]["same"] <= 1
    assert lora.claim(tmp_path, config, [REFERENCE / "ckpt_e_train"]) == said
    assert said in (tmp_path / "lora.md").read_text() and runs.finished(tmp_path / "results.jsonl") == lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, command",
    [
        ("bound", lambda place: bound.bound(place, seeds=1, steps=2, repeats=20)),
        ("context", lambda place: context.context(place, seeds=1, steps=2, questions=8, lines=200)),
        ("reversal", lambda place: reversal.reversal(place, seeds=1, steps=2, count=8)),
        ("chat", lambda place: chat.chat(place, seeds=1, steps=2, count=60)),
    ],
)
def test_a_command_leaves_lines_a_table_and_a_picture(tmp_path, name, command):
    said = command(tmp_path)
    lines = (tmp_path / "results.jsonl").read_text()
    assert len(lines.splitlines()) == (1 if name == "bound" else 2)
    assert said in (tmp_path / f"{name}.md").read_text()
    assert "</svg>" in (tmp_path / f"{name}.svg").read_text()
    assert command(tmp_path) == said and (tmp_path / "results.jsonl").read_text() == lines
    assert all(json.loads(line)["seconds"] > 0 for line in lines.splitlines())
