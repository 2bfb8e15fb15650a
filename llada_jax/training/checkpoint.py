"""Orbax checkpoints of a run: saved in the background, kept by policy, restored on any mesh.

checkpoints/STEP is a checkpoint as long as Orbax's commit_success.txt is in it: the last file that is written and the
first that is removed, so that no directory is ever renamed (a bucket has none). Beside it lie model/, optimizer/,
guard/ and the checksums that each process writes after the commit; the run's config is in Orbax's metadata.
"""

import contextlib
import dataclasses
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from llada_jax.config import RunConfig
from llada_jax.fields import InputError, RunFailed
from llada_jax.files import COMMIT, checksums, damage, write_atomic, write_checksums
from llada_jax.interop.workdir import frugal, named_leaves, root_cause, saved_steps
from llada_jax.parallel import processes
from llada_jax.storage import buckets
from llada_jax.training.monitor import Events
from llada_jax.training.stability import fresh_state
from llada_jax.training.step import TrainState

_DAMAGED = "damaged.txt"  # in a checkpoint that was set aside: why, and how to use it nevertheless
_POLICIES = ocp.training.preservation_policies

# What Orbax and TensorStore say when the files may be whole but could not be read just now.
_NOT_DAMAGE = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "ABORTED",
)


class Checkpointer:
    """Saves in the background, keeps the newest few and every so many for good, restores the newest undamaged one."""

    def __init__(
        self, workdir: str | Path, config: RunConfig, events: Events, *,
        on_saved: Callable[[int], None] = lambda _: None,
    ):  # fmt: skip
        """workdir: of this machine, or in a bucket.

        on_saved: called in the background, on every process, with the step of each completed checkpoint.
        """
        self._config, self._options, self._on_saved = config.to_dict(), config.checkpoint, on_saved
        path = buckets.path_of(workdir)
        self._directory = (path if buckets.is_bucket(path) else path.resolve()) / "checkpoints"
        self._events = events
        self._orbax: ocp.training.Checkpointer | None = None
        self._saving: threading.Thread | None = None
        self._failure = ""  # of the last save
        processes.on_first_process(self._remove_incomplete)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The state of the newest undamaged checkpoint, with the shardings of `like`, and the notes saved with it.

        like: a state of jax.ShapeDtypeStruct. A damaged checkpoint is set aside: it stays where it is, without the file
        that makes it a checkpoint. None: there is no checkpoint. Raises InputError when all were damaged.
        """
        aside = []
        while (step := processes.on_first_process(lambda: max(saved_steps(self._directory), default=None))) is not None:
            place, restored = self._place(step), None
            cause = _first(damage(place, jax.process_index(), jax.process_count()))
            if not cause:
                restored, failure = _load(place, like)
                cause = _first(failure)
            if not cause:
                return restored
            aside.append(step)
            processes.on_first_process(lambda step=step, cause=cause: self._set_aside(step, cause))
        if aside:
            raise InputError(
                f"{self._directory}: every checkpoint is damaged, as {_DAMAGED} in {', '.join(map(str, aside))} says; "
                "copy one back, or remove the directory to begin at step 0"
            )
        return None

    def due(self, step: int) -> bool:
        return step % self._options.every_steps == 0

    def save(
        self, step: int, state: TrainState, notes: dict[str, Any] | None = None, *,
        before: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Starts saving, with `notes` in JSON's types; the arrays are copied, so training may go on.

        before: what must be on the disk before the checkpoint is; on the first process. Waits for an earlier save. What
        fails is an event, and does not end the run: the next save tries again.
        """
        self.wait()
        self._failure = ""
        parts = _parts(state)
        metadata = {"config": self._config, "notes": notes or {}}

        def prepare() -> None:
            self._remove_incomplete()
            before()

        try:
            processes.on_first_process(prepare)
            writing = self._open(parts).save_checkpointables_async(step, parts, force=True, custom_metadata=metadata)
            assert writing is not None, "Orbax skipped a save that was forced"
        except Exception as error:
            self._report_failure(step, error)
            return
        self._saving = threading.Thread(target=self._complete, args=(step, writing), daemon=True)
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

    def wait(self) -> None:
        """Returns when nothing is being saved any more, whether it went well or not."""
        if self._saving is not None:
            self._saving.join()
        self._saving = None

    def close(self) -> None:
        """Lets a save that is under way come to its end, unless that needs other processes."""
        if jax.process_count() == 1:
            self.wait()

    def _open(self, parts) -> ocp.training.Checkpointer:
        """Orbax's own checkpointer, made for the first save: until then this class may set checkpoints aside."""
        if self._orbax is None:
            context = frugal(jax.tree.leaves(parts))
            context.atomicity.mode = "commit_file"
            every = self._options.keep_every_steps
            policies: list[Any] = [_POLICIES.LatestN(self._options.keep)] + (
                [_POLICIES.EveryNSteps(every)] if every else []
            )
            policy: Any = _POLICIES.AnyPreservationPolicy(policies)
            self._orbax = ocp.training.Checkpointer(str(self._directory), context=context, preservation_policy=policy)
        return self._orbax

    def _complete(self, step: int, writing) -> None:
        """In the background: waits until Orbax has committed on all processes, then hashes what this one wrote."""
        try:
            writing.result()
        except Exception as error:
            self._report_failure(step, error)
            return
        try:
            write_checksums(self._place(step), jax.process_index())
        except (OSError, InputError, RunFailed) as error:  # it is complete without them, and only less sure
            print(f"step {step}: its checksums could not be written ({error})", file=sys.stderr)
        self._on_saved(step)

    def _report_failure(self, step: int, error: Exception) -> None:
        self._failure = root_cause(error)
        if processes.is_first():
            with contextlib.suppress(InputError, RunFailed):  # the bucket is away; the next save removes it
                self._remove_incomplete()  # before anything else is written to what may be a full disk
        action = "goes on with the checkpoints before; the next save tries again"
        self._tell("save failed", step, self._failure, action, own=not getattr(error, "shared", False))

    def _place(self, step: int) -> Path:
        return self._directory / str(step)

    def _set_aside(self, step: int, cause: str) -> None:
        place = self._place(step)
        write_atomic(place / _DAMAGED, f"{cause}\nTo use it again, copy it back whole, with its {COMMIT}.\n")
        _remove(place / COMMIT)
        self._tell("checkpoint damaged", step, cause, f"set aside, see {_DAMAGED}; the one before is taken")

    def _remove_incomplete(self) -> None:
        """Removes what a kill or a full disk left of a save or of a removal; not what was set aside."""
        if buckets.is_bucket(self._directory):
            files = buckets.files_below(self._directory)
            for name in {name.partition("/")[0] for name in files if "/" in name}:
                is_step = name.isascii() and name.isdigit()
                if is_step and f"{name}/{COMMIT}" not in files and f"{name}/{_DAMAGED}" not in files:
                    buckets.remove_below(self._directory / name)
        elif self._directory.is_dir():
            for place in self._directory.iterdir():
                is_step = place.name.isascii() and place.name.isdigit() and place.is_dir()
                if is_step and not (place / COMMIT).exists() and not (place / _DAMAGED).exists():
                    shutil.rmtree(place, ignore_errors=True)

    def _tell(self, event: str, step: int, cause: str, action: str, own: bool = False) -> None:
        if own or processes.is_first():
            print(f"step {step}: {event}: {cause}; {action}", file=sys.stderr)
        self._events.write(event, step=step, cause=cause, action=action, own=own)


def discard_after(workdir: str | Path, step: int) -> int:
    """Removes the checkpoints after `step`, save the oldest if there is none before; the newest left, 0 if none.

    For one process alone, while no Checkpointer is open.
    """
    directory = buckets.path_of(workdir) / "checkpoints"
    steps = sorted(saved_steps(directory))
    kept = [one for one in steps if one <= step] or steps[:1]
    for one in steps[len(kept) :]:
        _remove(directory / str(one) / COMMIT)  # first, so that none is ever taken half removed
        if buckets.is_bucket(directory):
            buckets.remove_below(directory / str(one))
        else:
            shutil.rmtree(directory / str(one))
    return kept[-1] if kept else 0


def _remove(path: Path) -> None:
    buckets.remove(path) if buckets.is_bucket(path) else path.unlink(missing_ok=True)


def _first(cause: str) -> str:
    """The first cause that any process has."""
    return next(filter(None, processes.all_gather(cause)), "")


def _load(place: Path, like: TrainState) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
    """((state, notes), "") of a checkpoint, or (None, why it is damaged). One without a guard gets a fresh one."""
    parts = _parts(like)
    try:
        with frugal(jax.tree.leaves(like)):
            stored: Any = ocp.checkpointables_metadata(str(place))
            wanted = {part: tree for part, tree in parts.items() if part != "guard" or part in stored.metadata}
            loaded = ocp.load_checkpointables(str(place), wanted)
    except Exception as error:
        is_damage = isinstance(error, ValueError | KeyError | TypeError | FileNotFoundError)
        if not is_damage or any(word in str(error) for word in _NOT_DAMAGE) or checksums(place):
            if buckets.is_bucket(place):
                raise RunFailed(f"{place}: cannot be read now ({root_cause(error)}); start the run again") from error
            raise  # checksums that are right say that the files are whole
        return None, f"cannot be loaded ({root_cause(error)})"
    if "guard" not in loaded:
        put = lambda x, like: jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])
        loaded["guard"] = jax.tree.map(put, dict(named_leaves(jax.device_get(fresh_state()))), parts["guard"])
    leaves = [loaded[part][name] for part, name in _names(like)]
    state = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return (state, (stored.custom_metadata or {}).get("notes", {})), ""


def _parts(state: TrainState) -> dict[str, dict[str, Any]]:
    state = dataclasses.replace(state, frozen=None)  # which is loaded from where it came
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "guard": {}}
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
