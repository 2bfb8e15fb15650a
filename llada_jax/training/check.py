"""What must fit together before a run begins: the fields of its config, its model and its tokenizer."""

import dataclasses
from typing import Any

from llada_jax.config import RunConfig, check_config
from llada_jax.data import KINDS
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.fields import InputError
from llada_jax.interop import families, hf
from llada_jax.model import lora
from llada_jax.model.config import ModelConfig, model_config
from llada_jax.objectives import OBJECTIVES
from llada_jax.parallel.mesh import mesh_shape
from llada_jax.training import optimizer

# How a model is computed, not what it is: may change from run to run.
_OWN = ("dtype", "residual", "remat", "attention_kernel")


def check(config: RunConfig, devices: int, stored: dict[str, Any] | None = None) -> None:
    """Raises InputError for a field that is out of its range, for fields that contradict each other, and for a batch
    or mesh that doesn't divide over so many devices.

    stored: the config of the run that goes on; then nothing is read, else only the config of `init_from`.
    """
    check_config(config)
    t, d, o = config.train, config.data, config.objective
    if o.name not in OBJECTIVES:
        raise InputError(f"config.objective.name {o.name!r} is not one of {', '.join(OBJECTIVES)}")
    if d.kind not in KINDS:
        raise InputError(f"config.data.kind {d.kind!r} is not one of {', '.join(KINDS)}")
    if config.lora.rank:
        lora.require_targets(tuple(config.lora.targets))
    model = _architecture(config, stored)
    families.require(model["family"])
    if d.row_length > model["max_sequence_length"]:
        raise InputError(
            f"config.data.row_length {d.row_length} is longer than the model's context, "
            f"config.model.max_sequence_length {model['max_sequence_length']}"
        )
    if model["causal"] != OBJECTIVES[o.name].causal:
        raise InputError(
            f"config.objective.name {o.name!r} needs config.model.causal={OBJECTIVES[o.name].causal}: next tokens are "
            "predicted without seeing them, masked ones from both sides"
        )
    if o.name == "sft" and d.kind != "chat":
        raise InputError(f"config.objective.name 'sft' needs config.data.kind 'chat', it is {d.kind!r}")
    optimizer.make_schedule(config.optimizer.schedule, **phases(config))
    shape = mesh_shape(dict(config.mesh), devices)
    shards = shape["data"] * shape["fsdp"]
    if t.batch_size % (t.microbatches * shards):
        raise InputError(
            f"config.train.batch_size {t.batch_size} does not split into {t.microbatches} microbatches over "
            f"{shards} devices of the data and fsdp axes"
        )
    profiled = tuple(t.profile_steps)
    if profiled and not (
        len(profiled) == 2 and all(type(n) is int for n in profiled) and 1 <= profiled[0] <= profiled[1]
    ):
        raise InputError(f"config.train.profile_steps is {profiled}; it must be (first, last), two steps from 1 on")
    if o.attention == "full" and (d.random_length_fraction or d.kind == "chat" or d.packing == "document"):
        raise InputError(
            "config.objective.attention 'full' sees padding, which random lengths, chat rows and packing 'document' "
            "make; use 'padding'"
        )
    if d.split_fraction and o.attention != "documents":
        raise InputError("config.data.split_fraction needs config.objective.attention 'documents'")
    if d.tokenizer and d.path:
        raise InputError("config.data.tokenizer and config.data.path: a prepared directory brings its own tokenizer")


def phases(config: RunConfig) -> dict[str, int]:
    """What the phases of a schedule are measured in."""
    return dict(total_steps=config.train.steps, tokens_per_step=config.train.batch_size * config.data.row_length)


def fit_to_tokenizer(config: RunConfig, tokenizer: Tokenizer, stored: dict[str, Any] | None = None) -> ModelConfig:
    """Fills in what the tokenizer decides (sizes that are 0, special ids) and checks that the rest fits.

    A model that starts from another takes its architecture, and keeps it in a run that goes on (`stored`).
    """
    m = config.model
    if config.train.init_from:
        m.update({name: value for name, value in _architecture(config, stored).items() if name not in _OWN})
    m.vocab_size = m.vocab_size or tokenizer.vocab_size
    m.embedding_size = m.embedding_size or -(-m.vocab_size // 64) * 64
    m.mask_token_id, m.bos_token_id, m.eos_token_id = tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id
    m.pad_token_id, m.eot_token_id = tokenizer.pad_id, tokenizer.eot_id
    if tokenizer.vocab_size > m.embedding_size:
        raise InputError(
            f"config.model.embedding_size {m.embedding_size} has no row for each of the tokenizer's "
            f"{tokenizer.vocab_size} ids; raise it, or set vocab_size and embedding_size to 0"
        )
    return model_config(m)


def _architecture(config: RunConfig, stored: dict[str, Any] | None) -> dict[str, Any]:
    """The model's fields: those of the run that goes on, of the model that it starts from, or the config's own."""
    if not config.train.init_from:
        return dict(config.model)
    if stored is not None:
        return stored["model"]
    return dataclasses.asdict(hf.load_config(config.train.init_from, config.model.dtype))
