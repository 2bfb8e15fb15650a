"""What one family of published checkpoints is called and computes: the type of each entry of FAMILIES."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """One family: its architecture is that of `Transformer`; names, and what its config.json may say, are its own.

    "Parameter" is a path in `Transformer`, "field" a field of `ModelConfig`, "key" a key of config.json.
    """

    architecture: str  # in `architectures` of config.json
    preset: str  # the published model in PRESETS: its special ids are those of every model with its vocabulary
    names: Mapping[str, str]  # parameter: tensor, {} for the layer, in the order of the official modules
    keys: Mapping[str, str]  # field: key
    defaults: Mapping[str, Any]  # key: what the official config class takes for it where it is absent
    nullable: tuple[str, ...]  # keys that may be null
    computed: Mapping[str, tuple]  # key: the values that `Transformer` computes; an absent key means the first
    fresh: Mapping[str, Any]  # keys of a model that was made here beside those of `keys`, for the official code
    mask_token_id: int | None = None  # where config.json and tokenizer.json name none
    head_size_key: str | None = None  # a head size other than d_model / n_heads is refused
