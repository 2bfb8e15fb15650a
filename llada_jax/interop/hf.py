"""Published checkpoints as models and back, one tensor at a time."""

import collections
import contextlib
import dataclasses
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.config import Lora
from llada_jax.data import tokenizer as tokenizers
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.fields import InputError, check_fields
from llada_jax.files import atomic_directory, parse_json, read_json
from llada_jax.interop import export, hf_config, parameters, peft, tensor_names, workdir
from llada_jax.interop import safetensors_io as files
from llada_jax.interop.parameters import Progress
from llada_jax.model import lora
from llada_jax.model import quantize as quantized
from llada_jax.model.config import ModelConfig, model_config
from llada_jax.model.transformer import Transformer, with_config
from llada_jax.parallel import processes
from llada_jax.parallel.mesh import under
from llada_jax.storage import mirror
from llada_jax.storage.buckets import files_below, is_bucket, path_of, require_reachable

# What travels with a model besides its weights: the tokenizer, generation settings, and the code that auto_map names.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.model",
    "chat_template*", "generation_config.json", "modeling_*.py", "configuration_*.py",
)  # fmt: skip

_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def load(
    path: str | Path, dtype=None, mesh=None, *, adapter: str | Path | Sequence[str | Path] = (),
    quantize: str | None = None, progress: Progress = lambda _: None,
) -> Transformer:  # fmt: skip
    """The model in a directory: a published checkpoint (config.json, .safetensors) or a workdir of a run.

    A published checkpoint in a bucket is copied to this machine, once; checkpoints of runs are read where they are.
    Of a workdir, the newest checkpoint that is as its checksums say; published checkpoints have none. dtype: "float32"
    or "bfloat16", of parameters and of compute; None: parameters as stored, compute as the run did, or for a published
    checkpoint in bfloat16 if all of them are, else in float32. mesh: an explicit mesh over which the parameters are
    born sharded, each process reading its own part. adapter: a directory of a PEFT adapter, or several, whose effects
    add up. quantize: "int8" or "int4", the weights of the blocks in few bits; published files are quantised as they are
    read. progress: called with the bytes of each piece of the published files that was read. Raises InputError for a
    file that is broken, a tensor that is missing or too many, a shape that contradicts config.json, and every option of
    config.json that this model cannot compute.
    """
    if quantize not in (None, *quantized.FEW_BITS):
        raise InputError(f"quantize {quantize!r} is not None or one of {quantized.FEW_BITS}")
    model = _load(path, dtype, mesh, quantize, progress)
    for place in (adapter,) if isinstance(adapter, str | Path) else adapter:
        model = peft.load(model, mirror.copied(place), mesh, base=mirror.copied(path))
    return model


def _load(path: str | Path, dtype, mesh, quantize: str | None, progress: Progress) -> Transformer:
    directory = mirror.copied(path)
    if dtype is not None:
        dtype = _float_name(dtype)
    if _is_workdir(_read_json(directory)):
        return _load_workdir(path_of(path), dtype, mesh, quantize)
    stored = files.read_directory(directory)
    config = load_config(directory, dtype or _compute_dtype(stored, directory))
    parts = parameters.assign(stored, config, directory)
    like = workdir.abstract_model(config, mesh, quantize)
    leaves, made = dict(workdir.named_leaves(like)), {}
    for name, leaf in leaves.items():
        weight = name.removesuffix(".scale").removesuffix(".values")
        if name.endswith(".scale"):
            scale, values = leaf, leaves[f"{weight}.values"]
            made |= zip(
                (name, f"{weight}.values"), parameters.coded(scale, values, parts[weight], progress), strict=True
            )
        elif name == weight:
            kind = dtype or jnp.result_type(*(files.DTYPES[part.dtype] for part in parts[name]))
            made[name] = parameters.parameter(leaf, np.dtype(kind), parts[name], name.startswith("blocks."), progress)
    return jax.tree.unflatten(jax.tree.structure(like), [made[name] for name in leaves])


def load_config(path: str | Path, dtype: str = "float32") -> ModelConfig:
    """The config of the model that `load` would make of this directory, computing in `dtype`; reads no tensor."""
    directory = mirror.copied(path)
    if _is_workdir(raw := _read_json(directory)):
        return dataclasses.replace(model_config(raw["model"]), dtype=dtype)
    text, where = hf_config.read_config_text(directory), str(directory / "config.json")
    return hf_config.read_config(text, where, dtype, _token_ids(directory / "tokenizer.json"))


def with_dtype(model: Transformer, dtype: str) -> Transformer:
    """The same parameters, unchanged, computing in `dtype`."""
    return with_config(model, dataclasses.replace(model.config, dtype=dtype))


def save_adapter(model: Transformer, path: str | Path, *, base: str | Path | None = None) -> None:
    """Writes the adapters of a model as PEFT does: adapter_config.json and adapter_model.safetensors, float32.

    base: where the model was loaded from; its path and fingerprint are noted, and `load` compares the latter. The
    directory appears when it is complete. Raises InputError when it exists and is not empty, and for a model without
    adapters. With several processes all must call it; the first writes.
    """
    plan = peft.plan(model, base)
    with processes.all_or_none():
        if processes.is_first():
            with new_directory(Path(path)) as temporary:
                peft.write(temporary, plan)


def tokenizer_directory(path: str | Path) -> Path:
    """Where the tokenizer lies: beside a published checkpoint, in tokenizer/ of a workdir."""
    directory = mirror.copied(path)
    inner = directory / "tokenizer"
    return inner if os.path.isdir(inner) else directory


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a published checkpoint or of a run's workdir: what `load` takes the model from."""
    return tokenizers.load_tokenizer(tokenizer_directory(path))


def is_instruct(path: str | Path) -> bool:
    """Whether a model was trained on dialogues: by the data of its run, or by the name of a published model."""
    raw = _read_json(Path(path))
    if isinstance(raw.get("data"), dict):
        return raw["data"].get("kind", "text") != "text"
    names = f"{Path(path).resolve().name} {raw.get('_name_or_path', '')}".lower()
    return any(word in names for word in ("instruct", "llada-1.5"))


def save_hf(
    model: Transformer, path: str | Path, max_shard_size: str | int = "5GB", *,
    source_dir: str | Path | None = None, tokenizer: Tokenizer | None = None, progress: Progress = lambda _: None,
) -> None:  # fmt: skip
    """Writes a published checkpoint: config.json, model*.safetensors in the dtype of the parameters, an index if many.

    What was loaded and not trained comes back byte for byte. source_dir: a published checkpoint or a workdir whose
    tokenizer and generation settings come along. tokenizer: written where source_dir brings none. A model without a
    published ancestor gets what transformers needs to load it, and a card; see `export`. The directory appears when it
    is complete. Raises InputError when it exists and is not empty, for an unreadable size, and for a model that no
    published format expresses. With several processes all must call it; the first writes.
    """
    plan = _plan(model, max_shard_size)
    with processes.all_or_none():
        try:
            if processes.is_first():
                with new_directory(path_of(path)) as temporary:
                    _write(temporary, plan, source_dir, progress)
                    export.write_companions(model.config, temporary, tokenizer, source_dir, Path(path).name)
        finally:
            if jax.process_count() > 1:  # all take part in gathering, also after the first could not write
                collections.deque(plan.arrays, maxlen=0)


def save_workdir(model: Transformer, path: str | Path, *, source_dir: str | Path | None = None) -> None:
    """Writes a workdir whose only checkpoint, step 0, holds this model: config.json, checkpoints/0/model, tokenizer/.

    A run starts from it with config.train.init_from. source_dir, and what is raised, as for `save_hf`.
    """
    if jax.process_count() > 1:
        raise InputError("a workdir is written by one process; convert the checkpoint on one host")
    with new_directory(workdir.require_utf8(path_of(path))) as temporary:
        write_workdir(model, temporary, source_dir)


def write_hf(
    model: Transformer,
    directory: Path,
    max_shard_size: str | int,
    source_dir: str | Path | None,
    progress: Progress,
    name: str,
) -> None:
    """`save_hf` into a directory that exists, by one process; its name there is the title of the card."""
    _write(directory, _plan(model, max_shard_size), source_dir, progress)
    export.write_companions(model.config, directory, None, source_dir, name)


class _Plan(NamedTuple):
    """What a published checkpoint will hold."""

    config_text: str
    shards: dict[str, list[files.Layout]]  # file: its tensors
    index_text: str
    arrays: Iterator[np.ndarray]  # in that order


def _plan(model: Transformer, max_shard_size: str | int) -> _Plan:
    if lora.adapters_of(model):
        raise InputError("the model has adapters; save_adapter writes them, lora.merge makes a plain model")
    if quantized.is_quantized(model):
        raise InputError("the model is quantised, which no published format expresses; load it without quantize")
    config, leaves = model.config, dict(workdir.named_leaves(model))
    text = hf_config.write_config(config, _float_name(leaves["wte"].dtype))
    tensors = {t.name: t for t in tensor_names.tensors(config)}
    file_dtype = {dtype: name for name, dtype in files.DTYPES.items()}
    layout = [(t.name, file_dtype[leaves[t.parameter].dtype], t.shape) for t in tensors.values()]
    shards, index = files.shards(layout, _size(max_shard_size))
    order = [tensors[name] for shard in shards.values() for name, _, _ in shard]
    return _Plan(text, shards, index, (_whole(leaves[tensor.parameter], tensor.layer) for tensor in order))


def _write(directory: Path, plan: _Plan, source_dir: str | Path | None, progress: Progress) -> None:
    def reported(arrays: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for array in arrays:
            yield array
            progress(array.nbytes)

    if source_dir is not None:
        copy_companions(source_dir, directory)
    for file, shard in plan.shards.items():
        files.write_file(directory / file, shard, reported(itertools.islice(plan.arrays, len(shard))))
    if len(plan.shards) > 1:
        (directory / files.INDEX).write_text(plan.index_text)
    (directory / "config.json").write_bytes(plan.config_text.encode())


def write_workdir(model: Transformer, directory: Path, source_dir: str | Path | None) -> None:
    """`save_workdir` into a directory that exists."""
    if source_dir is not None:
        copy_companions(source_dir, directory / "tokenizer")
    workdir.save_model(model, directory)


def copy_companions(source: str | Path, directory: Path) -> None:
    """Copies the files of COMPANIONS from beside a published checkpoint, or from the tokenizer/ of a workdir."""
    beside = tokenizer_directory(source)
    if not os.path.isdir(beside):
        raise InputError(f"source_dir {source}: no such directory")
    for file in sorted({file for pattern in COMPANIONS for file in beside.glob(pattern) if file.is_file()}):
        directory.mkdir(exist_ok=True)
        shutil.copyfile(file, directory / file.name)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` at the end and vanishes on any failure; `path` may only be empty."""
    if is_bucket(path):
        require_reachable(path)
        if files_below(path):
            raise InputError(f"{path}: there is something already; choose another place")
        with atomic_directory(path) as temporary:
            yield temporary
        return
    try:
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    if "\0" in str(path):
        raise InputError(f"{str(path)!r}: cannot be written (it has a NUL); choose another place")
    if taken:
        raise InputError(f"{path}: exists and is not an empty directory; choose another place")
    with atomic_directory(path.absolute()) as temporary:
        yield temporary


def _read_json(directory: Path) -> dict:
    return parse_json(hf_config.read_config_text(directory), str(directory / "config.json"))


def _is_workdir(config: dict) -> bool:
    return "model" in config and "model_type" not in config


def _load_workdir(directory: Path, dtype: str | None, mesh, quantize: str | None) -> Transformer:
    """The newest checkpoint of a run: parameters as stored and the run's compute dtype, or both as given."""
    if workdir.load_config(directory).get("lora", {}).get("rank"):
        return _load_adapted(directory, dtype, mesh, quantize)
    model = workdir.load_model(directory, mesh, dtype)
    if quantize:
        with under(mesh):
            model = jax.jit(quantized.quantize, static_argnums=1)(model, quantize)
    return model if dtype is None else with_dtype(model, dtype)


def _load_adapted(directory: Path, dtype: str | None, mesh, quantize: str | None) -> Transformer:
    """The adapters of a run's newest checkpoint on the base that its config names, which must be as it was."""
    raw, where = workdir.load_config(directory), directory / "config.json"
    check_fields(Lora, raw["lora"], f"{where}: config.lora")
    c, base = Lora(**raw["lora"]), mirror.copied(str(raw.get("train", {}).get("init_from", "")))
    if not base.is_dir():
        raise InputError(f"{where}: config.train.init_from, the base of its adapters, is {base}, which is not there")
    if c.fingerprint != peft.fingerprint(base):
        raise InputError(f"{where}: its adapters were trained on another model than the one that is in {base} now")
    model = _load(base, dtype, mesh, quantize, lambda _: None)
    if dtype is None:
        model = with_config(model, model_config(raw["model"]))
    with under(mesh):
        made = jax.jit(lambda key: lora.adapters_of(lora.attach(model, c, key)))(jax.random.key(0))
    like = {name: x for name, x in workdir.named_leaves(lora.with_adapters(model, made)) if lora.is_trainable(name)}
    read = workdir.load_parameters(directory, workdir.concrete(like, mesh), mesh)
    model = lora.with_adapters(model, made)
    leaves = [read.get(name, x) for name, x in workdir.named_leaves(model)]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def _compute_dtype(stored: dict[str, files.Stored], directory: Path) -> str:
    kinds = {tensor.dtype for tensor in stored.values()}
    if "F16" in kinds:
        raise InputError(f"{directory}: its tensors are float16, which is not computed in; load with dtype float32")
    return "bfloat16" if kinds == {"BF16"} else "float32"


@jax.jit
def _layer(x: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


def _whole(x: jax.Array, layer: int | None) -> np.ndarray:
    """A parameter, or one layer of it, gathered to this host."""
    part = jnp.copy(x) if layer is None else _layer(x, layer)  # never x itself: an array keeps what was fetched of it
    if not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)


def _token_ids(path: Path) -> dict[str, int]:
    """The tokens that a tokenizer.json adds, {text: id}; none where there is no such file."""
    if not os.path.lexists(path):
        return {}
    added = read_json(path).get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise InputError(f"{path}: added_tokens is not a list of tokens; copy it again")
    for token in added:
        text, id = token.get("content"), token.get("id")
        if not isinstance(text, str) or type(id) is not int or not 0 <= id < 2**31:
            raise InputError(f"{path}: added_tokens gives {str(text)[:40]!r} the id {str(id)[:40]}; copy it again")
    return {token["content"]: token["id"] for token in added}


def _size(text: str | int) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", str(text).upper())
    size = float(match[1]) * _BYTES[match[2] or ""] if match else 0
    if not match or not 1 <= size < 2**63:
        raise InputError(f"max_shard_size {text!r}: write a number of bytes such as '5GB' or '500MB'")
    return int(size)


def _float_name(dtype) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "bfloat16"):
        raise InputError(f"dtype {name!r} is not one of float32, bfloat16")
    return name
