r"""What each commit rule and cache costs in accuracy, on a model trained here.

python tools/decode_accuracy.py --workdir=DIR

Trains a small LLaDA on three kinds of lines, then lets every rule with every cache complete 200 of each:

sort: seven digits and, after "=", the same in order; unseen ones are asked. Each token follows from the prompt.
copy: six digits and, after "=", the same again; two are given. Tokens depend on each other, not on the prompt: four
    digits are free, and what is committed together must agree. Right is a copy that equals its original.
couplets: the next line of couplets that were learned by heart.

The run continues from its newest checkpoint when the same command is given again.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from llada_jax import cli
from llada_jax.config import run_config
from llada_jax.data import sources
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.interop.workdir import load_model
from llada_jax.sampling.cache import prepare
from llada_jax.sampling.generate import generate
from llada_jax.training import run

RULES: dict[str, dict] = {
    "1 token a pass": {},
    "2 tokens a pass": {"tokens": 2},
    "4 tokens a pass": {"tokens": 4},
    "threshold 0.95": {"threshold": 0.95},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.7": {"threshold": 0.7},
    "threshold 0.5": {"threshold": 0.5},
    "factor 1": {"factor": 1.0},
    "factor 0.5": {"factor": 0.5},
    "entropy bound 0.1": {"entropy_bound": 0.1},
    "entropy bound 0.5": {"entropy_bound": 0.5},
    "margin, 2 tokens a pass": {"tokens": 2, "remasking": "margin"},
    "random, 1 token a pass": {"remasking": "random"},
    "random, 2 tokens a pass": {"tokens": 2, "remasking": "random"},
}
CACHES: dict[str, dict] = {
    "none": {}, "prefix": {"cache": "prefix"}, "dual": {"cache": "dual"},
    "dual, around 2": {"cache": "dual", "look_around": 2}, "two_block": {"cache": "two_block"},
}  # fmt: skip
_DIGITS, _COPIED, _BLOCK, _QUESTIONS = 7, 6, 4, 200


class Task(NamedTuple):
    """prompts: all of one length in tokens. is_right: of a prompt and what follows it up to the end of text."""

    prompts: list[str]
    gen_length: int  # with the end of text
    is_right: Callable[[str, str], bool]


def _digits(generator: random.Random, count: int) -> str:
    return "".join(generator.choices("0123456789", k=count))


def _sorting(generator: random.Random) -> str:
    digits = _digits(generator, _DIGITS)
    return f"s{digits}={''.join(sorted(digits))}"


def _copying(generator: random.Random) -> str:
    digits = _digits(generator, _COPIED)
    return f"c{digits}={digits}"


def _couplets() -> dict[str, str]:
    """{first line: second line} of the embedded couplets of seven characters a line."""
    return {a: b for a, b, _ in sources.couplets() if len(a) == len(b) == 7}


def write_corpus(path: Path, lines: int = 40_000) -> None:
    """So many lines of each kind."""
    generator, couplets = random.Random(0), list(_couplets().items())
    with path.open("w", encoding="utf-8") as file:
        for i in range(lines):
            first, second = couplets[i % len(couplets)]
            print(_sorting(generator), _copying(generator), f"{first},{second}", sep="\n", file=file)


def tasks() -> dict[str, Task]:
    generator, couplets = random.Random(1), _couplets()
    sort = [_sorting(generator).partition("=")[0] + "=" for _ in range(_QUESTIONS)]
    copy = [f"c{_digits(generator, 2)}" for _ in range(_QUESTIONS)]
    line = [f"{first}," for first in list(couplets)[:_QUESTIONS]]

    def agree(prompt: str, text: str) -> bool:
        original, found, copied = (prompt[1:] + text).partition("=")
        return bool(found) and original == copied and len(original) == _COPIED

    return {
        "sort": Task(sort, 8, lambda prompt, text: text == "".join(sorted(prompt[1:-1]))),
        "copy": Task(copy, 12, agree),
        "couplets": Task(line, 8, lambda prompt, text: text == couplets[prompt[:-1]]),
    }


def train(workdir: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    corpus = workdir.parent / f"{workdir.name}.txt"
    if not corpus.exists():
        write_corpus(corpus)
    config = run_config("tiny")
    m, d, t = config.model, config.data, config.train
    m.vocab_size = m.embedding_size = 0
    m.d_model, m.n_layers, m.n_heads, m.n_kv_heads, m.mlp_hidden_size, m.max_sequence_length = 128, 4, 4, 4, 384, 64
    d.files, d.documents, d.packing, d.row_length, d.tokenizer_type = str(corpus), "line", "document", 18, "char"
    d.random_length_fraction, config.objective.stratified = 0.0, True
    config.optimizer.schedule = (
        ("linear", 1e-3, "100 steps"), ("constant", 1e-3, "60%"), ("cosine", 2e-5, "100%"),
    )  # fmt: skip
    t.steps, t.batch_size, t.log_every, t.eval_every = flags.FLAGS.steps, 64, 100, 0
    config.checkpoint.every_steps, config.checkpoint.keep = 500, 1
    run.train(config, workdir)


def score(weights, tokenizer, task: Task, options: dict) -> tuple[float, float]:
    """(share that is right, committed tokens a pass and row)."""
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in task.prompts]
    options = dict(options)
    if tokens := options.pop("tokens", 0):
        options["steps"] = task.gen_length // tokens
    out, stats = generate(
        weights, np.asarray(ids), gen_length=task.gen_length, block_length=_BLOCK, return_stats=True, **options
    )
    right = 0
    for prompt, row in zip(task.prompts, np.asarray(out)[:, len(ids[0]) :].tolist(), strict=True):
        text = tokenizer.decode(row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row)
        right += task.is_right(prompt, text)
    return right / len(task.prompts), stats.tokens_per_pass


def main(_argv: list[str]) -> None:
    workdir = Path(flags.FLAGS.workdir)
    train(workdir)
    weights, tokenizer = prepare(load_model(workdir)), load_tokenizer(workdir / "tokenizer")
    for name, task in tasks().items():
        print(f"\n**{name}**: % right of {len(task.prompts)} (tokens a pass)\n\n| | {' | '.join(CACHES)} |")
        print("|---" * (1 + len(CACHES)) + "|")
        for rule, options in RULES.items():
            found = [score(weights, tokenizer, task, options | cache) for cache in CACHES.values()]
            print(f"| {rule} | {' | '.join(f'{right:.1%} ({speed:.1f})' for right, speed in found)} |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Of the training run.", required=True)
    flags.DEFINE_integer("steps", 4000, "Of training.", lower_bound=1)
    cli.run(main)
