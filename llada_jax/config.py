"""The run config: every field with the published recipe as its default, its range, and what it means."""

import dataclasses
import json
import shlex
from typing import Any

from ml_collections import ConfigDict

from llada_jax.fields import InputError, check_fields, choice, flag, integer, number, sequence, text
from llada_jax.model.config import PRESETS, ModelConfig

RunConfig = Any  # an ml_collections.ConfigDict, whose fields type checkers can't know

_MOST = 2**31 - 1
_ATTENTION = "a token sees the whole row (full), all but padding, or its own document (documents)"


@dataclasses.dataclass
class Data:
    """Read in data/, through training/run.py."""

    files: str = text("couplets", "globs of .txt, .jsonl, .parquet, or the embedded couplets, python_reference", 2**16)
    path: str = text("", "instead of files: a directory that tools/prepare_data.py made")
    kind: str = text("text", "text, or chat for supervised fine-tuning: a file of data/")
    documents: str = choice("file", ("file", "paragraph", "line"), "what a document of a text file is")
    tokenizer: str = text("", "a SentencePiece .model or a tokenizer.json; empty: one is trained on the files")
    tokenizer_type: str = choice("bpe", ("bpe", "unigram", "char"), "of a tokenizer that is trained here")
    vocab_size: int = integer(8192, 320, 2**20, "of such a one, at most")
    row_length: int = integer(4096, 2, 2**24, "tokens of a row")
    packing: str = choice("concatenate", ("concatenate", "document"), "concatenate and cut, or a document a row")
    overlong: str = choice("error", ("error", "drop"), "what a dialogue longer than a row is; dropped ones are counted")
    validation_fraction: float = number(0.0, 0, 1, "of the documents, held out", below=True)
    mixture: tuple = sequence((), "further sources: (prepared directory, weight) pairs; the first weighs 1")
    random_length_fraction: float = number(0.01, 0, 1, "rows cut to a length ~ U{1..row_length}; paper, section 2.2")
    split_fraction: float = number(0.0, 0, 1, "rows cut in two that do not see each other; iLLaDA: 0.3")
    on_damage: str = choice("stop", ("stop", "skip"), "at a row that cannot be read; skip: another takes its place")
    threads: int = integer(4, 1, 1024, "that read rows")
    cache_dir: str = text("", "for copies of what lies in buckets; empty: llada_jax in the user's cache directory")


@dataclasses.dataclass
class Objective:
    """Read in objectives/."""

    name: str = text("pretrain", "pretrain, sft or autoregressive: a line of objectives/__init__.py")
    attention: str = choice("padding", ("full", "padding", "documents"), _ATTENTION)
    eps: float = number(1e-3, 0, 1, "smallest mask ratio", above=True)
    stratified: bool = flag(False, "mask ratios spread evenly over the global batch")
    balanced: bool = flag(True, "the same mask ratios, dealt so that no device has more to score than the others")


@dataclasses.dataclass
class Optimizer:
    """Read in training/optimizer.py."""

    schedule: tuple = sequence(
        (("linear", 4e-4, "2000 steps"), ("constant", 4e-4, "100%")), "phases: (kind, rate, until)"
    )
    b1: float = number(0.9, 0, 1, "decay of Adam's first moment", below=True)
    b2: float = number(0.95, 0, 1, "decay of Adam's second moment", below=True)
    eps: float = number(1e-8, 0, 1, "added to the root of the second moment", above=True)
    weight_decay: float = number(0.1, 0, 10, "decoupled, times the learning rate")
    decay: str = choice("matrices", ("matrices", "all"), "which parameters decay")
    clip_norm: float = number(1.0, 0, 1e9, "largest norm of all gradients; 0: no clipping")
    mu_dtype: str = choice("float32", ("float32", "bfloat16"), "of Adam's first moment")


_WEIGHTS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Read in model/lora.py, `base` in training/run.py, `fingerprint` in interop/."""

    rank: int = integer(0, 0, 2**16, "of the adapters; 0: all parameters are trained")
    alpha: float = number(64.0, 0, 1e6, "what they add is multiplied by alpha / rank", above=True)
    dropout: float = number(0.0, 0, 1, "of their inputs in training", below=True)
    targets: tuple = sequence(_WEIGHTS, "weights that get one: those of the blocks by name, and wte, the embedding")
    rslora: bool = flag(False, "multiplied by alpha / √rank instead (arXiv 2312.03732)")
    base: str = choice("bfloat16", ("float32", "bfloat16", "int8", "int4"), "how the frozen weights are held")
    fingerprint: str = text("", "of the model in config.train.init_from, the base; a run fills it in")


@dataclasses.dataclass
class Mesh:
    """Read in parallel/mesh.py. -1: the devices that are left."""

    data: int = integer(1, -1, 2**20, "rows of the batch, parameters copied; across slices")
    fsdp: int = integer(-1, -1, 2**20, "rows of the batch, parameters and optimizer state split")
    tensor: int = integer(1, -1, 2**20, "heads, the MLP's width and the vocabulary")
    context: int = integer(1, -1, 2**20, "positions of a row")


@dataclasses.dataclass
class Train:
    """Read in training/run.py and training/loop.py."""

    steps: int = integer(438690, 1, _MOST, "of the run")
    batch_size: int = integer(1280, 1, 2**24, "rows of the global batch, whatever the mesh")
    microbatches: int = integer(1, 1, 2**16, "gradient accumulation: parts that a batch is computed in")
    seed: int = integer(0, 0, 2**32 - 1, "of initialisation, data order and masks")
    init_from: str = text("", "start from the model of this workdir or published checkpoint")
    log_every: int = integer(10, 1, _MOST, "steps")
    eval_every: int = integer(1000, 0, _MOST, "steps; 0: never")
    eval_rows: int = integer(256, 1, _MOST, "validation rows at most; fewer than a batch are repeated to a batch")
    sample_every: int = integer(0, 0, _MOST, "steps; 0: never")
    sample_prompt: str = text("", "what a sample of the log continues, or replies to if dialogues are trained", 2**16)
    profile_steps: tuple = sequence((), "(first, last): steps profiled into the workdir, for TensorBoard and xprof")
    spike_sigma: float = number(0.0, 0, 1e6, "skip an update so far above the last 128; 0: only if not finite")
    rollback_after: int = integer(20, 0, _MOST, "updates skipped in a row; then back to a checkpoint; 0: never")
    rollback_rate: float = number(1.0, 0, 1, "by which a rollback multiplies the learning rate", above=True)
    stall_seconds: float = number(600.0, 0, 1e9, "in one phase of a step; then the stacks are printed; 0: never")


@dataclasses.dataclass
class Checkpoint:
    """Read in training/checkpoint.py."""

    every_steps: int = integer(1000, 1, _MOST, "steps")
    every_minutes: float = number(0.0, 0, 1e6, "and when so many have passed since the last save; 0: by steps only")
    keep: int = integer(3, 1, _MOST, "the newest ones")
    keep_every_steps: int = integer(0, 0, _MOST, "and for good those of every so many steps; 0: none")


GROUPS: dict[str, type] = {
    "model": ModelConfig, "data": Data, "objective": Objective, "optimizer": Optimizer, "lora": Lora, "mesh": Mesh,
    "train": Train, "checkpoint": Checkpoint,
}  # fmt: skip


def run_config(preset: str = "llada_8b") -> RunConfig:
    """The run config with LLaDA's recipe as its defaults; files in configs/ change what they need and `lock()` it."""
    config: RunConfig = ConfigDict({name: dataclasses.asdict(group()) for name, group in GROUPS.items()})
    config.model = ConfigDict(dataclasses.asdict(PRESETS[preset]))
    return config


def check_config(config: RunConfig) -> None:
    """Raises InputError for a field that is unknown or holds what it may not; `training/run.py` checks the rest."""
    for name, group in GROUPS.items():
        values = config.get(name)
        if not isinstance(values, ConfigDict | dict):
            raise InputError(f"config.{name} is {values!r}, not a group of fields")
        check_fields(group, dict(values), f"config.{name}")


def describe(config: RunConfig) -> str:
    """Every field as the flag that sets it, with its meaning; a line each, the groups in the order of this file."""
    lines = []
    for group in [*GROUPS, *(name for name in config if name not in GROUPS)]:
        known = {f.name: f.metadata["field"] for f in dataclasses.fields(GROUPS[group])} if group in GROUPS else {}
        for name in known or config[group]:
            lines.append(f"{_as_flag(f'config.{group}.{name}', config[group][name]):<44}")
            if what := known.get(name):
                lines[-1] += f"  # {what.help}{'; ' + what.allowed if what.allowed.startswith('one of') else ''}"
    return "\n".join(map(str.rstrip, lines))


def _as_flag(name: str, value: Any) -> str:
    text = str(value)
    if isinstance(value, tuple | list) and '"' not in text:
        text = text.replace("'", '"')  # a shell's word is put into single quotes
    return f"--{name}={shlex.quote(text)}"


def set_slice(config: RunConfig, slices: dict[str, dict[str, Any]], name: str) -> None:
    """Sets mesh axes and the fields named here to what a config file says for a TPU slice; "" leaves them."""
    if name and name not in slices:
        raise InputError(f"no settings for the slice {name!r}; there are some for {', '.join(slices)}")
    for field, value in slices.get(name, {}).items():
        groups = dict(
            microbatches=config.train, batch_size=config.train, remat=config.model, base=config.lora,
            row_length=config.data,
        )  # fmt: skip
        group = groups.get(field, config.mesh)
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
