"""The workdir of a run: its config, its checkpoints, and the model that is in them.

A workdir holds checkpoints/STEP/{model,optimizer,guard,checksums.json,commit_success.txt}, config.json and the
tokenizer. A checkpoint carries the config, too.
"""

import contextlib
import errno
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from llada_jax.config import run_config
from llada_jax.fields import InputError
from llada_jax.files import COMMIT, read_json, require_files
from llada_jax.model.config import ModelConfig, model_config
from llada_jax.model.transformer import Transformer
from llada_jax.parallel.mesh import require_divides, require_mesh


def saved_steps(directory: Path) -> list[int]:
    """The steps of which there is a checkpoint in a directory that Orbax has completed, in no order."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir() if path.name.isascii() and path.name.isdigit()]
    return [int(name) for name in names if str(int(name)) == name and (directory / name / COMMIT).is_file()]


def place_of(workdir: str | Path, step: int | None = None) -> Path:
    """The directory of a checkpoint, by default the newest. Raises InputError if there is none."""
    directory = Path(workdir).resolve() / "checkpoints"
    steps = sorted(saved_steps(directory))
    if not steps:
        raise InputError(f"{directory}: no complete checkpoint in it yet")
    if step not in (None, *steps):
        raise InputError(f"{directory}: no checkpoint of step {step} in it; there are {', '.join(map(str, steps))}")
    return directory / str(steps[-1] if step is None else step)


def load_model(path: str | Path, mesh=None, dtype: str | None = "float32") -> Transformer:
    """The model of a workdir's newest checkpoint; sharded when a mesh is given. dtype: of parameters; None: as stored.

    One parameter is read at a time, the large ones first, so that little memory is needed beside the model's own.
    Raises InputError when the directory holds no checkpoint.
    """
    config = model_config(load_config(path).get("model"))
    directory = Path(path) / "checkpoints"
    if not directory.is_dir():
        raise InputError(f"{path}: no checkpoints/ in it; give the --workdir of a training run")
    place = place_of(path)
    like = abstract_model(config, mesh)
    named: dict[str, jax.Array] = {}
    require_files(place)
    with readable(place):
        metadata: Any = ocp.checkpointables_metadata(str(place)).metadata
        stored = (metadata or {}).get("model")
        if not stored:
            raise InputError(f"{place}: holds no model; copy it again")
        for name, x in sorted(named_leaves(like), key=lambda item: -item[1].size):
            found = stored.get(name)
            if found is None or found.shape != x.shape:
                told = "none" if found is None else f"shape {found.shape}"
                raise InputError(f"{place}: config.json makes {name} {x.shape}, the checkpoint holds {told} of it")
            one = {name: jax.ShapeDtypeStruct(x.shape, dtype or found.dtype, sharding=x.sharding)}
            context = frugal([x])
            context.pytree.loading.partial_load = True
            with context:
                named |= ocp.load_checkpointables(str(place), {"model": one})["model"]
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name, _ in named_leaves(like)])


@contextlib.contextmanager
def readable(place: Path) -> Iterator[None]:
    """Whatever Orbax and TensorStore raise for missing and damaged files becomes one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        message = f"{place}: damaged or incomplete ({root_cause(error)}); remove it or copy it again"
        raise InputError(message) from error


def root_cause(error: Exception) -> str:
    """One line of what made Orbax or TensorStore fail."""
    root: BaseException = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__ or root
    if not isinstance(root, Exception):  # Ctrl-C or a kill
        raise root from None
    text, full = " ".join(str(root).split()), os.strerror(errno.ENOSPC)
    return full.lower() if full in text else text[:200] or type(root).__name__


def frugal(arrays: Iterable[Any], *, ocdbt: bool = True) -> Any:
    """How Orbax saves and loads these arrays in little memory beside their own, as a context.

    By default it encodes all of them before the first byte goes to the disk. Here the arrays that are in flight hold
    a gigabyte, or are one. ocdbt=False: of those, too, only some chunks are encoded at a time, each to a file of its
    own; OCDBT packs chunks into large files, and keeps the whole of an array for that.
    """
    largest = max(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
    context = ocp.Context()
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = max(largest, 2**30) + 1
    context.array.saving.use_ocdbt = ocdbt
    context.array.saving.storage_options.chunk_byte_size = 2**26  # so large that malloc gives its memory back
    return context


def abstract_model(config: ModelConfig, mesh) -> Transformer:
    """Shapes with concrete shardings: eval_shape alone gives an abstract mesh, which Orbax rejects."""
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    require_mesh(mesh)
    require_divides(config, mesh)
    with jax.set_mesh(mesh):
        like = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    concrete = lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec)  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=concrete(x)), like)


def load_config(workdir: str | Path) -> dict:
    """The resolved config of a run."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir}: no config.json in it; give the --workdir of a training run")
    config = read_json(path)
    for group in run_config():
        if not isinstance(config.get(group, {}), dict):
            raise InputError(f"{path}: config.{group} is {config[group]!r}, not a group of fields")
    return config


def named_leaves(tree) -> list[tuple[str, jax.Array]]:
    """The arrays of a tree under the names that a checkpoint has for them, such as "blocks.q_proj"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")  # noqa: E731
    return [(name(path), leaf) for path, leaf in leaves]
