"""Orbax checkpoints of a run: saved in the background, restored on any mesh, kept with the resolved config.

A workdir holds checkpoints/STEP/{model,optimizer}, config.json and the tokenizer. A checkpoint carries the config, too.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from llada_jax.config import InputError, ModelConfig, RunConfig, differences, model_config
from llada_jax.model import Transformer
from llada_jax.train_step import TrainState

# What may change between two runs in one workdir; everything else is refused.
_HARMLESS = (
    "config.train.log_every", "config.train.eval_every", "config.train.sample_every", "config.train.sample_prompt",
    "config.train.microbatches", "config.train.steps", "config.data.threads", "config.checkpoint.", "config.mesh.",
    "config.model.remat", "config.model.attention_kernel",
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
        self._orbax.save_checkpointables_async(step, _parts(state), force=force, custom_metadata=self._metadata)

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, as arrays sharded like those of `like`."""
        parts = self._orbax.load_checkpointables(None, _abstract(_parts(like)))
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


def load_model(path: str | Path, mesh=None) -> Transformer:
    """The float32 model of a workdir's newest checkpoint; sharded when a mesh is given.

    Raises InputError when the directory holds no checkpoint.
    """
    config = model_config(load_config(path)["model"])
    directory = Path(path) / "checkpoints"
    if not directory.is_dir():
        raise InputError(f"{path}: no checkpoints/ in it; give the --workdir of a training run")
    like = abstract_model(config, mesh)
    with ocp.training.Checkpointer(epath.Path(directory).resolve()) as orbax:
        if orbax.latest is None:
            raise InputError(f"{directory}: no complete checkpoint in it yet")
        named = orbax.load_checkpointables(None, {"model": dict(named_leaves(like))})["model"]
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name, _ in named_leaves(like)])


def abstract_model(config: ModelConfig, mesh) -> Transformer:
    """Shapes with concrete shardings: eval_shape alone gives an abstract mesh, which Orbax rejects."""
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    with jax.set_mesh(mesh):
        like = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    concrete = lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec)  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=concrete(x)), like)


def load_config(workdir: str | Path) -> dict:
    """The resolved config of a run."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir}: no config.json in it; give the --workdir of a training run")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def claim_workdir(workdir: str | Path, config: RunConfig) -> None:
    """Writes config.json into a new workdir; refuses one that holds a run with another model, data or recipe."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / "config.json").exists():
        changed = differences(load_config(workdir), json.loads(json.dumps(config.to_dict())))
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


def _parts(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    parts: dict[str, dict[str, jax.Array]] = {"model": {}, "optimizer": {}}
    for (part, name), leaf in zip(_names(state), jax.tree.leaves(state), strict=True):
        parts[part][name] = leaf
    return parts


def _names(state: TrainState) -> list[tuple[str, str]]:
    """(part, name) of each leaf: the model by itself, so that it can be read alone."""
    names = []
    for name, _ in named_leaves(state):
        in_model = name.startswith("model.")
        names.append(("model", name.removeprefix("model.")) if in_model else ("optimizer", name))
    return names


def named_leaves(tree) -> list[tuple[str, jax.Array]]:
    """The arrays of a tree under the names that a checkpoint has for them, such as "blocks.q_proj"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")  # noqa: E731
    return [(name(path), leaf) for path, leaf in leaves]


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
