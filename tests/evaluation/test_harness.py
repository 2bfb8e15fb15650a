"""From task file to score: every request and metric of tests/golden/tasks with a model whose answers are known."""

import dataclasses
import gzip
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import REFERENCE, load
from tiny import TINY

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import llada_jax  # noqa: E402
from llada_jax.data.tokenizer import load_tokenizer  # noqa: E402
from llada_jax.evaluation import harness, likelihood  # noqa: E402
from llada_jax.evaluation.store import Store  # noqa: E402
from llada_jax.fields import InputError  # noqa: E402
from llada_jax.model.transformer import Transformer  # noqa: E402
from llada_jax.streams import stream  # noqa: E402

TASKS = Path(__file__).parents[1] / "golden" / "tasks"
EXPECTED = json.loads((TASKS / "expected.json").read_text())
RAW = {r["key"]: r["raw"] for r in map(json.loads, (TASKS / "data/raw_responses.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(REFERENCE.parent / "tokenizer")


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(TASKS), include_defaults=False)


def cost(text):
    return sum(1 + byte % 5 for byte in text.encode()) / 16


class Scripted(harness.LLaDA):
    """Scores and raw answers as tests/golden/tasks defines them; all else is the class that is tested."""

    asked = ()

    def _scores(self, requests, pairs, question_of):
        for i in pairs:
            context, answer = requests[i].args
            yield i, -cost(answer) - ((7 * len(context.encode()) + len(answer)) % 11) / 32, 1

    def _is_greedy(self, pair):
        answer = self.tokenizer.decode(pair.tokens[pair.start :]).removeprefix("\n\n")  # of the chat template
        return sum(answer.encode()) % 3 == 0

    def _generate(self, asked, keep):
        for i, _, context, _ in asked:
            _, key = max((context.rfind(key), key) for key in RAW)
            keep(i, self.tokenizer.encode_marked(RAW[key]))

    def _keep(self, key, request, answer, **facts):
        super()._keep(key, request, answer, **facts)
        self.asked = (*self.asked, (request.task_name, request.doc_id, request.idx, list(request.args), answer))


@pytest.fixture
def scripted(monkeypatch, tokenizer, tmp_path):
    def rolling(model, texts, **_):
        return ((i, -cost(tokenizer.decode(ids))) for i, ids in enumerate(texts))

    monkeypatch.setattr(likelihood, "rolling_bounds", rolling)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    return Scripted(model=load("ckpt_e_train"), tokenizer=tokenizer, max_length=10**6)


@pytest.mark.parametrize("chat", [False, True])
def test_requests_and_metrics_are_the_expected_ones(monkeypatch, scripted, manager, chat):
    monkeypatch.setattr(harness.LLaDA, "max_length", 10**6)
    monkeypatch.setattr(harness.rows, "make_pair", lambda c, a, b: harness.rows.Pair(np.asarray([*a, *b]), len(a)))
    expected = EXPECTED["scripted_model_with_chat_template" if chat else "scripted_model"]
    results = lm_eval.simple_evaluate(
        model=scripted, tasks=list(expected), task_manager=manager, bootstrap_iters=0, torch_random_seed=None,
        confirm_run_unsafe_code=True, apply_chat_template=chat, fewshot_as_multiturn=chat,
    )  # fmt: skip
    for task, metrics in expected.items():
        for name, value in metrics.items():
            assert results["results"][task][name] == pytest.approx(value, abs=1e-9), (task, name)
    lines = gzip.decompress((TASKS / f"requests{'_chat' * chat}.jsonl.gz").read_bytes()).decode().splitlines()
    wanted = {
        json.dumps([r["task"], r["doc"], r["idx"], r["args"], r["response"]], sort_keys=True)
        for r in map(json.loads, lines)
    }
    assert {json.dumps(request, sort_keys=True) for request in scripted.asked} == wanted


def ask(kind, *arguments, doc=None):
    return [Instance(kind, doc or {"n": i}, args, 0, ("task", i, 1)) for i, args in enumerate(arguments)]


@pytest.fixture
def lm(tokenizer):
    return lambda **given: harness.LLaDA(model=load("ckpt_e_train"), tokenizer=tokenizer, **given)


PAIRS = [("The cat sat on", " the mat"), ("", "word"), ("One and one ", "is two"), ("The cat sat on", " the mat")]


def test_scores_are_those_of_the_library(lm, tokenizer):
    """White space at the seam goes with the answer; a request that comes twice is answered twice."""
    found = lm(mc_num=4096).loglikelihood(ask("loglikelihood", *PAIRS))
    ids = [(tokenizer.encode(a.rstrip()), tokenizer.encode(a + b)) for a, b in PAIRS]
    answers = [whole[len(prompt) :] for prompt, whole in ids]
    exact = llada_jax.log_likelihood(load("ckpt_e_train"), [prompt for prompt, _ in ids], answers, mc_num=4096)
    np.testing.assert_allclose([score for score, _ in found], exact, rtol=1e-5)
    assert found[0] == found[3] and not any(greedy for _, greedy in found)


@pytest.mark.parametrize("batch_size", [1, 64, "auto"])
def test_scores_do_not_depend_on_order_and_batch(lm, batch_size):
    asked = ask(
        "loglikelihood", *[(f"{context} {i}", f"{answer} and some more") for i, (context, answer) in enumerate(PAIRS)]
    )
    wanted = lm(mc_num=16, batch_size=8).loglikelihood(asked)
    found = lm(mc_num=16, batch_size=batch_size).loglikelihood(asked[::-1])[::-1]
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(wanted, float), rtol=1e-5)
    assert wanted != lm(mc_num=16, batch_size=8, seed=1).loglikelihood(asked)


def test_confidence_and_rolling_scores_are_those_of_the_library(lm, tokenizer):
    ((score, _),) = lm(method="confidence").loglikelihood(ask("loglikelihood", PAIRS[0]))
    pair = tokenizer.encode(PAIRS[0][0]), tokenizer.encode("".join(PAIRS[0]))[len(tokenizer.encode(PAIRS[0][0])) :]
    assert score == pytest.approx(llada_jax.confidence_score(load("ckpt_e_train"), *pair), rel=1e-5)
    texts = ["A text that is longer than one window of it.", "short", ""]
    place = dict(max_length=9, context_length=3, mc_num=32)
    found = lm(**place, prefix="bos").loglikelihood_rolling(ask("loglikelihood_rolling", *[(t,) for t in texts]))
    wanted = [
        llada_jax.rolling_log_likelihood(
            load("ckpt_e_train"),
            tokenizer.encode(t),
            **place,
            prefix=tokenizer.bos_id,
            batch_size=8,
            key=stream(0, "eval"),
        )
        for t in texts[:2]
    ]
    np.testing.assert_allclose(found, [*wanted, 0.0], rtol=1e-5)


def test_greedy_answers_are_what_the_sampler_writes(lm, tokenizer):
    prompt = tokenizer.encode("The cat")
    written = np.asarray(llada_jax.generate(load("ckpt_e_train"), [prompt], gen_length=4))[0]
    model = lm(check_greedy=True)
    other = written.copy()
    other[-1] = (other[-1] + 1) % 400
    assert model._is_greedy(harness.rows.Pair(written, len(prompt)))
    assert not model._is_greedy(harness.rows.Pair(other, len(prompt)))


def test_generation_fills_gaps_and_follows_the_arguments_of_a_task(lm, tokenizer):
    options = dict(do_sample=False, max_gen_toks=6, until=["zzz"])
    model = lm()
    asked = ask(
        "generate_until", ("def f(", options), ("a <|infill|> b", options), ("def f(", options | {"max_gen_toks": 3})
    )
    found = model.generate_until(asked)
    checkpoint, prompt = load("ckpt_e_train"), tokenizer.encode("def f(")
    for answer, length in ((found[0], 6), (found[2], 3)):
        written = np.asarray(llada_jax.generate(checkpoint, [prompt], gen_length=length))[0, len(prompt) :].tolist()
        assert answer == harness.cut(tokenizer, written, ["zzz"])
    before, after = tokenizer.encode("a "), tokenizer.encode(" b")
    canvas = np.asarray([[*before, *[checkpoint.config.mask_token_id] * 6, *after]])
    filled = np.asarray(llada_jax.infill(checkpoint, canvas).tokens)[0, len(before) : len(before) + 6].tolist()
    assert found[1] == harness.cut(tokenizer, filled, None)
    assert model.get_model_info()["generated_instead_of_asked"] == []
    fixed = lm(gen_length=8, block_length=4)
    fixed.generate_until(asked[:1])
    assert fixed.get_model_info()["generated_instead_of_asked"] == ["8 for 6"]


def test_repeated_samples_differ_and_stay(lm):
    options = dict(do_sample=True, temperature=1.5, max_gen_toks=8)
    found = lm().generate_until(ask("generate_until", ("x", options), ("x", options)))
    assert found[0] != found[1] and found == lm(batch_size=1).generate_until(
        ask("generate_until", ("x", options), ("x", options))
    )


def test_a_begun_answer_leaves_its_turn_open(lm):
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "def f("}]
    text = lm().apply_chat_template(history, add_generation_prompt=False)
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\ndef f(") and text.count("assistant") == 1


def test_long_contexts_are_cut_on_the_left_and_counted(lm, tokenizer):
    model = lm(max_length=12)
    long = "word " * 40
    pair = model._pair(long, " end")
    whole = tokenizer.encode(long + " end")
    assert pair.tokens.tolist() == whole[-12:] and model.get_model_info()["truncated_contexts"] == 1
    with pytest.raises(InputError, match="the answer .* has .* tokens, over 12"):
        model._pair("a", long)
    with pytest.raises(InputError, match="no token is left of the answer ''"):
        model._pair("a", "")


def test_finished_requests_are_not_asked_again_and_never_stale(lm, tmp_path, monkeypatch):
    asked = ask("loglikelihood", *PAIRS)
    scored = []
    original = harness.LLaDA._scores
    monkeypatch.setattr(
        harness.LLaDA, "_scores", lambda self, r, pairs, q: scored.append(len(pairs)) or original(self, r, pairs, q)
    )
    path = tmp_path / "requests.jsonl"
    wanted = lm(mc_num=8, store=Store(path)).loglikelihood(asked[:2])
    path.write_bytes(path.read_bytes() + b'{"key": "half')  # a kill in the middle of a line
    found = lm(mc_num=8, store=Store(path)).loglikelihood(asked)
    assert found[:2] == wanted and scored == [2, 2]
    assert len(Store(path)._answers) == 4
    for other in (
        dict(mc_num=16),
        dict(mc_num=8, seed=3),
        dict(mc_num=8, cfg_scale=0.5),
        dict(mc_num=8, method="confidence"),
    ):
        lm(**other, store=Store(path)).loglikelihood(asked[:1])
        assert scored.pop() == 1
    path.write_text("other\n")
    with pytest.raises(InputError, match="holds other lines than answers"):
        Store(path)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(mc_num=0), "mc_num is 0; it must be"),
        (dict(mc_num=12, mini_batch=8), "mc_num 12 is not a multiple of mini_batch 8"),
        (dict(method="x"), "method is 'x'"),
        (dict(stop_at=1.0), "stop_at is 1.0"),
        (dict(stop_at=0.9, method="confidence"), "stop_at belongs to the method bound"),
        (dict(batch_size="x"), "batch_size 'x'"),
        (dict(wrong=1), "wrong: no such field"),
    ],
)
def test_wrong_arguments_are_named(lm, given, message):
    with pytest.raises(InputError, match=message):
        lm(**given)


def test_a_left_to_right_model_is_refused(tokenizer):
    causal = Transformer(dataclasses.replace(TINY, causal=True), jax.random.key(0))
    with pytest.raises(InputError, match="the model is causal"):
        harness.LLaDA(model=causal, tokenizer=tokenizer)


def test_the_harness_may_make_the_model_from_a_string(tmp_path, tokenizer):
    shutil.copytree(REFERENCE / "ckpt_e_train", tmp_path / "c")
    tokenizer.save(tmp_path / "c")
    made = harness.LLaDA.create_from_arg_string(
        f"pretrained={tmp_path / 'c'},mc_num=16,cfg_scale=0.5", {"batch_size": "4", "device": "cuda:0"}
    )
    assert made.settings.mc_num == 16 and made.rows_at_once == 4 and made.sampling == {"cfg_scale": 0.5}
