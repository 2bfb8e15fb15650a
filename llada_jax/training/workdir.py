"""Whose a workdir is: one run at a time, and until something else is chosen always the same run.

A workdir without a checkpoint is nobody's: whatever a start that failed, or was killed, has left there is made again.
"""

import json
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from llada_jax import cli
from llada_jax.config import RunConfig, check_config, differences, run_config
from llada_jax.fields import InputError, RunFailed
from llada_jax.files import is_alive, read_json, write_atomic
from llada_jax.interop.workdir import load_config, saved_steps
from llada_jax.storage import buckets
from llada_jax.storage.mirror import Workdir
from llada_jax.training import optimizer
from llada_jax.training.monitor import Events, read_goodput

LEASE_SECONDS = 60.0  # without a sign of life, after which a run counts as gone
_RENEW_SECONDS = 10.0

# What may change between two runs in one workdir; everything else is refused.
_HARMLESS = (
    "config.train.log_every", "config.train.eval_every", "config.train.sample_every", "config.train.sample_prompt",
    "config.train.microbatches", "config.train.spike_sigma", "config.train.rollback_after",
    "config.train.rollback_rate", "config.train.stall_seconds", "config.train.init_from", "config.data.path",
    "config.data.threads", "config.data.on_damage", "config.data.cache_dir", "config.checkpoint.",
    "config.mesh.", "config.model.remat",
    "config.model.attention_kernel", "config.train.steps",
)  # fmt: skip
_SCHEDULE = "config.optimizer.schedule"  # may with --allow_config_change


class Lease:
    """lease.json says who trains in a workdir, and is renewed while that lives: a killed run leaves nothing behind.

    A file, not a lock of the operating system: buckets and some network file systems have none. For the first process
    alone.
    """

    def __init__(self, workdir: Path):
        """Takes the workdir, of this machine or in a bucket. Raises InputError if another run trains there."""
        self._workdir, self._path = workdir, workdir / "lease.json"
        self._own = {"run": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        other = self._read()
        if other and not self._is_gone(other):
            raise InputError(
                f"{workdir}: process {other['pid']} on {other['host']} trains there; stop that, or choose another "
                "--workdir"
            )
        self._made = not buckets.is_bucket(workdir) and not workdir.exists()
        try:
            if not buckets.is_bucket(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # below /proc, say
            raise InputError(f"{workdir}: can't be made there; choose another --workdir") from error
        self._renew()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def confirm(self) -> None:
        """Raises InputError if another run has taken the workdir at the same moment; some seconds after the start."""
        other = self._read()
        if other and other["run"] != self._own["run"]:
            raise InputError(f"{self._workdir}: process {other['pid']} on {other['host']} began there just now, too")

    def release(self) -> None:
        """Gives the workdir back, and takes it away if it was made for this run and holds nothing."""
        self._stop.set()
        self._thread.join(_RENEW_SECONDS)
        other = self._read()
        if other is not None and other["run"] == self._own["run"]:
            buckets.remove(self._path) if buckets.is_bucket(self._path) else self._path.unlink(missing_ok=True)
        if self._made and self._workdir.is_dir() and not any(self._workdir.iterdir()):
            self._workdir.rmdir()

    def _read(self) -> dict[str, Any] | None:
        if buckets.is_bucket(self._path) and not buckets.exists(self._path):  # raises if that cannot be known
            return None
        try:
            found = read_json(self._path)
            return {name: found[name] for name in (*self._own, "time")}
        except (InputError, KeyError):  # none, or nothing that a run has written
            return None

    def _renew(self) -> None:
        write_atomic(self._path, json.dumps({**self._own, "time": time.time()}))

    def _keep(self) -> None:
        while not self._stop.wait(_RENEW_SECONDS):
            try:
                other = self._read()
                if other and other["run"] != self._own["run"]:
                    cli.say(f"error: {self._workdir}: was taken over by process {other['pid']} on {other['host']}")
                    cli.end(1)  # at once: whatever this run still wrote would be in the other's way
                self._renew()
            except (OSError, RunFailed):
                pass  # a full disk or a bucket that is away: tried again, and others may not get at it either

    def _is_gone(self, other: dict[str, Any]) -> bool:
        """Whether the run that wrote a lease lives no more. One on another machine is watched for a while."""
        if other["machine"] == self._own["machine"]:
            return not is_alive(other["pid"])
        if abs(time.time() - other["time"]) > 10 * LEASE_SECONDS:  # no clock is that wrong
            return True
        cli.say(f"{self._workdir}: looking for {LEASE_SECONDS:.0f} s whether the run on {other['host']} still lives")
        end = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < end:
            time.sleep(1)
            if self._read() != other:
                return self._read() is None
        return True


def _machine() -> str:
    """What must be equal for a process id to mean the same process: host, boot and, in containers, namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def begun(home: Workdir, config: RunConfig) -> dict[str, Any] | None:
    """The config of the run that a workdir holds; None if there is no checkpoint, so that the workdir is nobody's.

    Raises InputError where the workdir holds something else, where the checkpoints of a run are gone, and for fewer
    steps than were made. For one process alone.
    """
    reached = max(saved_steps(home.checkpoints), default=None)
    path = home.local / "config.json"
    stored = load_config(home.local) if path.exists() else None
    path = home.remote / "config.json"
    if stored is not None and not {"data", "train", "optimizer"} <= stored.keys():
        raise InputError(f"{path}: of no training run, and a run would replace it; choose another --workdir")
    if reached is None:
        if saved := _saved(home.local):
            raise InputError(
                f"{home.checkpoints}: holds no checkpoint, but this run had saved step {saved}; mount or copy "
                "it back, choose another --workdir, or remove goodput.json to begin at step 0"
            )
        return None
    if stored is None:
        raise InputError(f"{home}: has checkpoints and no config.json; copy that back, or choose another --workdir")
    if config.train.steps < reached:
        raise InputError(f"config.train.steps is {config.train.steps}, but {home} has reached step {reached}")
    defaults = json.loads(json.dumps(run_config().to_dict()))  # of fields that this version has added since
    whole = {group: fields | stored.get(group, {}) for group, fields in defaults.items()}
    try:
        check_config(ConfigDict(whole))
    except (InputError, ValueError) as error:  # ValueError: a name that ml_collections refuses
        raise InputError(f"{path}: {' '.join(str(error).split())}; copy the file again") from error
    return whole


def _saved(workdir: Path) -> int:
    """The newest checkpoint that goodput.json knows of; 0 if it knows of none."""
    try:
        return int(read_goodput(workdir).get("saved", 0))
    except (InputError, ValueError, TypeError):
        return 0


def reserve(workdir: Path, config: RunConfig) -> bool:
    """Notes the config before data is prepared, and removes what was prepared for another one; whether a start of a run
    that never saved was there before. For one process alone, in a workdir that is nobody's."""
    path = workdir / "config.json"
    now = json.loads(json.dumps(config.to_dict()))
    was_begun = path.exists()
    if was_begun:
        before = load_config(workdir)
        if before.get("data") != now["data"] or before.get("train", {}).get("init_from") != now["train"]["init_from"]:
            for name in ("data", "tokenizer"):
                shutil.rmtree(workdir / name, ignore_errors=True)
        (workdir / "inputs.json").unlink(missing_ok=True)
    write_atomic(path, json.dumps(now, indent=1, sort_keys=True))
    return was_begun


def claim(home: Workdir, config: RunConfig, stored: dict[str, Any] | None, *, allow_change: bool = False) -> None:
    """Writes config.json, all of it resolved; refuses to continue a run with another model, data or recipe.

    stored: the config of the run that is there; None: none is. allow_change: the learning rate may differ. What differs
    is an event. For one process alone.
    """
    changed = []
    if stored is not None:
        now = json.loads(json.dumps(config.to_dict()))
        reached = max(saved_steps(home.checkpoints), default=0)
        changed = differences(stored, now)
        rates = _moved_rates(stored, now, reached)
        refused = [line for line in changed if not line.startswith(_HARMLESS) and not _same_mixture(line, stored, now)]
        others = [line for line in refused if not line.startswith(_SCHEDULE)]
        if others:
            raise InputError(
                f"{home} holds another run: {'; '.join(others)}. Choose another --workdir, or undo the change"
            )
        if (refused or rates) and not allow_change:
            raise InputError(
                f"{home}: {'; '.join([*refused, *rates])}; --allow_config_change continues with the new one"
            )
    write_atomic(home.local / "config.json", json.dumps(config.to_dict(), indent=1, sort_keys=True))
    if changed:
        print(f"{home}: continuing with {'; '.join(changed)}", file=sys.stderr)
        Events(home.local).write(
            "config changed", step=reached, cause="; ".join(changed), action="continues with the new"
        )


def _moved_rates(stored: dict[str, Any], now: dict[str, Any], reached: int) -> list[str]:
    """How another number of steps changes the learning rate that is to come: phases may end at a percentage of it."""
    old, new = stored["train"]["steps"], now["train"]["steps"]
    if old == new or stored["optimizer"]["schedule"] != now["optimizer"]["schedule"]:
        return []
    tokens = now["train"]["batch_size"] * now["data"]["row_length"]
    phases = now["optimizer"]["schedule"]
    before, after = (
        lambda step, n=n: np.asarray(optimizer.make_schedule(phases, total_steps=n, tokens_per_step=tokens)(step))
        for n in (old, new)
    )
    steps = np.unique(np.linspace(reached, max(old, new), 4096).astype(np.int64))
    moved = steps[before(steps) != after(steps)]
    if not len(moved):
        return []
    rates = f"{float(before(moved[0])):.3g} -> {float(after(moved[0])):.3g}"
    return [
        f"config.train.steps: {old} -> {new} moves the phases in % of {_SCHEDULE} (rate of step {moved[0]}: {rates})"
    ]


def _same_mixture(line: str, stored: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a difference is that of moved directories of the mixture; inputs.json says whether they are the same."""
    weights = [[weight for _, weight in config["data"]["mixture"]] for config in (stored, now)]
    return line.startswith("config.data.mixture:") and weights[0] == weights[1]
