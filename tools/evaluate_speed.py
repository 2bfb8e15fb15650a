"""`tools/benchmark.py evaluate`: multiple choice by our batches, and by the official loop in PyTorch on equal weights.

The official loop (the authors' evaluation script) scores one choice after the other: mc_num / 8 batches of 8 rows,
logits of every column.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from llada_jax.model.config import PRESETS, ModelConfig

SHAPE: ModelConfig = dataclasses.replace(PRESETS["small"], max_sequence_length=256)
MC_NUM, MINI_BATCH = 128, 8
_PROMPT = 60  # tokens
SETS = {
    "choices of 1 to 6 tokens": (1, 6),
    "choices of 8 to 14 tokens": (8, 14),
    "choices of 20 to 30 tokens": (20, 30),
}

Question = tuple[list[int], list[list[int]]]  # prompt, choices


def questions(c: ModelConfig, shortest: int, longest: int, count: int, prompt: int = _PROMPT) -> list[Question]:
    """Four choices each, of random tokens and lengths."""
    random = np.random.default_rng(0)
    ids = lambda length: random.integers(7, c.vocab_size, length).tolist()
    return [(ids(prompt), [ids(random.integers(shortest, longest + 1)) for _ in range(4)]) for _ in range(count)]


def ours(model, asked: list[Question], stop_at: float | None = None) -> tuple[np.ndarray, int]:
    """(bounds [questions, 4], draws that they took; of a choice that is enumerated, its masks)."""
    import jax

    from llada_jax.evaluation import likelihood
    from llada_jax.evaluation.questions import Choice, bounds

    pairs = [pair for question in asked for pair in likelihood.read_pairs(model.config, *question)[0]]
    choices, options = [Choice(pair, pair.question) for pair in pairs], dict(mc_num=MC_NUM, mini_batch=MINI_BATCH)
    found, draws = np.zeros(len(choices)), 0
    for i, bound, used in bounds(model, choices, jax.random.key(0), **options, stop_at=stop_at):
        found[i] = bound
        draws += used
    return found.reshape(-1, 4), draws


def official(model, asked: list[Question]) -> tuple[np.ndarray, int]:
    """The same by the official loop; model: of tools/torch_step.py."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)

    def bound(prompt: list[int], answer: list[int]) -> float:
        P, A = len(prompt), len(answer)
        row_RS = torch.tensor([prompt + answer]).repeat(MINI_BATCH, 1)
        losses = []
        for _ in range(MC_NUM // MINI_BATCH):
            k = torch.randint(1, A + 1, (), generator=generator)
            count_R = (
                torch.linspace(float(k), float(k + (MINI_BATCH - 1) * (A / MINI_BATCH)), MINI_BATCH).round().long()
            )
            count_R = (count_R - 1) % A + 1
            order_RA = torch.rand(MINI_BATCH, A, generator=generator).argsort(1).argsort(1)
            masked_RS = F.pad(order_RA < count_R[:, None], (P, 0))
            logits_RSV = model(torch.where(masked_RS, model.c.mask_token_id, row_RS))
            ratio_RS = (count_R / A)[:, None].expand_as(row_RS)
            ce = F.cross_entropy(logits_RSV[masked_RS], row_RS[masked_RS], reduction="none") / ratio_RS[masked_RS]
            losses.append(float(ce.sum()) / MINI_BATCH)
        return -sum(losses) / len(losses)

    with torch.inference_mode():
        bounds = [[bound(prompt, answer) for answer in answers] for prompt, answers in asked]
    return np.asarray(bounds), MC_NUM * sum(len(answers) for _, answers in asked)


def models(c: ModelConfig, torch: bool) -> tuple[Any, Any]:
    """A random model, and one of tools/torch_step.py with its weights."""
    import jax

    from llada_jax.model.transformer import Transformer

    model = jax.jit(Transformer, static_argnums=0)(c, jax.random.key(0))
    if not torch:
        return model, None
    from torch import from_numpy
    from torch import set_num_threads as use_threads

    from llada_jax.tools.torch_step import Model

    use_threads(os.cpu_count() or 1)
    copy, array = Model(c).eval(), lambda x: from_numpy(np.array(x))
    state = {"wte.weight": array(model.wte[...]), "ln_f.weight": array(model.ln_f[...])}
    state["ff_out.weight"] = array(model.head[...])
    for i in range(c.n_layers):
        for name, parameter in copy.blocks[i].named_parameters():
            own = getattr(model.blocks, name.removesuffix(".weight"))[...][i]
            state[f"blocks.{i}.{name}"] = array(own).reshape(parameter.shape)
    copy.load_state_dict(state)
    return model, copy


def measure(torch: bool, runs: int, count: int, wait_until_idle: Callable[[], object]) -> None:
    """Prints the table: medians over `runs` of each program, the programs in turn."""
    model, copy = models(SHAPE, torch)
    programs: dict[str, Callable[[list[Question]], tuple[np.ndarray, int]]] = {
        "batches": lambda asked: ours(model, asked),
        "batches, stop_at 0.9999": lambda asked: ours(model, asked, 0.9999),
    }
    if torch:
        programs = {"PyTorch, official loop": lambda asked: official(copy, asked)} | programs
    print(f"8 layers, d 512, float32; {count} questions, prompt {_PROMPT}, 4 choices, mc_num {MC_NUM}; {runs} runs")
    for name, lengths in SETS.items():
        asked = questions(SHAPE, *lengths, count)
        seconds: dict[str, list[float]] = {program: [] for program in programs}
        found: dict[str, tuple[np.ndarray, int]] = {}
        for run in range(runs + 1):
            for program, score in programs.items():
                wait_until_idle()
                start = time.perf_counter()
                found[program] = score(asked)
                if run:  # the first one compiles
                    seconds[program].append(time.perf_counter() - start)
        print(f"\n**{name}**\n\n| | s | draws | times as fast | same winner |\n" + "|---" * 5 + "|")
        base = next(iter(programs))
        for program, (bounds, draws) in found.items():
            median = statistics.median(seconds[program])
            same = np.mean(bounds.argmax(1) == found[base][0].argmax(1))
            ratio = statistics.median(seconds[base]) / median
            print(f"| {program} | {median:.2f} | {draws:,} | {ratio:.2f} | {same:.0%} |")
