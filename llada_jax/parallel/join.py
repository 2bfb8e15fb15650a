"""How processes find each other, and how they end together. JAX is imported only when they join.

Before JAX's own service waits for all of them (and aborts without a name where one is missing), the processes call the
roll on the coordinator's port. Later a process that fails tells the others why, and one that is killed is missed by
JAX's heartbeats: then JAX aborts the others, which say so in one line.
"""

import atexit
import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import flags

from llada_jax import cli
from llada_jax.fields import InputError, RunFailed

_SHUTDOWN_SECONDS = 60  # after which a process that ends too early takes the others along
_HEARTBEAT_SECONDS = 10  # of silence, after which a process counts as dead (JAX: 100)
_RETRY_SECONDS = 0.2  # between two tries to reach process 0
_FAILED = "llada_jax/failed"  # under which the first process to fail on its own says so
_HELLO = b"llada_jax "  # begins every message of the roll call: another service may still be at the port
_LOST = (
    "error: another process of this run is gone (killed, or its machine was taken away), so this one ends, too; "
    "TF_CPP_MIN_LOG_LEVEL=0 shows JAX's own words\n"
)
# Words of errors that a process meets when another one is gone; which one and why is known some seconds later.
_COLLECTIVE = ("Gloo", "NCCL", "UNAVAILABLE", "onnection", "peer", "oordination", "heartbeat", "arrier")


class Place(NamedTuple):
    """Where a process stands among the others: HOST:PORT of the first one, their number, its own, its devices."""

    coordinator: str
    count: int
    own: int
    devices: list[int] | None


def define_flags() -> None:
    """The flags of every program that may run as several processes."""
    flags.DEFINE_bool("distributed", False, "Join the processes that the cluster's environment names: TPU, Slurm, ….")
    flags.DEFINE_string("coordinator", None, "Instead: HOST:PORT of process 0, the same on every process.")
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
    flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is, from 0.")
    flags.DEFINE_integer("join_timeout_seconds", 300, "How long the processes wait for each other.", lower_bound=1)


def joined(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """`main` after joining the other processes as the flags say; what fails on one of them ends all, with its line."""

    @functools.wraps(main)
    def run(argv: list[str]) -> None:
        # Where a cache of programs is named, it keeps quickly compiled ones, too: JAX leaves out those below a second.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        if not _is_one_of_several():
            _require_alone()
            return main(argv)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "4")  # read when JAX is imported; else 17 lines at each abort
        _end_in_one_line()
        _join(_place(), flags.FLAGS.join_timeout_seconds)
        _start_following()
        try:
            main(argv)
        except BaseException as error:
            if isinstance(error, SystemExit) or getattr(error, "shared", False):
                raise  # all processes end so
            _fail(error)

    return run


def is_marked(environment: Mapping[str, str]) -> bool:
    """Whether the environment names several TPU hosts or slices, as GKE's does. Others need --distributed."""
    platforms = environment.get("JAX_PLATFORMS", "")
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    slices = environment.get("MEGASCALE_NUM_SLICES") or "1"
    return (not platforms or "tpu" in platforms) and ("," in hosts or slices != "1")


def tell_failure(code: int, line: str) -> None:
    """Makes the other processes end with this line and exit code; nothing where there are none."""
    client = _client()
    if client is not None:
        with contextlib.suppress(Exception):  # they may be gone, too
            client.key_value_set(_FAILED, f"{_own()} {code} {line}", allow_overwrite=False)


def leave(code: int, line: str = "") -> None:
    """Ends this process with `line` as its last, without JAX's wait for the others, who may wait for this one."""
    if _client() is not None and _own() == 0:  # its end is that of the store, where the others read why
        time.sleep(2)  # another thread may print meanwhile
    if line:
        cli.say(line)
    cli.end(code)


def _is_one_of_several() -> bool:
    f = flags.FLAGS
    return f.distributed or is_marked(os.environ) or (f.coordinator, f.num_processes, f.process_id) != (None,) * 3


def _place() -> Place:
    """What the flags or the environment say. Raises InputError if that is incomplete."""
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
        return Place(f.coordinator, f.num_processes, f.process_id, None)
    from jax._src import clusters  # JAX has no public name for what it detects

    found: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, f.join_timeout_seconds
    )
    if None in found[:3]:
        raise InputError(
            "--distributed: the environment names no cluster; give --coordinator=HOST:PORT, --num_processes and "
            "--process_id"
        )
    return Place(*found)


def _join(place: Place, seconds: int) -> None:
    import jax

    _call_the_roll(place, seconds)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself; see training/preemption.py
    jax.distributed.initialize(
        place.coordinator, place.count, place.own, place.devices, cluster_detection_method="deactivate",
        initialization_timeout=seconds, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )  # fmt: skip


def _require_alone() -> None:
    import jax

    if jax.process_count() > 1:
        raise InputError(f"these devices belong to {jax.process_count()} processes; start all with --distributed")


def _call_the_roll(place: Place, seconds: float) -> None:
    """Returns when all processes are there. Raises RunFailed, the same on all that came, if some don't come in time."""
    end = time.monotonic() + seconds
    if place.own == 0:
        missing = _await_others(place, end)
        if missing:
            raise RunFailed(_absent(place, missing, seconds))
        return
    host, _, port = place.coordinator.rpartition(":")
    while (left := end + 5 - time.monotonic()) > 0:  # process 0 gives up first, and says why
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), left) as others:
            others.settimeout(left)
            others.sendall(_HELLO + b"%d %d\n" % (place.own, place.count))
            answer = others.makefile("rb").readline(1000)
            if answer == _HELLO + b"go\n":
                return
            if answer.startswith(_HELLO):
                raise RunFailed(answer.removeprefix(_HELLO).decode().strip())
        time.sleep(_RETRY_SECONDS)
    raise RunFailed(f"process 0 did not answer at {place.coordinator} within {seconds:g} seconds")


def _await_others(place: Place, end: float) -> list[int]:
    """The numbers of the processes that did not come until `end`; answers those that came."""
    waiting: dict[int, socket.socket] = {}
    with _listen(int(place.coordinator.rpartition(":")[2]), end) as server:
        while len(waiting) < place.count - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError):
                other, _ = server.accept()
                other.settimeout(5)
                words = other.makefile("rb").readline(100).removeprefix(_HELLO).split()
                if len(words) == 2 and words[0].isdigit() and int(words[1]) == place.count:
                    waiting[int(words[0])] = other  # one that came before under this number has been restarted
    missing = sorted({*range(1, place.count)} - waiting.keys())
    answer = _absent(place, missing, flags.FLAGS.join_timeout_seconds) if missing else "go"
    for other in waiting.values():
        with contextlib.suppress(OSError), other:
            other.sendall(_HELLO + answer.encode() + b"\n")
    return missing


def _listen(port: int, end: float) -> socket.socket:
    while True:
        try:
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:  # the run before this one may still have it
            if time.monotonic() > end:
                raise RunFailed(f"process 0 can't listen on port {port} ({error.strerror})") from error
        time.sleep(_RETRY_SECONDS)


def _absent(place: Place, missing: list[int], seconds: float) -> str:
    shown = ", ".join(map(str, missing[:20])) + (", …" if len(missing) > 20 else "")
    who = f"process {shown}" if len(missing) == 1 else f"processes {shown}"
    return f"{who} of {place.count} did not join {place.coordinator} within {seconds:g} seconds"


def _fail(error: BaseException) -> None:
    """Ends this process, and the others with it, for an error that they don't have."""
    if isinstance(error, Exception) and any(word in str(error) for word in _COLLECTIVE):
        time.sleep(_HEARTBEAT_SECONDS + 5)  # if another is gone or failed, its line or JAX's abort ends us meanwhile
    code = cli.report(error)
    line = " ".join(f"process {_own()} stopped: {error or type(error).__name__}".split())
    tell_failure(code, line[:2000])
    leave(code)


def _start_following() -> None:
    ended = threading.Event()
    follower = threading.Thread(target=_follow, args=(ended,), daemon=True)
    follower.start()
    atexit.register(follower.join)  # Python aborts if it ends while another thread is inside of C++
    atexit.register(ended.set)  # what is registered last comes first


def _follow(ended: threading.Event) -> None:
    """Ends this process when another has failed on its own: in a collective it would wait for it in vain."""
    while not ended.wait(0.5):
        try:
            process, code, line = _client().key_value_try_get(_FAILED).split(" ", 2)
        except Exception:  # nobody has failed; or the store is gone, which JAX notices
            continue
        if int(process) != _own():
            leave(int(code), f"error: {line}")
        return


def _end_in_one_line() -> None:
    """JAX aborts this process when another is gone. C calls this handler then, which Python's own `signal` can't do."""

    def on_abort(_: int) -> None:
        os.write(2, _LOST.encode())
        os._exit(1)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    global _handler  # which must live as long as the process
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    libc.signal(signal.SIGABRT, ctypes.cast(_handler, ctypes.c_void_p))


_handler: Any = None


def _client() -> Any:
    """The key-value store that the processes share, None on one process; JAX has no public name for it."""
    return getattr(_state(), "client", None)


def _own() -> int:
    return getattr(_state(), "process_id", 0)


def _state() -> Any:
    """What JAX knows of the other processes; None where it is not even imported."""
    return getattr(sys.modules.get("jax._src.distributed"), "global_state", None)
