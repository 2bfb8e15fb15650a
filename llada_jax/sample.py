"""Samples from a checkpoint: completion, infilling of [MASK] spans, replies of fine-tuned models; one or many.

python -m llada_jax.sample --checkpoint=runs/tiny --prompt='床前明月光，' --gen_length=8
python -m llada_jax.sample --checkpoint=DIR --prompt='[MASK*5]，疑是地上霜。' --trajectory
python -m llada_jax.sample --checkpoint=DIR --input=prompts.jsonl --output=answers.jsonl --cache=dual --threshold=0.9

A line of --input is a text, {"prompt": text}, {"messages": [...]} or {"text": text with [MASK*N]}; "-" is standard
input. Every finished answer is on the disk at once; the same command continues where it was stopped.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from llada_jax import cli
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.interop.workdir import load_config
from llada_jax.model.quantize import FEW_BITS
from llada_jax.parallel import join, processes
from llada_jax.parallel.mesh import inference_mesh
from llada_jax.sampling import batches, options
from llada_jax.storage.buckets import path_of
from llada_jax.streams import stream

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The workdir of a training run, or a published checkpoint.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "The prompt; may be given several times. [MASK] or [MASK*N]: masks.")
_INPUT = flags.DEFINE_string("input", None, "Instead: a file of prompts, a JSON value a line; - is standard input.")
_OUTPUT = flags.DEFINE_string("output", None, "With --input: the file of answers; default: standard output.")
_GEN_LENGTH = flags.DEFINE_integer("gen_length", None, "Tokens to append; default 32, or none if the prompt has masks.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows that are sampled at once.", lower_bound=1, upper_bound=2**16)
_CHAT = flags.DEFINE_enum(
    "chat", "auto", ["auto", "yes", "no"], "Apply the chat template; auto: if trained on dialogues."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling noise.", lower_bound=0, upper_bound=2**32 - 1)
_TENSOR = flags.DEFINE_integer("tensor", 0, "Devices that a copy of the model is split over; 0: as few as hold it.")
_ADAPTER = flags.DEFINE_multi_string("adapter", [], "Directory of a PEFT adapter of the model; several add up.")
_QUANTIZE = flags.DEFINE_enum("quantize", None, list(FEW_BITS), "Hold the weights of the blocks in few bits.")
_TRAJECTORY = flags.DEFINE_bool("trajectory", False, "Show the text after every pass.")
options.define_flags()


def main(_argv: list[str]) -> None:
    with processes.all_or_none():
        workdir, tokenizer, is_chat = _open()
        options.Options(**options.of_flags())
        todo, rest = _requests(tokenizer, is_chat)
    given = options.of_flags() | {"key": stream(_SEED.value, "sample")}
    gen_length = 32 if _GEN_LENGTH.value is None else _GEN_LENGTH.value
    with contextlib.ExitStack() as stack:
        mesh = inference_mesh(hf.load_config(workdir), _TENSOR.value)
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        model = hf.load(workdir, mesh=mesh, adapter=_ADAPTER.value, quantize=_QUANTIZE.value)
        show = stack.enter_context(_printer(tokenizer, len(todo) + rest, rest, todo))
        requests = [request for _, request in todo]
        batches.answer_all(
            model, tokenizer, requests, given, gen_length=gen_length, batch_size=_BATCH_SIZE.value, on_answer=show
        )


def _open() -> tuple[Path, Tokenizer, bool]:
    """(directory of the model, its tokenizer, whether prompts are messages)."""
    if not _CHECKPOINT.value:
        raise InputError("--checkpoint is needed: the --workdir of a training run, or a published checkpoint")
    if bool(_PROMPT.value) == bool(_INPUT.value) or not all(_PROMPT.value):
        raise InputError("give --prompt, which must not be empty, or --input")
    if _OUTPUT.value and not _INPUT.value:
        raise InputError("--output goes with --input")
    if _GEN_LENGTH.value is not None and _GEN_LENGTH.value < 0:
        raise InputError(f"--gen_length={_GEN_LENGTH.value} is negative")
    workdir = path_of(_CHECKPOINT.value)
    config = load_config(workdir)
    objective = config.get("objective", {}).get("name")  # a published model tells of none, also when converted
    if objective == "autoregressive":
        raise InputError(f"{workdir}: holds an autoregressive control; the diffusion sampler can't use it")
    tokenizer = load_tokenizer(hf.tokenizer_directory(workdir))
    return workdir, tokenizer, hf.is_instruct(workdir) if _CHAT.value == "auto" else _CHAT.value == "yes"


def _requests(tokenizer: Tokenizer, is_chat: bool) -> tuple[list[tuple[Any, batches.Request]], int]:
    """(value and request of each prompt that is not answered yet, how many are)."""
    if not _INPUT.value:
        values: list[tuple[Any, batches.Request]] = [
            (prompt, batches.make_request(tokenizer, i, prompt, f"--prompt={prompt!r}", is_chat, _GEN_LENGTH.value))
            for i, prompt in enumerate(_PROMPT.value)
        ]
        return values, 0
    values = list(batches.read_requests(_INPUT.value, tokenizer, is_chat, _GEN_LENGTH.value))
    done = batches.answered(Path(_OUTPUT.value)) if _OUTPUT.value else set()
    return [(value, request) for value, request in values if request.number not in done], len(done)


@contextlib.contextmanager
def _printer(tokenizer: Tokenizer, total: int, done: int, todo):
    """What takes the answers: prints them, or writes them as lines of JSON with a progress bar."""
    first, values = processes.is_first(), {request.number: value for value, request in todo}
    if not _INPUT.value:
        yield lambda answer: _print(tokenizer, answer) if first else None
        return
    began, tokens = time.monotonic(), 0
    with contextlib.ExitStack() as stack:
        file = (
            stack.enter_context(open(_OUTPUT.value, "a", encoding="utf-8")) if _OUTPUT.value and first else sys.stdout
        )
        bar = stack.enter_context(tqdm(total=total, initial=done, unit="answer", disable=not first))

        def write(answer: batches.Answer) -> None:
            nonlocal tokens
            tokens += len(_written(tokenizer, answer))
            if first:
                line = {"index": answer.request.number, "request": values[answer.request.number], "answer": answer.text}
                file.write(json.dumps(line | _facts(tokenizer, answer), ensure_ascii=False) + "\n")
                file.flush()
                if _OUTPUT.value:
                    os.fsync(file.fileno())
            bar.update(1)
            bar.set_postfix_str(f"{tokens / (time.monotonic() - began):.1f} tokens/s")

        yield write


def _written(tokenizer: Tokenizer, answer: batches.Answer) -> np.ndarray:
    """The generated tokens of an answer that are no end of text."""
    row = np.asarray(answer.stats.tokens)[answer.row]
    return row[(np.asarray(answer.stats.step)[answer.row] >= 0) & (row != tokenizer.eos_id)]


def _facts(tokenizer: Tokenizer, answer: batches.Answer) -> dict[str, int]:
    return {
        "tokens": len(_written(tokenizer, answer)), "full_passes": answer.stats.full_passes,
        "window_passes": answer.stats.window_passes,
    }  # fmt: skip


def _print(tokenizer: Tokenizer, answer: batches.Answer) -> None:
    if _TRAJECTORY.value:
        for i, states in enumerate(answer.stats.trajectory(), start=1):
            pieces = (tokenizer.piece(token) for token in states[answer.row, answer.columns])
            print(f"{i:4d} {''.join(pieces)}", file=sys.stderr)
    print(answer.text)


def command() -> None:
    """The console script llada-sample."""
    join.define_flags()
    cli.run(join.joined(main))


if __name__ == "__main__":
    command()
