"""What the claims share: LLaDA and its control trained on the same rows, questions to both, lines on disk.

B rows, L columns, V vocabulary. The control is the same Transformer with causal attention, trained on the next token.
"""

import functools
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llada_jax.config import RunConfig, run_config
from llada_jax.data import prepare
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.fields import InputError
from llada_jax.files import read_bytes
from llada_jax.interop.workdir import load_model
from llada_jax.sampling import left_to_right, prompts
from llada_jax.sampling.generate import generate
from llada_jax.training import run

KINDS = {"llada": "LLaDA", "arm": "autoregressive control"}
_RATE = 3e-3  # of learning, at its highest
_AT_ONCE = 256  # questions
_LARGEST = 2**26  # bytes of a file of results


class Shape(NamedTuple):
    """Of a model: width and layers. Heads have 16 features or more, the MLP is 8/3 as wide."""

    width: int
    layers: int

    def __str__(self) -> str:
        return f"{self.width}x{self.layers}"


def once(path: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The line of a JSON lines file that has these fields; made, timed and appended where there is none.

    A kill leaves all lines that were there. Raises InputError for a file with other content.
    """
    done = finished(path)
    for line in done:
        if key.items() <= line.items():
            return line
    start = time.perf_counter()
    line = {**key, **make()}
    line["seconds"] = round(time.perf_counter() - start, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(json.dumps(x) + "\n" for x in [*done, line]), encoding="utf-8")
    os.replace(temporary, path)
    print(json.dumps(line), flush=True)
    return line


def of_both(
    workdir: Path, seeds: int, settings: dict[str, Any], make: Callable[[str, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The lines of `make(kind, seed)` for both kinds and all seeds, a seed after the other."""
    return [
        once(workdir / "results.jsonl", {"kind": kind, "seed": seed, **settings}, functools.partial(make, kind, seed))
        for seed in range(seeds) for kind in KINDS
    ]  # fmt: skip


def values(lines: Sequence[dict[str, Any]], field: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """{kind: numbers [seeds, names]} of a field that holds a number for each name."""
    by_kind = {kind: [line[field] for line in lines if line["kind"] == kind] for kind in KINDS}
    return {kind: np.asarray([[x[name] for name in names] for x in found]) for kind, found in by_kind.items()}


def finished(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results, none where there is no file."""
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in read_bytes(path, _LARGEST).splitlines()]
    except ValueError as error:
        raise InputError(f"{path}: not JSON lines ({error}); remove it, and its cells are made again") from error
    if not all(isinstance(line, dict) for line in lines):
        raise InputError(f"{path}: a line is no JSON object; remove it, and its cells are made again")
    return lines


def prepared(output: Path, tokenizer: Tokenizer, row_length: int, **source: Any) -> Path:
    """A directory of rows, made once; `source` goes to `prepare_dataset`."""
    prepare.prepare_dataset(output, tokenizer=tokenizer, row_length=row_length, workers=1, progress=False, **source)
    return output


def config_of(
    kind: str, shape: Shape, data: Path, *, row_length: int, steps: int, batch_size: int, seed: int,
    chat: bool = False, init_from: Path | None = None, heads: int = 0,
) -> RunConfig:  # fmt: skip
    """A run of a tiny model on prepared rows: LLaDA with stratified mask ratios, or the control.

    The learning rate rises over 5% of the steps and falls to a tenth along a cosine. heads: 0 for the shape's own.
    """
    config = run_config("tiny")
    m, d, t = config.model, config.data, config.train
    heads = heads or max(shape.width // 32, 2)
    m.vocab_size = m.embedding_size = 0
    m.d_model, m.n_layers, m.n_heads, m.n_kv_heads = shape.width, shape.layers, heads, heads
    m.rope_theta = 100.0  # with the recipe's 500,000 few features of so small a head would turn within a short row
    m.mlp_hidden_size, m.max_sequence_length = shape.width * 8 // 3, 2 * row_length
    d.path, d.row_length, d.random_length_fraction = str(data), row_length, 0.0
    d.kind = "chat" if chat else "text"
    config.objective.stratified = True
    config.objective.name = "autoregressive" if kind == "arm" else "sft" if chat else "pretrain"
    m.causal = kind == "arm"
    config.optimizer.schedule = (("linear", _RATE, "5%"), ("cosine", _RATE / 10, "100%"))
    t.batch_size, t.seed, t.eval_every = batch_size, seed, 0
    t.init_from = str(init_from) if init_from else ""
    config.checkpoint.keep = 1
    set_steps(config, steps)
    return config


def set_steps(config: RunConfig, steps: int) -> None:
    config.train.steps = config.checkpoint.every_steps = steps
    config.train.log_every = min(200, steps)


def trained(config: RunConfig, workdir: Path):
    """The model of a finished run, which goes on from its checkpoint if there is one."""
    run.train(config, workdir, title=workdir.name)
    return load_model(workdir)


def forget(workdir: Path) -> None:
    """Removes a run of which all that matters stands in the results."""
    shutil.rmtree(workdir, ignore_errors=True)


def replies(model, tokenizer: Tokenizer, asked: Sequence[list[int]], room: int) -> list[str]:
    """What follows each prompt (ids) up to the end of turn or of text, greedily, in at most `room` tokens."""
    texts: list[str] = []
    for i in range(0, len(asked), _AT_ONCE):
        part = list(asked[i : i + _AT_ONCE])
        if model.config.causal:
            texts += left_to_right.continue_ids(model, tokenizer, part, room)
        else:
            rows = np.asarray(generate(model, part, gen_length=room))[:, -room:]
            texts += [prompts.reply_text(tokenizer, row) for row in rows]
    return texts


def share(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Of answers that are right to the last character."""
    return float(np.mean([a.strip() == b for a, b in zip(found, wanted, strict=True)]))


@jax.jit
def next_token_log_p(model, tokens_BL: jax.Array) -> jax.Array:
    """log p of each token given those before it, for a causal model, float32 [B, L - 1], nats."""
    log_p_BLV = jax.nn.log_softmax(model(tokens_BL)[:, :-1].astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(log_p_BLV, tokens_BL[:, 1:, None], axis=-1)[..., 0]


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Of models, results.jsonl, the table and the picture.", required=True)
    flags.DEFINE_integer("seeds", 3, "How many runs of each kind.", lower_bound=1)


def opened(workdir: str, pictures: bool = True) -> Path:
    """The workdir, in which compiled programs are kept. Raises InputError where the pictures could not be drawn."""
    if pictures and importlib.util.find_spec("matplotlib") is None:
        raise InputError("the pictures need matplotlib: pip install 'llada_jax[claims]'")
    path = Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path / "programs"))
    return path


def tokenizer_of(path: Path, make: Callable[[Path], Tokenizer]) -> Tokenizer:
    """That of `path`, trained once."""
    return load_tokenizer(path) if path.exists() else make(path)
