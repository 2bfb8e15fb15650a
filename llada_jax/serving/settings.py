"""The settings of an answer: options of sampling/options.py and gen_length; checked, described, read from text."""

import contextlib
import dataclasses
from typing import Any

from absl import flags

from llada_jax.fields import InputError
from llada_jax.sampling import options

_FIELDS = {
    field.name: field for field in dataclasses.fields(options.Options) if not field.name.endswith("_id")
}  # those of a model stay as they are
NAMES = ("gen_length", *_FIELDS)


def define_flags() -> None:
    """The flags of a command that answers from a checkpoint: --checkpoint, --gen_length, --seed, the sampler's."""
    flags.DEFINE_string("checkpoint", None, "The workdir of a fine-tuning run, or a published checkpoint.")
    flags.DEFINE_integer("gen_length", None, "Tokens of an answer, at most; default 128, less in a small model.")
    flags.DEFINE_integer("seed", 0, "Of the sampling noise.", lower_bound=0, upper_bound=2**32 - 1)
    options.define_flags()


def check_settings(c, settings: dict[str, Any]) -> None:
    """Raises InputError for settings that the sampler of a model with config c can't use."""
    if unknown := [name for name in settings if name not in NAMES]:
        raise InputError(f"{unknown[0]}: no such setting; there are {', '.join(NAMES)}")
    options.read_options(c, {name: value for name, value in settings.items() if name != "gen_length"})
    length: Any = settings.get("gen_length")
    block: Any = settings.get("block_length") or length
    if type(length) is not int or length < 1:
        raise InputError(f"gen_length is {length!r}; it must be a whole number above 0")
    if length % block:
        raise InputError(f"block_length {block} does not divide gen_length {length}; change the other one first")


def default_settings(c, gen_length: int | None = None) -> dict[str, Any]:
    """Answers of 128 tokens in blocks of 32, as the official chat; less in a model with a small context.

    At most half of the context, so that the other half is left to the dialogue. No pass is made for blocks behind the
    end of a text, which nobody reads.
    """
    length = min(128, 2 ** ((c.max_sequence_length // 2).bit_length() - 1)) if gen_length is None else gen_length
    return {"gen_length": length, "block_length": 32 if length % 32 == 0 else length, "stop_at_eos": True}


def changed(c, settings: dict[str, Any], name: str, text: str) -> dict[str, Any]:
    """The settings with another value of one, as a user writes it; "none" is its default. Raises InputError."""
    if name not in NAMES:
        raise InputError(f"{name}: no such setting; /settings lists them")
    new = {key: value for key, value in settings.items() if key != name}
    if text != "none":
        new[name] = _value(text)
    elif name == "gen_length":
        new[name] = default_settings(c)[name]
    check_settings(c, new)
    return new


def described(settings: dict[str, Any]) -> str:
    """A line for each setting: its name, its value and what it does."""
    lines = [f"{'gen_length':24}{settings['gen_length']!s:16}tokens of an answer, at most"]
    for name, field in _FIELDS.items():
        value = settings.get(name, "none" if field.default is None else field.default)
        lines.append(f"{name:24}{value!s:16}{help_of(name)}")
    return "\n".join(lines)


def help_of(name: str) -> str:
    """What a setting does, in a few words."""
    return _FIELDS[name].metadata["field"].help


def _value(text: str) -> Any:
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
