"""Orbax checkpoints of a run: saved in the background, restored on any mesh, kept with the resolved config.

A workdir holds checkpoints/STEP/{model,optimizer,guard}, config.json and the tokenizer. A checkpoint carries the
config, too.
"""

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from llada_jax.config import InputError, ModelConfig, RunConfig, differences, model_config, run_config
from llada_jax.model import Transformer
from llada_jax.sharding import require_divides, require_mesh
from llada_jax.train_step import TrainState

# What may change between two runs in one workdir; everything else is refused.
_HARMLESS = (
    "config.train.log_every", "config.train.eval_every", "config.train.sample_every", "config.train.sample_prompt",
    "config.train.microbatches", "config.train.steps", "config.data.threads", "config.checkpoint.", "config.mesh.",
    "config.model.remat", "config.model.attention_kernel", "config.train.spike_sigma", "config.train.rollback_after",
    "config.train.rollback_rate", "config.train.stall_seconds",
)  # fmt: skip


class Checkpointer:
    """Saves every so many steps without stopping the loop, keeps the newest few, restores the newest."""

    def __init__(self, workdir: str | Path, config: RunConfig):
        training: Any = ocp.training  # its policies do not match the types of its own protocol
        self._metadata = {"config": config.to_dict()}
        self._directory = Path(workdir).resolve() / "checkpoints"
        self._orbax = training.Checkpointer(
            epath.Path(self._directory),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(config.checkpoint.every_steps),
            preservation_policy=training.preservation_policies.LatestN(config.checkpoint.keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The newest step that was saved completely."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    def save(self, step: int, state: TrainState, *, force: bool = False) -> None:
        """Starts saving if it is time to (or with `force`); the arrays are copied, so training may go on."""
        if force and step == self.latest:
            return
        with frugal(jax.tree.leaves(state)):
            self._orbax.save_checkpointables_async(step, _parts(state), force=force, custom_metadata=self._metadata)

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, as arrays sharded like those of `like`; an old one without a guard takes that."""
        with _readable(self._directory / str(self.latest)), frugal(jax.tree.leaves(like)):
            parts, stored = _parts(like), self._orbax.checkpointables_metadata(None).metadata or {}
            wanted = {part: tree for part, tree in parts.items() if part != "guard" or part in stored}
            parts |= self._orbax.load_checkpointables(None, _abstract(wanted))
        return jax.tree.unflatten(
            jax.tree.structure(like),
            [parts[part][name] for part, name in _names(like)],
        )

    def close(self) -> None:
        """Waits for the last save; an error of the background writer is raised here. What was half written goes."""
        try:
            self._orbax.close()
        finally:
            if jax.process_index() == 0:
                for path in self._directory.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(path, ignore_errors=True)


def load_model(path: str | Path, mesh=None, dtype: str | None = "float32") -> Transformer:
    """The model of a workdir's newest checkpoint; sharded when a mesh is given. dtype: of parameters; None: as stored.

    One parameter is read at a time, the large ones first, so that little memory is needed beside the model's own.
    Raises InputError when the directory holds no checkpoint.
    """
    config = model_config(load_config(path).get("model"))
    directory = Path(path) / "checkpoints"
    if not directory.is_dir():
        raise InputError(f"{path}: no checkpoints/ in it; give the --workdir of a training run")
    like = abstract_model(config, mesh)
    named: dict[str, jax.Array] = {}
    with ocp.training.Checkpointer(epath.Path(directory).resolve()) as orbax:
        if orbax.latest is None:
            raise InputError(f"{directory}: no complete checkpoint in it yet")
        place = directory / str(orbax.latest.step)
        with _readable(place):
            metadata: Any = orbax.checkpointables_metadata(None).metadata
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
                    named |= orbax.load_checkpointables(None, {"model": one})["model"]
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name, _ in named_leaves(like)])


@contextlib.contextmanager
def _readable(place: Path) -> Iterator[None]:
    """Whatever Orbax and TensorStore raise for missing and damaged files becomes one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__ or root
        if not isinstance(root, Exception):  # Ctrl-C or a kill
            raise root from None
        text = " ".join(str(root).split())[:200] or type(root).__name__
        raise InputError(f"{place}: damaged or incomplete ({text}); remove it or copy it again") from error


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


def discard_after(workdir: str | Path, step: int) -> int:
    """Removes the checkpoints after `step`, save the oldest if there is none before; the newest left, 0 if none.

    For one process alone, while no Checkpointer is open.
    """
    directory = Path(workdir) / "checkpoints"
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())
    kept = [one for one in steps if one <= step] or steps[:1]
    for one in steps[len(kept) :]:  # renamed first, so that none is ever seen half removed
        removing = (directory / str(one)).rename(directory / f"{one}.orbax-checkpoint-tmp")
        shutil.rmtree(removing)
    return kept[-1] if kept else 0


def load_config(workdir: str | Path) -> dict:
    """The resolved config of a run."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir}: no config.json in it; give the --workdir of a training run")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a JSON object")
    return config


def claim_workdir(workdir: str | Path, config: RunConfig) -> None:
    """Writes config.json into a new workdir; refuses one that holds a run with another model, data or recipe.

    For one process alone.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / "config.json").exists():
        changed = differences(_with_defaults(load_config(workdir)), json.loads(json.dumps(config.to_dict())))
        refused = [line for line in changed if not line.startswith(_HARMLESS)]
        if refused:
            raise InputError(
                f"{workdir} holds another run: {'; '.join(refused)}. Choose another --workdir, or undo the change"
            )
        if changed:
            print(f"{workdir}: continuing with {'; '.join(changed)}", file=sys.stderr)
    temporary = workdir / "config.json.tmp"
    temporary.write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True, ensure_ascii=False))
    temporary.replace(workdir / "config.json")


def _with_defaults(config: dict) -> dict:
    """A stored config with the fields that this version added since, at their defaults."""
    defaults = json.loads(json.dumps(run_config().to_dict()))
    return {group: fields | config.get(group, {}) for group, fields in defaults.items()}


def _parts(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    parts: dict[str, dict[str, jax.Array]] = {"model": {}, "optimizer": {}, "guard": {}}
    for (part, name), leaf in zip(_names(state), jax.tree.leaves(state), strict=True):
        parts[part][name] = leaf
    return parts


def _names(state: TrainState) -> list[tuple[str, str]]:
    """(part, name) of each leaf: the model by itself, so that it can be read alone."""
    names = []
    for name, _ in named_leaves(state):
        part, _, rest = name.partition(".")
        names.append((part, rest) if part in ("model", "guard") else ("optimizer", name))
    return names


def named_leaves(tree) -> list[tuple[str, jax.Array]]:
    """The arrays of a tree under the names that a checkpoint has for them, such as "blocks.q_proj"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")  # noqa: E731
    return [(name(path), leaf) for path, leaf in leaves]


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
