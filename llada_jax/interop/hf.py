"""Published checkpoints as models and back, one tensor at a time."""

import dataclasses
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax import checkpoint
from llada_jax.config import InputError, ModelConfig
from llada_jax.interop import hf_config, names
from llada_jax.interop import safetensors_io as files
from llada_jax.model import Transformer

# What travels with a model besides its weights: the tokenizer, generation settings, and the code that auto_map names.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.model",
    "chat_template*", "generation_config.json", "modeling_*.py", "configuration_*.py",
)  # fmt: skip

_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Progress = Callable[[int], object]  # is told the bytes of each tensor that is done, such as tqdm.update


def load(path: str | Path, dtype=None, mesh=None, *, progress: Progress = lambda _: None) -> Transformer:
    """The model in a directory: a published checkpoint (config.json, .safetensors) or a workdir of a run.

    dtype: "float32" or "bfloat16", of parameters and of compute; None: parameters as stored, compute as the stored
    embedding. mesh: an explicit mesh over which the parameters are born sharded, each process reading its own part.
    Raises InputError for a file that is broken, a tensor that is missing or too many, a shape that contradicts
    config.json, and every option of config.json that this model cannot compute.
    """
    directory = Path(path)
    if dtype is not None:
        dtype = _float_name(dtype)
    text = hf_config.read_text(directory)
    if "model" in (raw := hf_config.parse(text, str(directory / "config.json"))) and "model_type" not in raw:
        return _load_workdir(directory, dtype, mesh)
    stored = files.read_directory(directory)
    config = hf_config.read_config(
        text, str(directory / "config.json"), dtype or _stored_dtype(stored, raw), _token_ids(directory)
    )
    parts = _check(config, stored, directory)
    like = checkpoint.abstract_model(config, mesh)
    leaves = []
    for name, leaf in checkpoint.named_leaves(like):
        leaf_dtype = files.DTYPES[_one_dtype(name, parts[name], dtype)] if dtype is None else jnp.dtype(dtype)
        leaves.append(_parameter(leaf, leaf_dtype, name, parts[name], progress))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def save_hf(
    model: Transformer, path: str | Path, max_shard_size: str | int = "5GB", *,
    source_dir: str | Path | None = None, progress: Progress = lambda _: None,
) -> None:  # fmt: skip
    """Writes a published checkpoint: config.json, model*.safetensors in the dtype of the parameters, an index if many.

    What was loaded and not trained comes back byte for byte. source_dir: a published checkpoint or a workdir whose
    tokenizer and generation settings come along. The directory appears when it is complete. Raises InputError when it
    exists and is not empty, for an unreadable size, and for a model that no published format expresses. With several
    processes all must call it; the first writes.
    """
    path, config = Path(path), model.config
    leaves = dict(checkpoint.named_leaves(model))
    text = hf_config.write_config(config, _float_name(leaves["wte"].dtype))
    tensors = {t.name: t for t in names.tensors(config)}
    layout = [(t.name, _file_dtype(leaves[t.parameter].dtype), t.shape) for t in tensors.values()]
    shards = _shards(layout, _size(max_shard_size))
    companions = [] if source_dir is None else _companions(Path(source_dir))

    def contents(shard) -> Iterator[np.ndarray]:
        for name, _, _ in shard:
            array = _whole(leaves[tensors[name].parameter], tensors[name].layer)
            yield array
            progress(array.nbytes)

    if jax.process_index() != 0:
        for _ in itertools.chain.from_iterable(map(contents, shards.values())):
            pass
    else:
        with new_directory(path) as temporary:
            for file, shard in shards.items():
                files.write_file(temporary / file, shard, contents(shard))
            if len(shards) > 1:
                (temporary / files.INDEX).write_text(_index(shards))
            for companion in companions:
                shutil.copyfile(companion, temporary / companion.name)
            (temporary / "config.json").write_bytes(text.encode())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_hf")
