"""Several processes as one run: how they find each other, and how they fail together.

On one process everything here does nothing. On several, each runs the same program over its own devices; the first
writes. What only one may do (prepare data, claim a workdir) stands in `on_first_process`; what may go wrong on some
process only stands in `all_or_none`, so that no process waits for one that has given up.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax._src import distributed
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from llada_jax.fields import InputError

_LONGEST_WAIT = 7 * 24 * 3600 * 1000  # milliseconds that the others wait while one prepares data
_SHUTDOWN_SECONDS = 60  # after which a process that ends too early takes the others along
_HEARTBEAT_SECONDS = 30  # of silence, after which a process counts as dead and the others end, too (JAX: 100)
_MESSAGE_BYTES = 2048
_FAILED = "llada_jax/failed"  # under which the first process to fail on its own says so


def define_flags() -> None:
    """The flags of every program that may run as several processes."""
    flags.DEFINE_bool("distributed", False, "Join the processes that the cluster's environment names: TPU, Slurm, ….")
    flags.DEFINE_string("coordinator", None, "Instead: HOST:PORT of process 0, the same on every process.")
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
    flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.")


def joined(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """`main` after joining the other processes as the flags say; what fails on one of them ends all, with its line."""

    @functools.wraps(main)
    def run(argv: list[str]) -> None:
        join()
        if jax.process_count() > 1:
            _start_following()
        try:
            main(argv)
        except Exception as error:
            if jax.process_count() > 1 and not getattr(error, "shared", False):
                code = 2 if isinstance(error, (InputError, OSError)) else 1
                line = " ".join(f"process {jax.process_index()} stopped: {error or type(error).__name__}".split())
                # Before JAX's own handler, which would wait at a barrier for processes that wait for this one.
                atexit.register(_leave, code)
                _client().key_value_set(_FAILED, json.dumps([jax.process_index(), code, line]), allow_overwrite=True)
            raise

    return run


def join() -> None:
    """Connects this process with the others, before anything touches a device. Raises InputError if it can't."""
    f = flags.FLAGS
    given = {"--coordinator": f.coordinator, "--num_processes": f.num_processes, "--process_id": f.process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise InputError(f"{', '.join(given)} belong together; {' and '.join(missing)} not given")
    if not missing:
        if not 0 <= f.process_id < f.num_processes:
            raise InputError(f"--process_id={f.process_id} is not one of 0 to {f.num_processes - 1}")
        if not f.coordinator.rpartition(":")[2].isdigit():
            raise InputError(f"--coordinator={f.coordinator} is not HOST:PORT")
        _initialize(f.coordinator, f.num_processes, f.process_id, cluster_detection_method="deactivate")
    elif f.distributed or is_marked(os.environ):
        _initialize()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise InputError(f"these devices belong to {jax.process_count()} processes; start every one with --distributed")


def is_marked(environment: Mapping[str, str]) -> bool:
    """Whether the environment names several TPU hosts or slices, as GKE's does. Others need --distributed."""
    platforms = environment.get("JAX_PLATFORMS", "")
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    slices = environment.get("MEGASCALE_NUM_SLICES") or "1"
    return (not platforms or "tpu" in platforms) and ("," in hosts or slices != "1")


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """A section that every process completes, or none: if one fails, all raise its error, the others as InputError.

    Inside, no process may wait for another but with the functions of this module.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        if not getattr(error, "shared", False):
            with contextlib.suppress(InputError):
                _exchange(failure=str(error) or type(error).__name__)
            error.shared = True  # pyright: ignore[reportAttributeAccessIssue]
        raise
    _exchange()


def on_first_process(work: Callable[[], object]) -> Any:
    """What `work` returns, short and in JSON's types: run on the first process while the others wait.

    If it fails, every process does.
    """
    result = None
    with all_or_none():
        if is_first():
            result = work()
    return json.loads(all_gather(json.dumps(result))[0])


def all_gather(value: str) -> list[str]:
    """The value of every process, on every process."""
    return [value] if jax.process_count() == 1 else _exchange(value)


def agree(what: str, value: object) -> None:
    """Raises InputError on every process unless all were given the same `value`, something that JSON can hold."""
    if jax.process_count() == 1:
        return
    digests = _exchange(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())
    for i, digest in enumerate(digests):
        if digest != digests[0]:
            raise _shared(InputError(f"process {i} was given another {what} than process 0; start all with the same"))


def _exchange(value: str = "", failure: str = "") -> list[str]:
    """The value of every process; raises InputError on all of them if one reports a failure.

    The barrier waits as long as it takes, where a collective operation would time out.
    """
    multihost.get_barrier_sync_fn()(key="llada_jax.processes", timeout_ms=_LONGEST_WAIT)
    line = failure.encode()[: _MESSAGE_BYTES - 200].decode(errors="ignore")
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = json.dumps([value, line], ensure_ascii=False).encode()
    message[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    received = np.asarray(multihost_utils.process_allgather(message))
    values, failures = zip(*(json.loads(row.tobytes().rstrip(b"\0")) for row in received), strict=True)
    if any(failures):
        raise _shared(InputError(next(filter(None, failures))))
    return list(values)


def _shared(error: InputError) -> InputError:
    """Marks an error that every process raises."""
    error.shared = True  # pyright: ignore[reportAttributeAccessIssue]
    return error


def _initialize(*place, **options) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself; ours is in requests.py
    try:
        jax.distributed.initialize(
            *place,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            **options,
        )
    except ValueError as error:  # nothing was detected
        raise InputError(
            f"--distributed: the environment names no cluster ({error}); give --coordinator=HOST:PORT, "
            "--num_processes and --process_id"
        ) from error
    except RuntimeError as error:
        where = f"{place[0]} as process {place[2]} of {place[1]}" if place else "the other processes"
        raise InputError(f"can't join {where}: {str(error).splitlines()[0]}") from error


def _start_following() -> None:
    ended = threading.Event()
    follower = threading.Thread(target=_follow, args=(ended,), daemon=True)
    follower.start()
    atexit.register(follower.join)  # Python aborts if it ends while another thread is inside of C++
    atexit.register(ended.set)  # what is registered last comes first


def _follow(ended: threading.Event) -> None:
    """Ends this process when another has failed on its own: in a collective it would wait for it until JAX, after
    _HEARTBEAT_SECONDS without a sign of life, aborts it."""
    while not ended.is_set():
        try:
            process, code, line = json.loads(_client().blocking_key_value_get(_FAILED, 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return  # all have ended
        if process != jax.process_index():
            print(f"error: {line}", file=sys.stderr)
            _leave(code)
        return


def _client() -> Any:
    """The key-value store that the processes share; JAX has no public name for it."""
    return distributed.global_state.client


def _leave(code: int) -> None:
    if is_first():  # its end is that of the store, where the others read why
        time.sleep(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
