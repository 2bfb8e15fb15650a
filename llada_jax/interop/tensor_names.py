"""The tensors of a published checkpoint: name and shape of each, and the parameter that holds it here.

A parameter is named by its path in `Transformer`. One of `blocks` is stacked over the layers on axis 0, and heads have
an axis of their own: q_proj is (layers, N, H, D) here and (N·H, D) there, the same numbers in the same order.
D model width, N query heads, K key heads, H head size, F MLP width.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from llada_jax.interop import families
from llada_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a published checkpoint, and where it lives here."""

    name: str
    shape: tuple[int, ...]  # as published
    parameter: str
    layer: int | None  # index on axis 0 of the parameter; None: the whole of it


def tensors(c: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint of this model, in the order of the official modules, without a tied head.

    Raises InputError for an unknown family.
    """
    shapes = _shapes(c)
    in_block = lambda item: item[0].startswith("blocks.")
    for stacked, group in itertools.groupby(families.require(c.family).names.items(), in_block):
        group = list(group)
        for layer in range(c.n_layers) if stacked else [None]:
            for parameter, name in group:
                if parameter != "ff_out" or not c.weight_tying:
                    yield Tensor(name.format(layer), shapes[parameter], parameter, layer)


def head_name(c: ModelConfig) -> str:
    """The name of the head in this family, tied or not."""
    return families.require(c.family).names["ff_out"]


def _shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, F, KH = c.d_model, c.mlp_hidden_size, c.n_kv_heads * c.head_dim
    rows = (c.embedding_size, D)
    top = {"wte": rows, "ff_out": rows, "ln_f": (D,)}
    block = dict(
        q_proj=(D, D), k_proj=(KH, D), v_proj=(KH, D), attn_out=(D, D),
        ff_proj=(F, D), up_proj=(F, D), ff_out=(D, F), attn_norm=(D,), ff_norm=(D,),
    )  # fmt: skip
    return {**top, **{f"blocks.{name}": shape for name, shape in block.items()}}
