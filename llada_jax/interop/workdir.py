"""The workdir of a run: its config, its checkpoints, and the model that is in them.

A workdir holds checkpoints/STEP/{model,optimizer,guard,checksums.json,commit_success.txt}, config.json and the
tokenizer. A checkpoint carries the config, too.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from llada_jax.config import run_config
from llada_jax.fields import InputError
from llada_jax.files import COMMIT, damage, read_json, require_files, write_checksums
from llada_jax.model import quantize as quantized
from llada_jax.model.config import ModelConfig, model_config
from llada_jax.model.transformer import Transformer
from llada_jax.parallel import processes
from llada_jax.parallel.mesh import require_divides, require_mesh
from llada_jax.storage import buckets


def saved_steps(directory: Path) -> list[int]:
    """The steps of which there is a checkpoint in a directory that Orbax has completed, in no order."""
    if buckets.is_bucket(directory):
        files = buckets.files_below(directory)
        names = [name for name in {file.partition("/")[0] for file in files} if name.isascii() and name.isdigit()]
        return [int(name) for name in names if str(int(name)) == name and f"{name}/{COMMIT}" in files]
    if not os.path.isdir(directory):
        return []
    names = [path.name for path in directory.iterdir() if path.name.isascii() and path.name.isdigit()]
    return [int(name) for name in names if str(int(name)) == name and (directory / name / COMMIT).is_file()]


def place_of(workdir: str | Path, step: int | None = None) -> Path:
    """The directory of a checkpoint, by default the newest. Raises InputError if there is none."""
    path = buckets.path_of(workdir)
    directory = require_utf8(path if buckets.is_bucket(path) else path.resolve()) / "checkpoints"
    steps = sorted(saved_steps(directory))
    if not steps:
        raise InputError(f"{directory}: no complete checkpoint in it yet")
    if step not in (None, *steps):
        raise InputError(f"{directory}: no checkpoint of step {step} in it; there are {', '.join(map(str, steps))}")
    return directory / str(steps[-1] if step is None else step)


def load_model(path: str | Path, mesh=None, dtype: str | None = "float32") -> Transformer:
    """The model of a workdir's newest undamaged checkpoint; sharded when a mesh is given.

    dtype: of parameters; None: as stored. The files of the model are compared with their checksums first. A damaged
    checkpoint is passed over with a warning. One parameter is read at a time, the large ones first, so that little
    memory is needed beside the model's own. With several processes and a mesh, all must call it. Raises InputError when
    the directory holds no checkpoint or only damaged ones.
    """
    config = model_config(load_config(path).get("model"))
    if not buckets.is_bucket(path) and not os.path.isdir(Path(path) / "checkpoints"):
        raise InputError(f"{path}: no checkpoints/ in it; give the --workdir of a training run")
    like = abstract_model(config, mesh)
    named = load_parameters(path, dict(named_leaves(like)), mesh, dtype)
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name, _ in named_leaves(like)])


def load_parameters(
    path: str | Path, like: dict[str, Any], mesh=None, dtype: str | None = None
) -> dict[str, jax.Array]:
    """Some parameters of a workdir's newest undamaged checkpoint, as `load_model` reads them.

    like: shape, dtype and sharding of each, by its name.
    """
    place = _undamaged(path, all_processes=mesh is not None)
    named: dict[str, jax.Array] = {}
    with readable(place):
        metadata: Any = ocp.checkpointables_metadata(str(place)).metadata
        stored = (metadata or {}).get("model")
        if not stored:
            raise InputError(f"{place}: holds no model; copy it again")
        for name, x in sorted(like.items(), key=lambda item: -item[1].size):
            found = stored.get(name)
            if found is None or found.shape != x.shape:
                what = "none" if found is None else f"shape {found.shape}"
                raise InputError(f"{place}: config.json makes {name} {x.shape}, the checkpoint holds {what} of it")
            one = {name: jax.ShapeDtypeStruct(x.shape, dtype or found.dtype, sharding=x.sharding)}
            context = frugal([x])
            context.pytree.loading.partial_load = True
            with context:
                named |= ocp.load_checkpointables(str(place), {"model": one})["model"]
    return named


def _undamaged(workdir: str | Path, all_processes: bool) -> Path:
    """The newest checkpoint whose model is as its checksums say; a warning names those that are not.

    all_processes: every process calls this, so that they divide the hashing and choose the same checkpoint.
    """
    newest = place_of(workdir)
    all_processes = all_processes and jax.process_count() > 1
    share, shares = (jax.process_index(), jax.process_count()) if all_processes else (0, 1)
    steps = sorted(saved_steps(newest.parent), reverse=True)
    if all_processes:
        steps = processes.on_first_process(lambda: steps)
    passed_over = []
    for step in steps:
        place = newest.parent / str(step)
        found = _damage(place, share, shares)[:300]
        causes = list(filter(None, processes.all_gather(found) if all_processes else [found]))
        if not causes:
            if passed_over and share == 0:
                print(f"{workdir}: {'; '.join(passed_over)}; the model of step {step} is taken", file=sys.stderr)
            return place
        passed_over.append(f"step {step} is damaged ({causes[0]})")
    raise InputError(f"{newest.parent}: {'; '.join(passed_over)}; copy one again, there is no other checkpoint")


def _damage(place: Path, share: int, shares: int) -> str:
    """What is wrong with the files that are read for the model, its own and the metadata of all parts; "" if nothing.

    Without checksums only what no checkpoint can lack.
    """
    if buckets.is_bucket(place):
        if not buckets.files_below(place / "model"):
            return "holds no model"
    else:
        if not os.path.isdir(place / "model"):
            return "holds no model"
        try:
            require_files(place)
        except InputError as error:
            return str(error)
    return damage(place, share, shares, only=lambda name: name.startswith("model/") or "/" not in name)


def save_model(model: Transformer, directory: Path) -> None:
    """Writes config.json and checkpoints/0 with this model and its checksums into a directory that exists."""
    leaves = dict(named_leaves(model))
    context = frugal(leaves.values(), ocdbt=False)
    context.atomicity.mode = "commit_file"
    with (
        _gone_on_failure(directory / "checkpoints") as place,
        ocp.training.Checkpointer(epath.Path(place).resolve(), context=context) as orbax,
    ):
        orbax.save_checkpointables(0, {"model": leaves})
    write_checksums(directory / "checkpoints" / "0")
    config = {"model": dataclasses.asdict(model.config)}
    (directory / "config.json").write_bytes(json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False).encode())


def require_utf8(path: Path) -> Path:
    """The path. Raises InputError for one that TensorStore cannot be given."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: checkpoints need a path in UTF-8; rename the directory") from error
    return path


@contextlib.contextmanager
def _gone_on_failure(directory: Path) -> Iterator[Path]:
    """Removes the directory if the block fails; TensorStore's threads go on writing to it for a while after that."""
    try:
        yield directory
    except BaseException:
        quiet = 0
        while quiet < 10:
            quiet = 0 if directory.exists() else quiet + 1
            shutil.rmtree(directory, ignore_errors=True)
            time.sleep(0.1)
        raise


@contextlib.contextmanager
def readable(place: Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise for missing and damaged files into an InputError of one line."""
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

    By default it encodes all of them before the first byte goes to the disk. Here the arrays in flight hold one
    gigabyte together, or are a single one. ocdbt=False: each chunk of an array is encoded to a file of its own, only
    some at a time; OCDBT packs chunks into large files, and keeps the whole of an array for that.
    """
    largest = max(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
    context = ocp.Context()
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = max(largest, 2**30) + 1
    context.array.saving.use_ocdbt = ocdbt
    context.array.saving.storage_options.chunk_byte_size = 2**26  # so large that malloc gives its memory back
    return context


def abstract_model(config: ModelConfig, mesh, quantize: str | None = None) -> Transformer:
    """The shapes, dtypes and shardings of a model's parameters, quantised or as ever; no parameter is made.

    The shardings are concrete: eval_shape alone gives those of an abstract mesh, which Orbax rejects.
    """
    make: Any = lambda key: (
        quantized.quantize(Transformer(config, key), quantize) if quantize else Transformer(config, key)
    )
    if mesh is None:
        return concrete(jax.eval_shape(make, jax.random.key(0)), None)
    require_mesh(mesh)
    require_divides(config, mesh)
    with jax.set_mesh(mesh):
        return concrete(jax.eval_shape(make, jax.random.key(0)), mesh)


def concrete(like, mesh):
    """A tree of shapes and dtypes with shardings of devices that are there; without a mesh, of the first."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda x: device if mesh is None else jax.sharding.NamedSharding(mesh, x.sharding.spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), like)


def load_config(workdir: str | Path) -> dict:
    """The resolved config of a run."""
    path = buckets.path_of(workdir) / "config.json"
    if not (buckets.exists(path) if buckets.is_bucket(path) else os.path.lexists(path)):
        raise InputError(f"{workdir}: no config.json in it; give the --workdir of a training run")
    config = read_json(path)
    for group in run_config():
        if not isinstance(config.get(group, {}), dict):
            raise InputError(f"{path}: config.{group} is {config[group]!r}, not a group of fields")
    return config


def named_leaves(tree) -> list[tuple[str, jax.Array]]:
    """The arrays of a tree under the names that a checkpoint has for them, such as "blocks.q_proj"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    return [(name(path), leaf) for path, leaf in leaves]
