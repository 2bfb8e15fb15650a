"""The run config: every field with the published recipe as its default."""

import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict

from llada_jax.inputs import InputError
from llada_jax.model.config import PRESETS

RunConfig = Any  # an ml_collections.ConfigDict, whose fields type checkers can't know


def run_config(preset: str = "llada_8b") -> RunConfig:
    """The run config with LLaDA's recipe as its defaults; files in configs/ change what they need and `lock()` it.

    Every field is read in the one module that is named beside its group.
    """
    config: RunConfig = ConfigDict()
    config.model = ConfigDict(dataclasses.asdict(PRESETS[preset]))  # config.py, model_config()
    config.data = ConfigDict(  # data/, through train.py
        dict(
            files="couplets",  # globs of .txt, .jsonl, .parquet, or the embedded "couplets", "python_reference"
            path="",  # instead of files: a directory that tools/prepare_data.py made
            kind="text",  # "text", or "chat" for supervised fine-tuning
            documents="file",  # a document of a text file is a "file", "paragraph" or "line"
            tokenizer="",  # a SentencePiece .model or a tokenizer.json; "": one is trained on the files
            tokenizer_type="bpe",  # of a tokenizer that is trained here: "bpe", "unigram" or "char"
            vocab_size=8192,  # of such a one, at most
            row_length=4096,
            packing="concatenate",  # "concatenate" documents and cut, or one "document" a row
            overlong="error",  # a dialogue longer than a row is an "error", or is "drop"ped and counted
            validation_fraction=0.0,
            mixture=(),  # further sources: pairs (prepared directory, weight); data.files or data.path weighs 1
            random_length_fraction=0.01,  # rows cut to a length ~ U{1..row_length}; paper section 2.2
            split_fraction=0.0,  # rows cut in two that do not see each other; iLLaDA: 0.3
            on_damage="stop",  # at a row that cannot be read; or "skip": another takes its place, is counted and logged
            threads=4,
        )
    )
    config.objective = ConfigDict(  # losses.py, diffusion.py
        dict(
            name="pretrain",  # "pretrain", "sft" or "autoregressive"
            attention="padding",  # a token sees the whole row ("full"), all but "padding", or its own "documents"
            eps=1e-3,
            stratified=False,  # t spread evenly over the global batch
        )
    )
    config.optimizer = ConfigDict(  # optimizer.py
        dict(
            schedule=(("linear", 4e-4, "2000 steps"), ("constant", 4e-4, "100%")),
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            decay="matrices",  # "matrices", or "all" parameters
            clip_norm=1.0,  # 0: no clipping
            mu_dtype="float32",
        )
    )
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, context=1))  # sharding.py; -1: the devices that are left
    config.train = ConfigDict(  # train.py
        dict(
            steps=438690,
            batch_size=1280,  # rows of the global batch, whatever the mesh
            microbatches=1,  # gradient accumulation: parts that a batch is computed in
            seed=0,
            init_from="",  # start from the model of this workdir or published checkpoint
            log_every=10,
            eval_every=1000,
            eval_rows=256,
            sample_every=0,  # 0: never
            sample_prompt="",
            spike_sigma=0.0,  # skip an update so far above the last 128 in loss or gradient norm. 0: only if not finite
            rollback_after=20,  # updates skipped in a row; then back to a checkpoint and on with other data. 0: never
            rollback_rate=1.0,  # by which a rollback multiplies the learning rate
            stall_seconds=600.0,  # in one phase of a step, after which the stacks of all threads are printed; 0: never
        )
    )
    config.checkpoint = ConfigDict(  # checkpoint.py
        dict(
            every_steps=1000,
            every_minutes=0.0,  # and whenever so many have passed since the last save; 0: by steps only; train.py
            keep=3,  # the newest ones
            keep_every_steps=0,  # and for good those of every so many steps; 0: none
        )
    )
    return config


def set_slice(config: RunConfig, slices: dict[str, dict[str, Any]], name: str) -> None:
    """Sets mesh axes, `microbatches` and `remat` to what a config file says for a TPU slice; "" leaves them."""
    if name and name not in slices:
        raise InputError(f"no settings for the slice {name!r}; there are some for {', '.join(slices)}")
    for field, value in slices.get(name, {}).items():
        group = {"microbatches": config.train, "remat": config.model}.get(field, config.mesh)
        group[field] = value


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "config") -> list[str]:
    """The fields in which two resolved configs differ, each as `config.a.b: old -> new`."""
    lines = []
    for name in sorted(set(old) | set(new)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}.{name}")
        elif json.dumps(a) != json.dumps(b):
            lines.append(f"{prefix}.{name}: {a!r} -> {b!r}")
    return lines
