"""Tensor names and shapes of each family of published checkpoints, beside the parameters they belong to.

A parameter is named by its path in `Transformer`. One of `blocks` is stacked over the layers on axis 0, and heads have
an axis of their own: q_proj is (layers, N, H, D) here and (N·H, D) there, the same numbers in the same order.
D model width, N query heads, K key heads, H head size, F MLP width, V rows of the vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from llada_jax.model.config import ModelConfig

# In the order of the official modules, which is the order that shards are filled in; {} is the layer. A new family is
# one more entry here, and its config fields in hf_config.py.
FAMILIES: dict[str, dict[str, str]] = {
    "llada": {
        "wte": "model.transformer.wte.weight",
        "ln_f": "model.transformer.ln_f.weight",
        "blocks.attn_out": "model.transformer.blocks.{}.attn_out.weight",
        "blocks.ff_out": "model.transformer.blocks.{}.ff_out.weight",
        "blocks.attn_norm": "model.transformer.blocks.{}.attn_norm.weight",
        "blocks.ff_norm": "model.transformer.blocks.{}.ff_norm.weight",
        "blocks.q_proj": "model.transformer.blocks.{}.q_proj.weight",
        "blocks.k_proj": "model.transformer.blocks.{}.k_proj.weight",
        "blocks.v_proj": "model.transformer.blocks.{}.v_proj.weight",
        "blocks.ff_proj": "model.transformer.blocks.{}.ff_proj.weight",
        "blocks.up_proj": "model.transformer.blocks.{}.up_proj.weight",
        "ff_out": "model.transformer.ff_out.weight",
    },
    "illada": {
        "wte": "model.embed_tokens.weight",
        "blocks.q_proj": "model.layers.{}.self_attn.q_proj.weight",
        "blocks.k_proj": "model.layers.{}.self_attn.k_proj.weight",
        "blocks.v_proj": "model.layers.{}.self_attn.v_proj.weight",
        "blocks.attn_out": "model.layers.{}.self_attn.o_proj.weight",
        "blocks.ff_proj": "model.layers.{}.mlp.gate_proj.weight",
        "blocks.up_proj": "model.layers.{}.mlp.up_proj.weight",
        "blocks.ff_out": "model.layers.{}.mlp.down_proj.weight",
        "blocks.attn_norm": "model.layers.{}.input_layernorm.weight",
        "blocks.ff_norm": "model.layers.{}.post_attention_layernorm.weight",
        "ln_f": "model.norm.weight",
        "ff_out": "lm_head.weight",
    },
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a published checkpoint, and where it lives in ours."""

    name: str
    shape: tuple[int, ...]  # as published
    parameter: str
    layer: int | None  # index on axis 0 of the parameter; None: the whole of it


def tensors(c: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a checkpoint of this model, in the order of the official modules. A tied head has none."""
    shapes = _shapes(c)
    in_block = lambda item: item[0].startswith("blocks.")  # noqa: E731
    for stacked, group in itertools.groupby(FAMILIES[c.family].items(), in_block):
        group = list(group)
        for layer in range(c.n_layers) if stacked else [None]:
            for parameter, name in group:
                if parameter != "ff_out" or not c.weight_tying:
                    yield Tensor(name.format(layer), shapes[parameter], parameter, layer)


def head_name(c: ModelConfig) -> str:
    """The name that the head has in this family, whether or not it is tied."""
    return FAMILIES[c.family]["ff_out"]


def _shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, F, KH = c.d_model, c.mlp_hidden_size, c.n_kv_heads * c.head_dim
    rows = (c.embedding_size, D)
    top = {"wte": rows, "ff_out": rows, "ln_f": (D,)}
    block = dict(
        q_proj=(D, D), k_proj=(KH, D), v_proj=(KH, D), attn_out=(D, D),
        ff_proj=(F, D), up_proj=(F, D), ff_out=(D, F), attn_norm=(D,), ff_norm=(D,),
    )  # fmt: skip
    return {**top, **{f"blocks.{name}": shape for name, shape in block.items()}}
