"""What a model that was trained here needs beside its weights to be loaded anywhere: code, tokenizer, settings, card.

A published checkpoint, trained further or not, keeps the files that it came with instead.
"""

import json
import math
from pathlib import Path
from typing import Any

import jinja2

from llada_jax.config import Objective
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.fields import InputError
from llada_jax.interop import families, tokenizer_json, workdir
from llada_jax.model.config import ModelConfig
from llada_jax.model.transformer import parameter_count

_PUBLISHED = Path(__file__).with_name("published")
_ELBO = "0_validation/elbo_nats_per_token"


def write_companions(
    c: ModelConfig, directory: Path, tokenizer: Tokenizer | None, source: str | Path | None, name: str
) -> None:
    """Writes the tokenizer and, for a model without a published ancestor, generation settings, code and a model card.

    There is code for families with an `auto_map`, and a card that shows how to use it.

    source: the workdir that it was trained in, whose tokenizer is the default. name: the title of the card. Files that
    are there already stay. Raises InputError for a tokenizer with more ids than the model.
    """
    run = _read_run(source)
    if c.published:
        if tokenizer is not None and not any(directory.glob("tokenizer*")):
            tokenizer.save(directory)
        return
    if tokenizer is None and source is not None and (Path(source) / "tokenizer").is_dir():
        tokenizer = load_tokenizer(Path(source) / "tokenizer")
    if tokenizer is not None:
        if tokenizer.vocab_size > c.embedding_size:
            raise InputError(f"tokenizer: has {tokenizer.vocab_size} ids, the model knows {c.embedding_size}")
        tokenizer_json.write_tokenizer(tokenizer, directory)
    ids = {"bos": c.bos_token_id, "eos": c.eos_token_id, "pad": c.pad_token_id}
    _write_new(directory / "generation_config.json", json.dumps({f"{k}_token_id": v for k, v in ids.items()}, indent=2))
    if "auto_map" in families.require(c.family).fresh:
        for file in ("configuration_llada.py", "modeling_llada.py"):
            _write_new(directory / file, (_PUBLISHED / file).read_text(encoding="utf-8"))
        _write_new(directory / "README.md", card(c, name, run))


def card(c: ModelConfig, name: str, run: dict[str, Any] | None) -> str:
    """The model card; run: what `_read_run` found, or None."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((_PUBLISHED / "card.md.j2").read_text(encoding="utf-8"))
    chat = bool(run) and run["objective"] == "sft"
    return template.render(c=c, name=name, parameters=parameter_count(c), run=run, chat=chat)


def _read_run(source: str | Path | None) -> dict[str, Any] | None:
    """What a run was trained on, its newest step and its last validation; None for what is no workdir of a run."""
    if source is None or not (Path(source) / "config.json").is_file():
        return None
    config = workdir.load_config(source)
    if "train" not in config or "data" not in config:
        return None
    data, train = config["data"], config["train"]
    elbo_step, elbo = _last_elbo(Path(source) / "metrics.jsonl")
    return {
        "data": data.get("path") or data.get("files"), "row_length": data.get("row_length"),
        "objective": config.get("objective", {}).get("name", Objective().name), "batch_size": train.get("batch_size"),
        "step": max(workdir.saved_steps(Path(source) / "checkpoints"), default=0),
        "init_from": train.get("init_from"), "elbo": elbo, "elbo_step": elbo_step,
    }  # fmt: skip


def _last_elbo(path: Path) -> tuple[int, float | None]:
    """(step, value) of the last validation in a metrics.jsonl, (0, None) if there was none."""
    found: tuple[int, float | None] = (0, None)
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
            if math.isfinite(values[_ELBO]):
                found = (int(values["step"]), float(values[_ELBO]))
        except (ValueError, KeyError, TypeError):  # another kind of line, or what a kill has left of the last one
            continue
    return found


def _write_new(path: Path, text: str) -> None:
    if not path.exists():
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
