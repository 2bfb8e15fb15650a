"""Several processes as one program: what only one may do, what all must do or none, and what they tell each other.

On one process everything here does nothing. On several, each runs the same program over its own devices; the first
writes. What only one may do (prepare data, claim a workdir) stands in `on_first_process`; what may go wrong on some
process only stands in `all_or_none`, so that no process waits for one that has given up.
"""

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed

from llada_jax import cli
from llada_jax.fields import InputError, RunFailed

_LONGEST_WAIT = 7 * 24 * 3600 * 1000  # milliseconds that the others wait while one prepares data
_LONGEST_LINE = 2000  # characters of what went wrong
_SENT = "llada_jax/sent/"  # under which processes leave texts for the first one
_rounds = itertools.count()  # of _exchange: every process takes part in every one


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """A section that every process completes, or none: if one fails, all raise its error, as what it is to the user.

    Inside, no process may wait for another but with the functions of this module.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        if not getattr(error, "shared", False):
            line = " ".join(str(error).split())[:_LONGEST_LINE] or type(error).__name__
            with contextlib.suppress(InputError, RunFailed):
                _exchange(failure=[cli.is_users(error), line])
            error.shared = True  # pyright: ignore[reportAttributeAccessIssue]
        raise
    _exchange()


def on_first_process(work: Callable[[], object]) -> Any:
    """What `work` returns, in JSON's types: run on the first process while the others wait. If it fails, all fail."""
    result = None
    with all_or_none():
        if is_first():
            result = work()
    return json.loads(all_gather(json.dumps(result))[0])


def all_gather(value: str) -> list[str]:
    """The value of every process, on every process."""
    return [value] if jax.process_count() == 1 else _exchange(value)


def agree(what: str, value: object) -> None:
    """Raises InputError on every process unless all were given the same `value`, something that JSON can hold.

    (multihost_utils.assert_equal raises only where the value differs from the others'; those would go on.)
    """
    digests = all_gather(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())
    for i, digest in enumerate(digests):
        if digest != digests[0]:
            raise _shared(InputError(f"process {i} was given another {what} than process 0; start all with the same"))


def send(text: str) -> None:
    """Leaves a text for the first process, which finds it when it calls `received`; from any thread."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others are gone
        _client().key_value_set(f"{_SENT}{jax.process_index()}/{time.time_ns()}", text)


def received() -> list[str]:
    """What the other processes have sent since the last call, in no order; for the first one."""
    if jax.process_count() == 1:
        return []
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        found = _client().key_value_dir_get(_SENT)
        for name, _ in found:
            _client().key_value_delete(name)
        return [text for _, text in found]
    return []


def _exchange(value: str = "", failure: list | None = None) -> list[str]:
    """The value of every process; raises on all of them if one reports a failure: [is it the user's, line].

    Over JAX's key-value store, whose barrier waits as long as it takes; collective operations time out, and need
    devices.
    """
    client, number, own = _client(), next(_rounds), jax.process_index()
    key = f"llada_jax/exchange/{number}"
    client.key_value_set(f"{key}/{own}", json.dumps([value, failure]))
    client.wait_at_barrier(key, _LONGEST_WAIT)
    found = {int(name.rpartition("/")[2]): json.loads(text) for name, text in client.key_value_dir_get(f"{key}/")}
    if number:  # all have read that one before they came to this barrier
        client.key_value_delete(f"llada_jax/exchange/{number - 1}/{own}")
    values, failures = zip(*(found[i] for i in range(jax.process_count())), strict=True)
    for is_users, line in filter(None, failures):
        raise _shared(InputError(line) if is_users else RunFailed(line))
    return list(values)


def _client() -> Any:
    """The key-value store that the processes share; JAX has no public name for it."""
    return distributed.global_state.client


def _shared(error: Any) -> Any:
    """Marks an error that every process raises."""
    error.shared = True
    return error
