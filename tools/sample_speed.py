"""`tools/benchmark.py sample`: completions of random prompts by each cache, and by the official rule in PyTorch.

Every program is a process of its own; they run in turn, one completion each. CPU seconds count all threads.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from llada_jax.model.config import PRESETS, ModelConfig

# 8 layers, d 512: the shape of the figures that other samplers were measured with.
SHAPE: ModelConfig = dataclasses.replace(
    PRESETS["small"], n_layers=8, d_model=512, n_heads=8, n_kv_heads=8, mlp_hidden_size=1536, vocab_size=8192,
    embedding_size=8192, max_sequence_length=1024,
)  # fmt: skip
_RAGGED = (32, 96, 160, 224, 288, 352, 416, 512)


@dataclasses.dataclass(frozen=True)
class Case:
    """One completion, or several one after the other. passes: steps in all."""

    group: str
    name: str
    prompts: tuple[int, ...]  # their lengths
    gen_length: int
    steps: int
    cache: str = "none"
    program: str = "jax"
    one_by_one: bool = False

    @property
    def tokens(self) -> int:
        return len(self.prompts) * self.gen_length


def cases(torch: bool) -> list[Case]:
    """The first of each group is what the others are compared with."""
    short, long, many = "prompt 32, 128 tokens", "prompt 512, 256 tokens", "8 prompts of 32 to 512, 128 tokens each"
    rows = [Case(short, f"cache {cache}", (32,), 128, 128, cache) for cache in ("none", "prefix", "dual", "two_block")]
    found = [Case(short, "PyTorch, official rule", (32,), 128, 128, program="torch")] * torch + rows
    found += [Case(long, "cache none", (512,), 256, 256)]
    for steps, what in ((256, ""), (88, ", 2.9 tokens a step")):
        found += [Case(long, f"cache {cache}{what}", (512,), 256, steps, cache) for cache in ("dual", "two_block")]
    found += [Case(long, "PyTorch, official rule", (512,), 256, 256, program="torch")] * torch
    for cache in ("dual", "two_block"):
        found += [
            Case(many, f"cache {cache}, {how}", _RAGGED, 128, 128, cache, one_by_one=how == "one by one")
            for how in ("one by one", "as one batch")
        ]
    return found


def work(name: str) -> None:
    """A child process: a case's number as a line of standard input, its seconds as a line of standard output."""
    all_cases = cases(torch=True)
    run = _jax() if name == "jax" else _torch()
    warm: set[tuple] = set()
    for line in iter(sys.stdin.readline, ""):
        case = all_cases[int(line)]
        if (key := (case.prompts, case.cache, case.one_by_one)) not in warm:
            warm.add(key)
            run(dataclasses.replace(case, steps=case.gen_length // 32))  # the same program: steps are traced
        wall, cpu = time.perf_counter(), time.process_time()
        passes = run(case)
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(seconds | passes), flush=True)


def _prompts(case: Case) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(7, SHAPE.vocab_size, length).tolist() for length in case.prompts]


def _jax() -> Callable[[Case], dict[str, Any]]:
    import jax

    from llada_jax.model.transformer import Transformer
    from llada_jax.sampling.cache import prepare
    from llada_jax.sampling.generate import generate

    weights: Any = prepare(jax.jit(Transformer, static_argnums=0)(SHAPE, jax.random.key(0)))

    def run(case: Case) -> dict[str, Any]:
        prompts = _prompts(case)
        full = window = 0
        for batch in [[p] for p in prompts] if case.one_by_one else [prompts]:
            tokens, stats = generate(
                weights, batch, gen_length=case.gen_length, steps=case.steps, block_length=32, cache=case.cache,
                return_stats=True,
            )  # fmt: skip
            jax.block_until_ready(tokens)
            full, window = full + stats.full_passes, window + stats.window_passes
        return {"full": full, "window": window}

    return run


def _torch() -> Callable[[Case], dict[str, Any]]:
    import torch

    from llada_jax.tools.torch_sample import Sampler

    sampler = Sampler(SHAPE, threads=os.cpu_count() or 1)

    def run(case: Case) -> dict[str, Any]:
        sampler(torch.tensor(_prompts(case)), case.gen_length, case.steps, 32)
        return {"full": case.steps, "window": 0}

    return run


def measure(torch: bool, runs: int, child: Callable[[str], subprocess.Popen], wait_until_idle: Callable[[], object]):
    """Prints the table: medians over `runs` of each case, the cases in turn, and the least and largest ratio."""
    numbered = [(i, case) for i, case in enumerate(cases(torch=True)) if torch or case.program == "jax"]
    children = {name: child(name) for name in sorted({case.program for _, case in numbered})}
    found: dict[int, list[dict[str, Any]]] = {i: [] for i, _ in numbered}
    for _ in range(runs):
        for i, case in numbered:
            process = children[case.program]
            assert process.stdin and process.stdout
            wait_until_idle()
            try:
                print(i, file=process.stdin, flush=True)
                found[i].append(json.loads(process.stdout.readline()))
            except (ValueError, BrokenPipeError):
                sys.exit(process.wait() or 1)  # it said why
    for process in children.values():
        process.communicate()
    print(f"8 layers, d 512, vocabulary 8192, float32, blocks of 32; medians of {runs} runs on {os.cpu_count()} CPUs")
    group = ""
    for i, case in numbered:
        if case.group != group:
            group, base = case.group, found[i]
            print(f"\n**{group}**\n")
            print("| | s | CPU s | full passes | window passes | tokens/s | times as fast |\n" + "|---" * 7 + "|")
        median = {name: statistics.median(run[name] for run in found[i]) for name in found[i][0]}
        ratios = [b["wall"] / own["wall"] for own, b in zip(found[i], base, strict=True)]
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if runs > 1 else ""
        print(
            f"| {case.name} | {median['wall']:.2f} | {median['cpu']:.2f} | {median['full']} | {median['window']} "
            f"| {case.tokens / median['wall']:.1f} | {statistics.median(ratios):.2f}{spread} |"
        )
