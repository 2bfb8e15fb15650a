"""Orbax checkpoints of a run: saved in the background, restored on any mesh, kept with the resolved config.

A workdir holds checkpoints/STEP/{model,optimizer,guard,checksums.json}, config.json and the tokenizer. A checkpoint
carries the config, too.
"""

import itertools
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from llada_jax.config import RunConfig, differences, run_config
from llada_jax.fields import InputError
from llada_jax.files import damage, write_checksums
from llada_jax.interop.workdir import frugal, load_config, named_leaves, readable, root_cause, saved_steps
from llada_jax.parallel import processes
from llada_jax.training.monitor import Events
from llada_jax.training.step import TrainState

_WRITING, _REMOVING, _DAMAGED = ".writing", ".removing", ".damaged"  # behind the step, until it is complete or after

# What may change between two runs in one workdir; everything else is refused.
_HARMLESS = (
    "config.train.log_every", "config.train.eval_every", "config.train.sample_every", "config.train.sample_prompt",
    "config.train.microbatches", "config.train.steps", "config.train.spike_sigma", "config.train.rollback_after",
    "config.train.rollback_rate", "config.train.stall_seconds", "config.data.threads", "config.data.on_damage",
    "config.checkpoint.", "config.mesh.", "config.model.remat", "config.model.attention_kernel",
)  # fmt: skip
_WITH_PERMISSION = ("config.optimizer.schedule",)  # what may with --allow_config_change


class Checkpointer:
    """Saves in the background, keeps the newest few and every so many for good, finds the newest that is undamaged.

    A checkpoint gets its name when it is complete and its checksums are written: what was being written when the
    process was killed has another name, and goes when the next run begins.
    """

    def __init__(self, workdir: str | Path, config: RunConfig):
        self._config, self._options = config.to_dict(), config.checkpoint
        self._directory = Path(workdir).resolve() / "checkpoints"
        self._events = Events(workdir)
        self._saving: threading.Thread | None = None
        self._failure = ""  # of the last save
        processes.on_first_process(self._sweep)

    def newest(self) -> int | None:
        """The newest step whose files are as they were written; damaged ones are moved aside. None: there is none.

        Raises InputError when there were some and none is left.
        """
        moved = []
        while (step := processes.on_first_process(lambda: max(saved_steps(self._directory), default=None))) is not None:
            found = damage(self._place(step), jax.process_index(), jax.process_count())
            causes = list(filter(None, processes.all_gather(found)))
            if not causes:
                return step
            moved.append(processes.on_first_process(lambda step=step, cause=causes[0]: self._move_aside(step, cause)))
        if moved:
            raise InputError(
                f"{self._directory}: every checkpoint was damaged and is moved aside ({', '.join(moved)}); copy one "
                "back, or run again to begin at step 0"
            )
        return None

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a checkpoint, as arrays sharded like those of `like`, and the notes saved with it.

        An old one without a guard takes that of `like`.
        """
        parts, place = _parts(like), str(self._place(step))
        with readable(self._place(step)), frugal(jax.tree.leaves(like)):
            stored: Any = ocp.checkpointables_metadata(place)
            wanted = {part: tree for part, tree in parts.items() if part != "guard" or part in stored.metadata}
            parts |= ocp.load_checkpointables(place, _abstract(wanted))
        leaves = [parts[part][name] for part, name in _names(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), (stored.custom_metadata or {}).get("notes", {})

    def due(self, step: int) -> bool:
        return step % self._options.every_steps == 0

    def save(
        self, step: int, state: TrainState, notes: dict[str, Any] | None = None, *,
        first: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Starts saving, with `notes` in JSON's types; the arrays are copied, so training may go on.

        first: what must have been done before the checkpoint is visible; done in the background, too. Waits for an
        earlier save. What fails is an event, and does not end the run: the next save tries again.
        """
        self.wait()
        processes.on_first_process(self._make_room)
        self._failure = ""
        context = frugal(jax.tree.leaves(state))
        context.atomicity.mode = "commit_file"  # no renaming: that is done here, after the checksums
        metadata = {"config": self._config, "notes": notes or {}}
        try:
            with context:
                writing = ocp.save_checkpointables_async(
                    str(self._place(step, _WRITING)), _parts(state), custom_metadata=metadata
                )
        except Exception as error:
            self._report_failure(step, error)
            return
        self._saving = threading.Thread(target=self._complete, args=(step, writing, first), daemon=True)
        self._saving.start()

    def finish(self) -> None:
        """Waits for the last save on every process; raises InputError if it failed."""
        self.wait()
        with processes.all_or_none():
            if self._failure:
                raise InputError(
                    f"{self._directory}: the last save failed ({self._failure}); free some space, then run it again: "
                    "it continues from the checkpoint before"
                )

    def close(self) -> None:
        """Lets a save that is under way come to its end, unless that needs other processes."""
        if jax.process_count() == 1:
            self.wait()
        if processes.is_first() and self._failure:  # then threads of TensorStore go on writing for a while
            quiet = 0
            while quiet < 10:
                quiet = 0 if any(self._directory.glob(f"*{_WRITING}")) else quiet + 1
                self._sweep()
                time.sleep(0.1)

    def _complete(self, step: int, writing, first: Callable[[], None]) -> None:
        """In the background: waits for Orbax on all processes; the first one gives the checkpoint its name."""
        try:
            writing.result()
            first()
            if processes.is_first():
                write_checksums(self._place(step, _WRITING))
                self._place(step, _WRITING).rename(self._place(step))
                self._remove_old()
        except Exception as error:
            self._report_failure(step, error)

    def _report_failure(self, step: int, error: Exception) -> None:
        self._failure = root_cause(error)
        action = "goes on with the checkpoints before; the next save tries again"
        if processes.is_first():
            self._sweep()  # before anything else is written to what may be a full disk
            self._tell("save failed", step, self._failure, action)

    def wait(self) -> None:
        """Returns when nothing is being saved any more, whether it went well or not."""
        if self._saving is not None:
            self._saving.join()
        self._saving = None

    def _place(self, step: int, suffix: str = "") -> Path:
        return self._directory / f"{step}{suffix}"

    def _move_aside(self, step: int, cause: str) -> str:
        suffixes = itertools.chain([_DAMAGED], (f"{_DAMAGED}{i}" for i in itertools.count(2)))
        place = next(path for path in (self._place(step, suffix) for suffix in suffixes) if not path.exists())
        self._place(step).rename(place)
        self._tell("checkpoint damaged", step, cause, f"moved to {place.name}; the one before is taken")
        return place.name

    def _make_room(self) -> None:
        self._sweep()
        self._remove_old()  # where `keep` is smaller than it was

    def _remove_old(self) -> None:
        every, steps = self._options.keep_every_steps, sorted(saved_steps(self._directory))
        for step in steps[: -self._options.keep]:
            if not every or step % every:
                self._place(step).rename(self._place(step, _REMOVING))  # so that none is ever seen half removed
                shutil.rmtree(self._place(step, _REMOVING))

    def _sweep(self) -> None:
        """Removes what was not written, or not removed, to the end."""
        for pattern in (f"*{_WRITING}", f"*{_REMOVING}", "*.orbax-checkpoint-tmp"):
            for path in self._directory.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _tell(self, event: str, step: int, cause: str, action: str) -> None:
        print(f"step {step}: {event}: {cause}; {action}", file=sys.stderr)
        try:
            self._events.write(event, step=step, cause=cause, action=action)
        except OSError as error:  # the disk is still full
            print(f"events.jsonl: {error.strerror}; the line above is not in it", file=sys.stderr)


def discard_after(workdir: str | Path, step: int) -> int:
    """Removes the checkpoints after `step`, save the oldest if there is none before; the newest left, 0 if none.

    For one process alone, while no Checkpointer is open.
    """
    directory = Path(workdir) / "checkpoints"
    steps = sorted(saved_steps(directory))
    kept = [one for one in steps if one <= step] or steps[:1]
    for one in steps[len(kept) :]:  # renamed first, so that none is ever seen half removed
        shutil.rmtree((directory / str(one)).rename(directory / f"{one}{_REMOVING}"))
    return kept[-1] if kept else 0


def claim_workdir(workdir: str | Path, config: RunConfig, *, allow_change: bool = False) -> None:
    """Writes config.json into a new workdir; refuses one that holds a run with another model, data or recipe.

    allow_change: the learning rate may differ. What differs is an event. For one process alone.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    changed = []
    if (workdir / "config.json").exists():
        changed = differences(_with_defaults(load_config(workdir)), json.loads(json.dumps(config.to_dict())))
        refused = [line for line in changed if not line.startswith(_HARMLESS)]
        if refused and allow_change:
            refused = [line for line in refused if not line.startswith(_WITH_PERMISSION)]
        elif refused and all(line.startswith(_WITH_PERMISSION) for line in refused):
            raise InputError(f"{workdir}: {'; '.join(refused)}; --allow_config_change continues with the new one")
        if refused:
            raise InputError(
                f"{workdir} holds another run: {'; '.join(refused)}. Choose another --workdir, or undo the change"
            )
    temporary = workdir / "config.json.tmp"
    temporary.write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True))
    temporary.replace(workdir / "config.json")
    if changed:
        print(f"{workdir}: continuing with {'; '.join(changed)}", file=sys.stderr)
        step = max(saved_steps(workdir / "checkpoints"), default=0)
        Events(workdir).write("config changed", step=step, cause="; ".join(changed), action="continues with the new")


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
        part = "model" if part == "trainable" else part
        names.append((part, rest) if part in ("model", "guard") else ("optimizer", name))
    return names


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
