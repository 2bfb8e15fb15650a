"""How masks are filled: the options that `generate`, `infill`, `stream`, chat and evaluation have in common."""

import dataclasses
from typing import Any

import jax
from absl import flags

from llada_jax import inputs
from llada_jax.fields import InputError, check_fields, choice, flag, integer, number, of_numpy, optional
from llada_jax.sampling.denoise import CACHES
from llada_jax.sampling.rules import REMASKING, RULES

_MOST = 2**31 - 1
_LIMITS = tuple(rule for rule in RULES if rule != "quota")  # each rule but the quota is an option: its parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Keyword arguments of the samplers; see `generate` for what they do together."""

    steps: int | None = optional(integer(0, 1, _MOST, "passes in all; by default one for each token"))
    block_length: int | None = optional(integer(0, 1, _MOST, "tokens of a block; by default one block"))
    cache: str = choice("none", CACHES, "what keys and values are kept between passes")
    refresh_every: int = integer(0, 0, _MOST, "passes after which a cache is renewed besides; 0: never")
    look_around: int = integer(0, 0, _MOST, "columns on both sides of a block that are computed with it")
    threshold: float | None = optional(number(0, 0, 1, "commit every token that is at least so probable"))
    factor: float | None = optional(number(0, 0, 1e9, "commit n tokens if n + 1 times their doubt is at most this"))
    entropy_bound: float | None = optional(number(0, 0, 1e9, "commit while the entropies sum to at most this, nats"))
    temperature: float = number(0.0, 0, 1e9, "of the sampling noise; 0: the most probable token")
    cfg_scale: float = number(0.0, 0, 1e9, "classifier-free guidance; 0: none")
    remasking: str = choice("low_confidence", REMASKING, "what ranks the positions: the surest are committed first")
    variable_length: bool = flag(False, "append blocks until one ends the text")
    stop_at_eos: bool = flag(False, "a row is done with the block that ends its text")
    logits_eos_inf: bool = flag(False, "the end of text is never predicted")
    confidence_eos_eot_inf: bool = flag(False, "ends of text and of turn are committed last")
    mask_id: Any = optional(integer(0, 0, _MOST, "by default the model's"))
    eos_id: Any = optional(integer(0, 0, _MOST, "by default the model's"))
    eot_id: Any = optional(integer(0, 0, _MOST, "by default the model's"))

    def __post_init__(self):
        given = [n for n in ("steps", *_LIMITS) if getattr(self, n) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other: each says how many tokens a pass commits")
        windows = self.cache in ("dual", "two_block")
        inputs.require(windows or not self.look_around, "look_around needs the cache dual or two_block")

    @property
    def rule(self) -> tuple[str, float]:
        """The commit rule and its parameter."""
        given = {name: getattr(self, name) for name in _LIMITS}
        return next(((name, value) for name, value in given.items() if value is not None), ("quota", 0.0))


def read_options(c, given: dict[str, Any]) -> tuple[Options, jax.Array]:
    """(options, key) from keyword arguments, with the special tokens of a model's config filled in.

    Raises InputError for an unknown option, a value out of its range, and options that exclude each other.
    """
    key = inputs.random_key(given.get("key"))
    given = of_numpy({name: value for name, value in given.items() if name != "key"})
    check_fields(Options, given, "")
    o = Options(**given)
    defaults = {"mask_id": c.mask_token_id, "eos_id": c.eos_token_id, "eot_id": c.eot_token_id}
    ids = {}
    for name, default in defaults.items():
        ids[name] = default if getattr(o, name) is None else getattr(o, name)
        inputs.token_id(name, ids[name], c.embedding_size)
    return dataclasses.replace(o, **ids), key


_COMMANDS = [field.name for field in dataclasses.fields(Options) if not field.name.endswith("_id")]


def define_flags() -> None:
    """The options as flags of a command, whose help says what they may be."""
    kinds = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
    for field in dataclasses.fields(Options):
        if field.name in _COMMANDS:
            what = field.metadata["field"]
            kind = next(kind for name, kind in _KINDS.items() if name in str(field.type))
            kinds[kind](field.name, None, f"{what.help}; {what.allowed.removesuffix(', or None')}")


_KINDS = {"bool": bool, "int": int, "float": float, "str": str}


def of_flags() -> dict[str, Any]:
    """The options that were given on the command line."""
    values = {name: flags.FLAGS[name].value for name in _COMMANDS}
    return {name: value for name, value in values.items() if value is not None}
