"""Typed fields of configs, each with its range beside its default, and the error for whatever a user gets wrong."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class InputError(ValueError):
    """A mistake of the user's: its message is one line that says what is wrong, where, and what to do.

    Entry points print the message alone and exit with code 2; see `llada_jax.cli`.
    """


class RunFailed(RuntimeError):
    """What ends a command and is no mistake of the user's: one line, exit code 1; it may succeed later."""


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field of a config may hold, and what it means: the metadata of a dataclass field, beside its default."""

    is_allowed: Callable[[Any], bool]
    allowed: str  # the same in words, after "must be"
    help: str


def integer(default: int, least: int, most: int, help: str) -> Any:
    """A dataclass field for a whole number from `least` to `most`."""
    ok = lambda x: type(x) is int and least <= x <= most
    return _field(default, Field(ok, f"a whole number from {least} to {most}", help))


def number(default: float, least: float, most: float, help: str, *, above: bool = False, below: bool = False) -> Any:
    """A dataclass field for a finite number from `least` (or above it) to `most` (or below it)."""

    def ok(x):
        if isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) <= 1e300:  # not for NaN either
            return False
        return (least < x if above else least <= x) and (x < most if below else x <= most)

    words = f"a number {'above' if above else 'from'} {least:g} {'and below' if below else 'to'} {most:g}"
    return _field(default, Field(ok, words, help))


def choice(default: str, choices: Sequence[str], help: str) -> Any:
    """A dataclass field for one of some words."""
    return _field(default, Field(lambda x: isinstance(x, str) and x in choices, f"one of {', '.join(choices)}", help))


def text(default: str, help: str, most: int = 4096) -> Any:
    """A dataclass field for a text of at most so many characters that can be written as UTF-8."""

    def ok(x):
        return isinstance(x, str) and len(x) <= most and "\0" not in x and x == x.encode(errors="ignore").decode()

    return _field(default, Field(ok, f"a text of at most {most} characters", help))


def flag(default: bool, help: str) -> Any:
    """A dataclass field for True or False."""
    return _field(default, Field(lambda x: isinstance(x, bool), "True or False", help))


def sequence(default: tuple, help: str) -> Any:
    """A dataclass field for a tuple or list, whose items are checked where they are read."""
    return _field(default, Field(lambda x: isinstance(x, tuple | list), "a tuple", help))


def _field(default: Any, what: Field) -> Any:
    return dataclasses.field(default=default, metadata={"field": what})


def field_of(cls: type, name: str) -> Field:
    """What `name` of a dataclass made of such fields may hold."""
    return next(f.metadata["field"] for f in dataclasses.fields(cls) if f.name == name)


def check_fields(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raises InputError unless `values` holds fields of `cls` only, and in each what is allowed there."""
    known = {f.name: f.metadata["field"] for f in dataclasses.fields(cls)}
    where = f"{where}." if where else ""
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise InputError(f"{where}{name}: no such field{hint}")
    for name, what in known.items():
        if name in values and not what.is_allowed(values[name]):
            raise InputError(f"{where}{name} is {_shown(values[name])}; it must be {what.allowed}")


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def optional(field: Any) -> Any:
    """The same dataclass field, but None is allowed, and the default."""
    what = field.metadata["field"]
    allowed = Field(lambda x: x is None or what.is_allowed(x), f"{what.allowed}, or None", what.help)
    return _field(None, allowed)


def of_numpy(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with NumPy's scalars as the numbers and truth values of Python that they are."""
    return {name: value.item() if type(value).__module__ == "numpy" else value for name, value in values.items()}
