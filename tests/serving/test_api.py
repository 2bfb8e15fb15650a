"""The endpoint, as OpenAI's own client sees it."""

import threading
import time

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from llada_jax.fields import InputError
from llada_jax.sampling import generate as generate_module
from llada_jax.sampling import prompts
from llada_jax.sampling.generate import generate
from llada_jax.serving.api import create_api
from llada_jax.serving.engine import Busy
from llada_jax.streams import stream


@pytest.fixture(scope="module")
def url(engine):
    app = Starlette(routes=[Mount("/v1", create_api(engine, "tiny"))])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def wanted(model, tokenizer, prompt, **settings):
    """The text that `generate` gives with seed 7."""
    tokens = generate(model, [prompt], gen_length=8, block_length=4, key=stream(7, "sample"), **settings)
    return prompts.reply_text(tokenizer, np.asarray(tokens)[0, len(prompt) :])


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "llada_jax"


def test_a_chat_completion_is_the_reply_of_the_sampler(client, model, tokenizer):
    messages = [{"role": "user", "content": "the fox"}]
    prompt = tokenizer.encode_chat(messages)
    done = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=7, temperature=0.5)
    choice = done.choices[0]
    assert choice.message.content == wanted(model, tokenizer, prompt, temperature=0.5)
    assert choice.finish_reason in ("length", "stop") and done.usage.prompt_tokens == len(prompt)


def test_a_stream_gives_the_same_text_block_by_block(client):
    given = dict(model="tiny", messages=[{"role": "user", "content": [{"type": "text", "text": "quick"}]}], seed=7)
    whole = client.chat.completions.create(**given)
    parts = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in parts[:-1]) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant" and len(parts) > 3
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason and parts[-1].usage == whole.usage


def test_plain_completions_take_text_ids_and_options_of_the_sampler(client, model, tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("the")]
    done = client.completions.create(model="tiny", prompt="the", seed=7, temperature=0, extra_body={"threshold": 0.001})
    assert done.choices[0].text == wanted(model, tokenizer, ids, threshold=0.001)
    assert client.completions.create(model="tiny", prompt=ids, seed=7, temperature=0).choices[0].text == wanted(
        model, tokenizer, ids
    )
    short = client.completions.create(model="tiny", prompt=ids, seed=7, temperature=0, max_tokens=3)
    assert short.usage.completion_tokens == 3 and short.choices[0].finish_reason == "length"


def test_stop_words_end_an_answer_and_are_not_part_of_it(client):
    given = dict(model="tiny", prompt="fox", seed=7, temperature=0)
    whole = client.completions.create(**given).choices[0].text
    stop = whole[3:5]
    for streams in (False, True):
        got = client.completions.create(**given, stop=[stop, "never"], stream=streams)
        text = "".join(part.choices[0].text for part in got) if streams else got.choices[0].text
        assert text == whole[: whole.find(stop)]


@pytest.mark.parametrize(
    "change, status, param, message",
    [
        ({"model": "gpt"}, 404, "model", "this server has 'tiny'"),
        ({"n": 2}, 400, "n", "n must be 1"),
        ({"top_p": 0.5}, 400, "top_p", "top_p must be 1"),
        ({"extra_body": {"tempratur": 1}}, 400, "tempratur", "unknown field"),
        ({"temperature": -1}, 400, "temperature", "temperature is -1"),
        ({"max_tokens": 0}, 400, "max_tokens", "from 1 to 1024"),
        ({"max_tokens": 1024}, 400, "messages", "exceed the model's context of 1024"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "role 'robot'"),
        ({"messages": []}, 400, "messages", "message"),
        ({"extra_body": {"stream": "yes"}}, 400, "stream", "true or false"),
        ({"extra_body": {"threshold": 0.9, "steps": 8}}, 400, "steps", "exclude each other"),
    ],
)
def test_bad_requests_get_an_error_of_the_apis_shape(client, engine, change, status, param, message):
    given = dict(model="tiny", messages=[{"role": "user", "content": "x"}]) | change
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        client.chat.completions.create(**given)
    assert caught.value.status_code == status and caught.value.param == param
    assert caught.value.type == "invalid_request_error" and not engine.is_busy()


def test_what_is_no_request_gets_one_too(url):
    post = lambda **what: httpx.post(f"{url}/completions", **what)
    json_ = {"content-type": "application/json"}
    answers = [
        (post(content=b"{"), 415), (post(content=b"{", headers=json_), 400), (post(json=[1]), 400),
        (post(json={"prompt": "x" * 2**20}), 413), (httpx.get(f"{url}/nothing"), 404),
        (httpx.get(f"{url}/completions"), 405), (post(content=b"[" * 200_000, headers=json_), 400),
    ]  # fmt: skip
    for answer, status in answers:
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_too_many_are_refused_and_a_client_that_leaves_frees_its_place(client, engine, monkeypatch):
    def endless(job, by_block):
        while True:
            time.sleep(0.01)
            yield next(whole(job, by_block))

    whole = generate_module._Job.stream
    monkeypatch.setattr(generate_module._Job, "stream", endless)
    given = dict(model="tiny", prompt="x", stream=True)
    streams = [client.completions.create(**given) for _ in range(3)]  # one is made, two wait
    with pytest.raises(openai.RateLimitError, match="2 answers are waiting"):
        client.completions.create(**given)
    for one in streams:
        one.close()
    monkeypatch.undo()
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            answer = engine.submit([1, 20])
            break
        except Busy:
            time.sleep(0.05)
    assert list(answer)[-1].done


def test_a_failure_in_a_stream_is_said_in_it(client, monkeypatch):
    def fails(job, by_block):
        yield from ()
        raise InputError("the model's logits are not finite")

    monkeypatch.setattr(generate_module._Job, "stream", fails)
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.completions.create(model="tiny", prompt="x", stream=True))
    with pytest.raises(openai.InternalServerError, match="not finite"):
        client.completions.create(model="tiny", prompt="x")


def test_with_a_key_only_those_who_send_it_get_an_answer(engine):
    app = Starlette(routes=[Mount("/v1", create_api(engine, "tiny", "secret"))])
    with TestClient(app) as client:
        get = lambda value: client.get("/v1/models", headers={"authorization": value} if value else {})
        assert get("Bearer secret").json()["data"][0]["id"] == "tiny"
        for value in (None, "Bearer none", "Bearer secret2", "secret", "Bearer \xe9".encode("latin-1")):
            refused = get(value)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
