"""The web page: chat and infilling, drawn while they are denoised, replayed with a slider, all without the internet."""

import html
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported; it would ask its maker for news

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from llada_jax.fields import InputError
from llada_jax.sampling.denoise import CACHES
from llada_jax.sampling.prompts import encode_prompt, reply_text
from llada_jax.sampling.rules import REMASKING
from llada_jax.serving.engine import Answer, Busy, Engine, Progress
from llada_jax.serving.pieces import Piece, pieces
from llada_jax.serving.settings import help_of

_FRAME = 0.06  # seconds from one drawing to the next, at least
_LIMITS = (0.3, 0.6, 0.9)  # of probability: red, amber, teal below; then plain
_RULES = {
    "one token a pass": None, "a number of passes": "steps", "probability threshold": "threshold",
    "factor": "factor", "entropy bound": "entropy_bound",
}  # fmt: skip
_LEGEND = (
    "<div class=llada><p class=legend>Probability of a token when it was committed: <span class='t p0'>below 0.3</span>"
    "<span class='t p1'>below 0.6</span><span class='t p2'>below 0.9</span><span class=t>surer</span> "
    "<span class='t m'>▒▒</span>a mask</p></div>"
)
_EMPTY = "<p class=hint>{}</p>"


class Past(NamedTuple):
    """A dialogue so far: its messages, and the markup of its turns."""

    messages: list[dict[str, str]]
    turns: list[str]


class Page:
    """What the page's buttons do. A user is known by the hash of their session."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._running: dict[str, Answer] = {}

    def chat(self, request: gr.Request, text: str, past: Past | None, *values) -> Iterator[tuple]:
        """Sends a message; yields (text box, dialogue, past) while the answer is made."""
        past = past or Past([], [])
        if not text.strip():
            yield text, _log(past), past
            return
        asked = f"<div class=user>{html.escape(text.strip())}</div>"
        messages = [*past.messages, {"role": "user", "content": text.strip()}]
        try:
            ids = self.engine.tokenizer.encode_chat(messages)
            answer = self.engine.submit(ids, self._settings(*values))
        except (InputError, Busy) as error:
            yield text, _log(past, f"<div class=turn>{asked}{_notice(error)}</div>"), past
            return
        last, turn = None, ""
        for progress, markup in self._drawn(answer, request):
            last, turn = progress, f"<div class=turn>{asked}{markup}</div>"
            yield "", _log(past, turn), past
        if last is None or not last.done:  # stopped, or failed
            yield text, _log(past, turn), past
            return
        reply = {"role": "assistant", "content": reply_text(self.engine.tokenizer, last.tokens)}
        past = Past([*messages, reply], [*past.turns, turn])
        yield "", _log(past), past

    def fill(self, request: gr.Request, text: str, *values) -> Iterator[str]:
        """Fills the masks of a text; yields its markup."""
        try:
            settings = self._settings(*values)
            for name in ("gen_length", "block_length", "stop_at_eos"):  # of answers; the text is one block
                settings.pop(name, None)
            ids = encode_prompt(self.engine.tokenizer, text)
            if self.engine.tokenizer.mask_id not in ids:
                raise InputError("the text has no mask; write [MASK] where a token is missing, [MASK*5] for five")
            answer = self.engine.submit(ids, settings, fill=True)
        except (InputError, Busy) as error:
            yield _log(Past([], []), _notice(error))
            return
        for _, markup in self._drawn(answer, request, whole=True):
            yield _log(Past([], []), f"<div class=turn>{markup}</div>")

    def stop(self, request: gr.Request) -> None:
        """Stops the answer that this user waits for."""
        if answer := self._running.get(request.session_hash or ""):
            answer.cancel()

    def _drawn(
        self, answer: Answer, request: gr.Request, whole: bool = False
    ) -> Iterator[tuple[Progress | None, str]]:  # fmt: skip
        """What an answer has come to, with its markup; the last one can be replayed, or says why there is no more."""
        user = request.session_hash or ""
        self._running[user] = answer
        last, drawn, said = None, 0.0, ""
        try:
            for progress in answer.updates(0.25):
                if progress is None and last is None and said != _waiting(answer.before()):
                    said = _waiting(answer.before())
                    yield None, f"<div class=answer><span class=hint>{said}</span></div>"
                last = progress or last
                if last and time.monotonic() - drawn > _FRAME:
                    drawn = time.monotonic()
                    yield last, self._markup(last, whole)
        except InputError as error:
            yield None, _notice(error)
            return
        finally:
            self._running.pop(user, None)
        ends = "" if last and last.done else "<p class=facts>stopped; the dialogue goes on without this message</p>"
        if last is None:
            yield None, ends
            return
        facts = f"<p class=facts>{last.speed()}</p>"
        yield last, self._markup(last, whole, is_final=True) + (ends or facts)

    def _markup(self, progress: Progress, whole: bool, is_final: bool = False) -> str:
        p = progress
        shown = pieces(self.engine.tokenizer, p.tokens, p.probability, p.step, whole)
        newest = -2 if is_final else p.passes - 1
        tokens = "".join(_token(piece, newest) for piece in shown) or "<span class=hint>an empty answer</span>"
        markup = f"<div class=answer>{tokens}</div>"
        if is_final:
            markup += (
                "<div class=replay><button type=button onclick='lladaPlay(this)'>Play</button><input type=range min=0 "
                f"max={p.passes} value={p.passes} aria-label='replay' oninput='lladaReplay(this)'>"
                f"<output>pass {p.passes} of {p.passes}</output></div>"
            )
        return markup

    def _settings(self, length, block, rule, value, cache, temperature, guidance, ranking, stop_at_eos, ends_last):
        """The settings that the page's controls stand for."""
        found: dict[str, Any] = {
            "gen_length": length, "cache": cache, "temperature": temperature, "cfg_scale": guidance,
            "remasking": ranking, "stop_at_eos": stop_at_eos, "confidence_eos_eot_inf": ends_last,
        }  # fmt: skip
        if block:
            found["block_length"] = block
        if (name := _RULES[rule]) and value is None:
            raise InputError(f"the rule {rule!r} needs a value")
        elif name:
            found[name] = int(value) if name == "steps" and value == int(value) else value
        return found


def _token(piece: Piece, newest: int) -> str:
    text, p, step = piece
    if p is None:
        return "<span class='t m'>▒</span>"
    if step < 0:
        return f"<span class='t given' data-s=-1>{html.escape(text)}</span>"
    level = sum(p >= limit for limit in _LIMITS)
    fresh = " new" if step == newest else ""
    return (
        f"<span class='t p{level}{fresh}' data-s={step} title='pass {step + 1}, probability {p:.2f}'>"
        f"{html.escape(text)}</span>"
    )


def _log(past: Past, now: str = "") -> str:
    inner = "".join(past.turns) + now
    return f"<div class=llada>{inner or _EMPTY.format('The answer appears here while it is denoised.')}</div>"


def _cut(past: Past | None) -> tuple[Past, str]:
    """Without the last message and its answer."""
    past = Past(past.messages[:-2], past.turns[:-1]) if past else Past([], [])
    return past, _log(past)


def _notice(error: Exception) -> str:
    return f"<div class=notice role=alert>{html.escape(str(error))}</div>"


def _waiting(before: int) -> str:
    return f"waiting: {before} before you" if before else "begins; the first answer of a length is compiled"


def create_page(engine: Engine, name: str, is_instruct: bool) -> gr.Blocks:
    """The page for a model of that name; `serve` shows it."""
    page = Page(engine)
    with gr.Blocks(title=f"{name} · llada_jax", analytics_enabled=False) as blocks:
        hint = "" if is_instruct else "This model was not trained on dialogues: expect continuations, or fill masks."
        gr.Markdown(f"# {html.escape(name)}\n{hint}")
        past = gr.State(None)
        with gr.Tabs(selected="chat" if is_instruct else "fill"):
            with gr.Tab("Chat", id="chat"):
                log = gr.HTML(_log(Past([], [])), elem_id="dialogue", min_height=160)
                box = gr.Textbox(placeholder="A message", show_label=False, lines=1, max_lines=8, elem_id="message")
                with gr.Row():
                    send = gr.Button("Send", variant="primary", min_width=64, size="md")
                    stop = gr.Button("Stop", min_width=64, size="md")
                    undo = gr.Button("Undo", min_width=64, size="md")
                    new = gr.Button("New", min_width=64, size="md")
            with gr.Tab("Fill masks", id="fill"):
                text = gr.Textbox(
                    "It was the [MASK*3] of times.", label="Text", lines=4, elem_id="text",
                    info="[MASK] stands for one missing token, [MASK*5] for five; masks at the end continue a text.",
                )  # fmt: skip
                with gr.Row():
                    fill = gr.Button("Fill", variant="primary", min_width=64, size="md")
                    stop_fill = gr.Button("Stop", min_width=64, size="md")
                filled = gr.HTML(_log(Past([], [])), elem_id="filled", min_height=120)
        gr.HTML(_LEGEND)
        with gr.Accordion("Settings", open=False):
            controls = _controls(engine)
        gr.on(
            [box.submit, send.click], page.chat, [box, past, *controls], [box, log, past], concurrency_limit=None,
            show_progress="hidden", api_name="chat",
        )  # fmt: skip
        undo.click(_cut, past, [past, log], api_name="undo")
        new.click(lambda: (None, _log(Past([], []))), None, [past, log], api_name="new")
        fill.click(
            page.fill, [text, *controls], filled, concurrency_limit=None, show_progress="hidden", api_name="fill"
        )
        gr.on([stop.click, stop_fill.click], page.stop, queue=False, api_name="stop")
        blocks.unload(page.stop)
    return blocks


def _controls(engine: Engine) -> list[Any]:
    """In the order of Page._settings."""
    given, longest = engine.settings, engine.config.max_sequence_length
    rule = next((label for label, name in _RULES.items() if name in given), next(iter(_RULES)))
    with gr.Row():
        length = gr.Number(
            given["gen_length"], label="Answer length", precision=0, minimum=1, maximum=longest,
            info=f"Tokens of an answer, at most; with the dialogue at most {longest}.",
        )  # fmt: skip
        block = gr.Number(
            given.get("block_length"), label="Block length", precision=0,
            info="Blocks are finished one after the other; must divide the length. Short ones go from left to right.",
        )  # fmt: skip
    with gr.Row():
        name = gr.Dropdown(
            list(_RULES), value=rule, label="Commit rule",
            info="How many tokens a pass commits. A threshold of 0.9 is fast and rarely worse.",
        )  # fmt: skip
        value = gr.Number(
            given.get(_RULES[rule] or "", 0.9), label="Its value",
            info="Passes in all (a multiple of the blocks), or the threshold, factor or bound.",
        )  # fmt: skip
    with gr.Row():
        temperature = gr.Slider(
            0, 2, given.get("temperature", 0.0), step=0.05, label="Temperature",
            info="Noise of the choice; 0: always the most probable token.",
        )  # fmt: skip
        guidance = gr.Slider(
            0, 4, given.get("cfg_scale", 0.0), step=0.1, label="Guidance",
            info="Classifier-free guidance: how far the prompt is stressed; 0: none. Twice the work.",
        )  # fmt: skip
    with gr.Row():
        cache = gr.Dropdown(
            list(CACHES), value=given.get("cache", "none"), label="Cache",
            info="What keys and values are kept between passes: none is exact, dual the fastest.",
        )  # fmt: skip
        ranking = gr.Dropdown(
            list(REMASKING), value=given.get("remasking", "low_confidence"), label="Ranking",
            info=f"{help_of('remasking')}.".capitalize(),
        )  # fmt: skip
    with gr.Row():
        stop_at_eos = gr.Checkbox(
            given.get("stop_at_eos", False),
            label="Stop at the end",
            info="No pass for blocks behind the end of the text.",
        )
        ends_last = gr.Checkbox(
            given.get("confidence_eos_eot_inf", False),
            label="Ends last",
            info="Ends of text are committed last: longer answers.",
        )
    return [length, block, name, value, cache, temperature, guidance, ranking, stop_at_eos, ends_last]


def serve(
    blocks: gr.Blocks, host: str, port: int, *, share: bool = False, routes: list[Any] | None = None, local: bool = True
) -> tuple[str, str | None]:
    """Starts the server in threads of its own; returns the address of the page, and the shared one.

    routes: others that the same server has. local: whether it has no name but this machine's own; then a page of
    another site whose name is made to point here (DNS rebinding) gets no answer.
    """
    own = ["127.0.0.1", "localhost", "[::1]"] if local and not share else ["*"]
    names = Middleware(TrustedHostMiddleware, allowed_hosts=own, www_redirect=False)
    here = Path(__file__)
    blocks.queue(max_size=64, api_open=True)
    _, url, shared = blocks.launch(
        server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, ssr_mode=False,
        footer_links=[], app_kwargs={"routes": routes or [], "middleware": [names]},
        css=here.with_suffix(".css").read_text(), head=f"<script>{here.with_suffix('.js').read_text()}</script>",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
            block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400"
        ),
    )  # fmt: skip
    return url, shared
