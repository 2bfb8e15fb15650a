"""The engine: answers come one after the other, whoever asked; one that is cancelled or fails harms no other."""

import numpy as np
import pytest

from llada_jax.fields import InputError
from llada_jax.sampling import generate
from llada_jax.sampling.prompts import answers
from llada_jax.serving import engine as engines
from llada_jax.serving.engine import Busy
from llada_jax.streams import stream

PROMPT = [1, 20, 21]
LONG = dict(gen_length=512, block_length=4)  # passes enough to look at it while it is made


def test_answers_are_made_in_order_and_too_many_are_refused(engine):
    first, second, third = (engine.submit(PROMPT, settings) for settings in (LONG, LONG, engine.settings))
    assert [answer.before() for answer in (first, second, third)] == [0, 1, 2]
    with pytest.raises(Busy, match="2 answers are waiting"):
        engine.submit(PROMPT)
    first.cancel()
    second.cancel()
    assert list(third)[-1].done and third.before() == 0
    assert not any(progress.done for progress in first)


def test_whoever_stops_reading_cancels(engine):
    reader = iter(engine.submit(PROMPT, LONG))
    next(reader)
    reader.close()
    *_, last = engine.submit(PROMPT)
    assert last.done and last.passes == 8


def test_masks_in_a_text_are_filled_and_the_rest_stays(engine, tokenizer):
    text = [*PROMPT, tokenizer.mask_id, 22, tokenizer.mask_id]
    *_, last = engine.submit(text, {}, fill=True)
    assert last.tokens[[0, 1, 2, 4]].tolist() == [*PROMPT, 22] and (last.tokens != tokenizer.mask_id).all()
    assert (last.step >= 0).tolist() == [False, False, False, True, False, True]


def test_noise_differs_from_prompt_to_prompt_and_is_that_of_the_key_where_one_is_given(engine):
    hot = dict(gen_length=16, block_length=4, temperature=2.0)
    one, two = (list(engine.submit(PROMPT, hot))[-1].tokens for _ in range(2))
    assert (one != two).any()
    key = stream(5, "sample")
    again = [list(engine.submit(PROMPT, hot, key=key))[-1].tokens for _ in range(2)]
    np.testing.assert_array_equal(*again)


@pytest.mark.parametrize(
    "ids, settings, message",
    [
        (PROMPT, dict(gen_length=2048), "exceed the model's context of 1024 tokens"),
        (PROMPT, dict(gen_length=8, temperatur=1), "temperatur: no such setting; there are gen_length, steps"),
        (PROMPT, dict(gen_length=8, block_length=3), "does not divide"),
        ([400], dict(gen_length=8), "400"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_it_waits(engine, ids, settings, message):
    with pytest.raises(InputError, match=message):
        engine.submit(ids, settings)


def test_what_fails_fails_for_its_reader_alone(engine, monkeypatch):
    def fails(job, by_block):
        yield from ()
        raise InputError("the model's logits are not finite")

    monkeypatch.setattr(generate._Job, "stream", fails)
    answer = engine.submit(PROMPT)
    monkeypatch.undo()
    with pytest.raises(InputError, match="not finite"):
        list(answer)
    assert list(engine.submit(PROMPT))[-1].done


def test_an_autoregressive_control_is_refused(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text('{"objective": {"name": "autoregressive"}}')
    with pytest.raises(InputError, match="autoregressive control"):
        engines.open_engine(tmp_path, {})


def test_closing_ends_what_is_made_and_what_waits(model, tokenizer):
    with engines.Engine(model, tokenizer, LONG) as e:
        answers = [e.submit(PROMPT), e.submit(PROMPT)]
        next(iter(answers[0]))
    assert not any(progress.done for answer in answers for progress in answer)
    assert not e._thread.is_alive()


def test_prompts_of_different_lengths_are_answered_as_one_batch(model, tokenizer):
    requests = ["the", [{"role": "user", "content": "quick brown"}], "fox [MASK]"]
    given = dict(gen_length=8, block_length=4)
    together = answers(model, tokenizer, requests, **given)
    assert together == [answers(model, tokenizer, [request], **given)[0] for request in requests]
    with pytest.raises(InputError, match="request 2"):
        answers(model, tokenizer, ["the", [{"role": "robot", "content": "x"}]], **given)
