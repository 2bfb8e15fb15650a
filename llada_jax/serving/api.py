"""The model as an OpenAI-compatible endpoint: /v1/models, /v1/chat/completions and /v1/completions.

Fields of a request that would change the answer and can't be honoured are refused, never ignored. Beside those of the
protocol, every option of the sampler may be given by its name: `extra_body={"threshold": 0.9}` in OpenAI's client.
"""

import dataclasses
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from llada_jax.data.tokenizer import Tokenizer
from llada_jax.fields import InputError
from llada_jax.sampling.prompts import check_turns
from llada_jax.serving.engine import Answer, Busy, Engine
from llada_jax.serving.settings import NAMES
from llada_jax.streams import stream

_LONGEST_BODY = 2**20  # bytes
_PATIENCE = 1.0  # seconds without a word, after which it is looked whether the client is still there
_READ = {
    "model",
    "messages",
    "prompt",
    "stream",
    "stream_options",
    "stop",
    "max_tokens",
    "max_completion_tokens",
    "seed",
}
_WITHOUT_EFFECT = {
    "user",
    "metadata",
    "store",
    "parallel_tool_calls",
    "service_tier",
    "tool_choice",
    "safety_identifier",
}
_ONLY = {  # what these may be, beside null
    "n": 1, "best_of": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False,
    "top_logprobs": 0, "echo": False, "suffix": "", "logit_bias": {}, "tools": [], "functions": [],
    "response_format": {"type": "text"}, "modalities": ["text"],
}  # fmt: skip


class _Refused(Exception):
    """A request that gets an error of the API's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = {429: "requests", 500: "server_error"}.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Style(NamedTuple):
    """How chat and plain completions write the same answer."""

    prefix: str
    whole: str  # the kind of object
    part: str

    def choice(self, text: str, finish: str | None) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.prefix == "chatcmpl" else {"text": text}
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def delta(self, text: str, finish: str | None, first: bool) -> dict[str, Any]:
        if self.prefix != "chatcmpl":
            return self.choice(text, finish)
        role = {"role": "assistant"} if first else {}
        said = {} if finish and not text else {"content": text}
        return {"index": 0, "delta": role | said, "logprobs": None, "finish_reason": finish}


_CHAT = _Style("chatcmpl", "chat.completion", "chat.completion.chunk")
_TEXT = _Style("cmpl", "text_completion", "text_completion")


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A request, understood."""

    answer: Answer
    style: _Style
    prompt_tokens: int
    max_tokens: int
    stops: list[str]
    streams: bool
    usage: bool  # whether a stream ends with it


def create_api(engine: Engine, name: str, key: str | None = None) -> ASGIApp:
    """The application to mount at /v1. name: of the model, as clients write it. key: what they must send."""

    def handler(style: _Style):
        async def handle(request: Request) -> Response:
            body = await _body(request)
            asked = await anyio.to_thread.run_sync(_understand, engine, name, body, style)
            head = {"id": f"{style.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
            if asked.streams:
                lines = _streamed(engine.tokenizer, asked, head | {"object": style.part})
                return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            return JSONResponse(await _whole(request, engine.tokenizer, asked, head | {"object": style.whole}))

        return handle

    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "llada_jax"}

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        _require_model(name, request.path_params["id"])
        return JSONResponse(model)

    routes = [
        Route("/models", models), Route("/models/{id:path}", one_model),
        Route("/chat/completions", handler(_CHAT), methods=["POST"]),
        Route("/completions", handler(_TEXT), methods=["POST"]),
    ]  # fmt: skip
    handlers: dict[Any, Any] = {_Refused: _error, HTTPException: _http_error, Exception: _failure}
    app = Starlette(routes=routes, exception_handlers=handlers)
    return app if key is None else _guarded(app, key)


def _guarded(app: ASGIApp, key: str) -> ASGIApp:
    """Answers those who send the key, in a time that says nothing of how much of theirs is right."""
    wanted = f"Bearer {key}".encode()

    async def guarded(scope, receive, send) -> None:
        if not hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), wanted):
            refused = _Refused(401, "the API key is missing or wrong", code="invalid_api_key")
            answer = JSONResponse(refused.body(), 401, {"WWW-Authenticate": "Bearer"})
            return await answer(scope, receive, send)
        return await app(scope, receive, send)

    return guarded


async def _error(_: Request, error: _Refused) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return await _error(request, _Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


async def _failure(request: Request, error: Exception) -> Response:
    return await _error(request, _Refused(500, f"the server failed: {error}"))


async def _body(request: Request) -> dict[str, Any]:
    """JSON alone: a page of another site can't send that without the browser asking first."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _Refused(415, "the content type must be application/json")
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > _LONGEST_BODY:
            raise _Refused(413, f"the request is longer than {_LONGEST_BODY} bytes")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, f"the request is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise _Refused(400, "the request must be a JSON object")
    return {key: value for key, value in body.items() if value is not None}


def _understand(engine: Engine, name: str, body: dict[str, Any], style: _Style) -> _Asked:
    """Puts the request into the engine's queue."""
    for key, value in body.items():
        if key in _ONLY and value != _ONLY[key]:
            raise _Refused(400, f"{key} must be {json.dumps(_ONLY[key])}; this server has nothing else", key)
        if key not in _READ | _WITHOUT_EFFECT | _ONLY.keys() | set(NAMES) - {"gen_length"}:
            raise _Refused(400, f"unknown field {key}", key)
    _require_model(name, _typed(body, "model", str, name))
    streams, stops = _typed(body, "stream", bool, False), _stops(body)
    usage = bool(_typed(body, "stream_options", dict, {}).get("include_usage"))
    settings = engine.settings | {key: body[key] for key in NAMES if key in body}
    if {"threshold", "factor", "entropy_bound", "steps"} & body.keys():  # one rule takes the place of another
        for key in {"threshold", "factor", "entropy_bound", "steps"} - body.keys():
            settings.pop(key, None)
    limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    most = _typed(body, limit, int, settings["gen_length"])
    if not 1 <= most <= engine.config.max_sequence_length:
        raise _Refused(400, f"{limit} must be from 1 to {engine.config.max_sequence_length}, it is {most}", limit)
    try:
        ids = _prompt(engine.tokenizer, body, style)
        block = settings.get("block_length")
        settings["gen_length"] = -(-most // block) * block if type(block) is int and block > 0 else most
        seed = _typed(body, "seed", int, None)
        key = None if seed is None else stream(seed % 2**32, "sample")
        answer = engine.submit(ids, settings, every="block", key=key)
    except InputError as error:
        first = str(error).split()[0].strip(":")
        param = first if first in NAMES else "messages" if style is _CHAT else "prompt"
        code = "context_length_exceeded" if "the model's context" in str(error) else None
        raise _Refused(400, str(error), param, code) from None
    except Busy as error:
        raise _Refused(429, str(error), code="rate_limit_exceeded") from None
    return _Asked(answer, style, len(ids), most, stops, streams, usage)


def _require_model(name: str, asked: str) -> None:
    if asked != name:
        raise _Refused(404, f"the model {asked!r} does not exist; this server has {name!r}", "model", "model_not_found")


def _typed(body: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = body.get(key, default)
    if value is not default and type(value) is not kind:
        words = {str: "a string", int: "a whole number", bool: "true or false", dict: "an object"}
        raise _Refused(400, f"{key} must be {words[kind]}", key)
    return value


def _stops(body: dict[str, Any]) -> list[str]:
    stops = body.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(s, str) and s for s in stops):
        raise _Refused(400, "stop must be a string that is not empty, or a list of at most 4", "stop")
    return stops


def _prompt(tokenizer: Tokenizer, body: dict[str, Any], style: _Style) -> list[int]:
    if style is _CHAT:
        return tokenizer.encode_chat(check_turns(_plain(body.get("messages")), "messages"))
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt):
        return prompt
    if not isinstance(prompt, str):
        raise InputError("prompt must be one string, or a list of token ids")
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def _plain(messages: Any) -> Any:
    """Messages whose contents are strings: clients may send them as lists of parts, and call a system a developer."""
    if not isinstance(messages, list):
        return messages
    plain = []
    for message in messages:
        if isinstance(message, dict):
            content = message.get("content")
            if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
                content = "".join(str(part.get("text", "")) for part in content)
            role = "system" if message.get("role") == "developer" else message.get("role")
            message = {"role": role, "content": content}
        plain.append(message)
    return plain


class _Text(NamedTuple):
    """What is certain of an answer: its text, the tokens in that, and why it ended; None: it goes on."""

    text: str
    tokens: int
    finish: str | None


def _text(tokenizer: Tokenizer, asked: _Asked, tokens: list[int], done: bool) -> _Text:
    """The text of an answer's tokens up to the first mask, end or stop word; what may yet change is left out."""
    tokens = tokens[: asked.max_tokens]
    ends = [i for i, id in enumerate(tokens) if id in (tokenizer.mask_id, tokenizer.eos_id, tokenizer.eot_id)]
    known = tokens[: ends[0]] if ends else tokens
    finish = "stop" if ends and tokens[ends[0]] != tokenizer.mask_id else "length" if done or not ends else None
    text = tokenizer.decode(known)
    if finish is None:
        text = text.rstrip("\ufffd")  # bytes of a character that is not complete
    found = [at for at in map(text.find, asked.stops) if at >= 0]
    if found:
        return _Text(text[: min(found)], len(known), "stop")
    if finish is None:  # a stop word may have begun
        text = text[: len(text) - max((len(_overlap(text, stop)) for stop in asked.stops), default=0)]
    return _Text(text, len(known), finish)


def _overlap(text: str, stop: str) -> str:
    """The longest beginning of `stop` that `text` ends with."""
    return next((stop[:n] for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), "")


async def _texts(tokenizer: Tokenizer, asked: _Asked) -> AsyncIterator[_Text | None]:
    """What is certain, after every block; the last one has a `finish`. None: nothing new for a while."""
    updates = asked.answer.updates(_PATIENCE)
    ended = object()
    try:
        while (progress := await anyio.to_thread.run_sync(next, updates, ended)) is not ended:
            if progress is None:
                yield None
                continue
            text = _text(tokenizer, asked, progress.tokens.tolist(), progress.done)  # type: ignore[attr-defined]
            yield text
            if text.finish:
                return
        raise _Refused(500, "the server is shutting down")
    except InputError as error:
        raise _Refused(500, str(error)) from None
    finally:
        asked.answer.cancel()


def _usage(asked: _Asked, tokens: int) -> dict[str, int]:
    total = asked.prompt_tokens + tokens
    return {"prompt_tokens": asked.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}


async def _whole(request: Request, tokenizer: Tokenizer, asked: _Asked, head: dict[str, Any]) -> dict[str, Any]:
    last = _Text("", 0, None)
    async for text in _texts(tokenizer, asked):
        last = text or last
        if await request.is_disconnected():
            asked.answer.cancel()
    return head | {"choices": [asked.style.choice(last.text, last.finish)], "usage": _usage(asked, last.tokens)}


async def _streamed(tokenizer: Tokenizer, asked: _Asked, head: dict[str, Any]) -> AsyncIterator[str]:
    line = lambda value: f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
    sent, tokens, first = "", 0, True
    try:
        async for text in _texts(tokenizer, asked):
            if text is None:
                yield ": waiting\n\n"
                continue
            new, tokens = text.text[len(sent) :], text.tokens
            if new or first:
                yield line(head | {"choices": [asked.style.delta(new, None, first)]})
                sent, first = text.text, False
            if text.finish:
                yield line(head | {"choices": [asked.style.delta("", text.finish, False)]})
        if asked.usage:
            yield line(head | {"choices": [], "usage": _usage(asked, tokens)})
        yield "data: [DONE]\n\n"
    except _Refused as error:
        yield line(error.body())
