# Copyright the llada_jax authors. Licensed under the Apache License, Version 2.0; you may not use this file except in
# compliance with the License, a copy of which is at https://www.apache.org/licenses/LICENSE-2.0. It is distributed
# "AS IS", without warranties or conditions of any kind.
"""LLaDA and iLLaDA in PyTorch, for transformers: a bidirectional Transformer, and the sampler that fills its masks.

B rows, L positions, D model width, N query heads, K key heads, H head size, G generated tokens, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_llada import ILLaDAConfig, LLaDAConfig


class RMSNorm(nn.Module):
    """Statistics in float32, cast back, then scaled."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Block(nn.Module):
    """One layer: attention, then a SwiGLU MLP, each added to what comes in."""

    def __init__(self, c: Any):
        super().__init__()
        keys = c.n_kv_heads * (c.d_model // c.n_heads)
        self.q_proj, self.attn_out = _linear(c.d_model, c.d_model), _linear(c.d_model, c.d_model)
        self.k_proj, self.v_proj = _linear(c.d_model, keys), _linear(c.d_model, keys)
        self.ff_proj, self.up_proj = _linear(c.d_model, c.mlp_hidden_size), _linear(c.d_model, c.mlp_hidden_size)
        self.ff_out = _linear(c.mlp_hidden_size, c.d_model)
        self.attn_norm, self.ff_norm = RMSNorm(c.d_model, c.rms_norm_eps), RMSNorm(c.d_model, c.rms_norm_eps)

    def forward(self, x_BLD, cos, sin, visible):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        x_BLD = x_BLD + self.attn_out(_attend(self.attn_norm(x_BLD), projections, cos, sin, visible))
        h_BLD = self.ff_norm(x_BLD)
        return x_BLD + self.ff_out(F.silu(self.ff_proj(h_BLD)) * self.up_proj(h_BLD))


class ILLaDABlock(nn.Module):
    """The same layer under the names of iLLaDA."""

    def __init__(self, c: Any):
        super().__init__()
        block = Block(c)
        attention = {"q_proj": block.q_proj, "k_proj": block.k_proj, "v_proj": block.v_proj, "o_proj": block.attn_out}
        mlp = {"gate_proj": block.ff_proj, "up_proj": block.up_proj, "down_proj": block.ff_out}
        self.self_attn, self.mlp = nn.ModuleDict(attention), nn.ModuleDict(mlp)
        self.input_layernorm, self.post_attention_layernorm = block.attn_norm, block.ff_norm

    def forward(self, x_BLD, cos, sin, visible):
        *projections, out = self.self_attn.values()
        gate, up, down = self.mlp.values()
        x_BLD = x_BLD + out(_attend(self.input_layernorm(x_BLD), projections, cos, sin, visible))
        h_BLD = self.post_attention_layernorm(x_BLD)
        return x_BLD + down(F.silu(gate(h_BLD)) * up(h_BLD))


class LLaDAModelLM(PreTrainedModel):
    """Token ids to logits, under the names of the published checkpoints."""

    config_class: Any = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block", "ILLaDABlock"]

    def __init__(self, config: Any):
        super().__init__(config)
        self._build(config)
        self.post_init()

    def _build(self, c: Any) -> None:
        parts = {
            "wte": nn.Embedding(c.embedding_size, c.d_model),
            "blocks": nn.ModuleList(Block(c) for _ in range(c.n_layers)),
            "ln_f": RMSNorm(c.d_model, c.rms_norm_eps),
        }
        if not c.weight_tying:
            parts["ff_out"] = _linear(c.d_model, c.embedding_size)
        self.model: Any = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})

    def _parts(self) -> tuple[Any, Any, Any, Any]:
        """Embedding, layers, last norm and head."""
        parts = self.model["transformer"]
        return parts["wte"], parts["blocks"], parts["ln_f"], parts["wte" if self.config.weight_tying else "ff_out"]

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self):
        return self._parts()[0]

    def set_input_embeddings(self, value):
        self.model["transformer"]["wte"] = value

    def forward(self, input_ids, attention_mask=None, segment_ids=None, position_ids=None, **_):
        """Logits [B, L, V] of every position; what a masked one holds is that of the masked position itself.

        attention_mask: [B, L], 0 for padding. segment_ids: [B, L], instead: documents of a row, counted from 1, each of
        which sees itself only; 0 is padding. position_ids: [L] or [B, L]; 0..L-1 by default.
        """
        segments = attention_mask if segment_ids is None else segment_ids
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        embedding, blocks, norm, head = self._parts()
        x_BLD, visible = embedding(input_ids), _visible(segments)
        cos, sin = _angles(position_ids, self.config.d_model // self.config.n_heads, self.config.rope_theta)
        for block in blocks:
            x_BLD = block(x_BLD, cos, sin, visible)
        return CausalLMOutputWithPast(logits=F.linear(norm(x_BLD), head.weight))

    @torch.no_grad()
    def generate(
        self, input_ids, attention_mask=None, gen_length=128, steps=None, block_length=None, temperature=0.0, **_
    ):
        """Appends gen_length masks to the prompt [B, L] and fills them, the surest first, block by block.

        steps: passes in all, one for each token by default. attention_mask: [B, L], 0 for padding on the left.
        """
        block_length, steps = block_length or gen_length, steps or gen_length
        blocks = gen_length // block_length
        if gen_length % block_length or steps % blocks:
            raise ValueError("block_length must divide gen_length, and steps must be a multiple of the blocks")
        x = F.pad(input_ids, (0, gen_length), value=self.config.mask_token_id)
        seen = None if attention_mask is None else F.pad(attention_mask, (0, gen_length), value=1)
        for begin in range(input_ids.shape[1], x.shape[1], block_length):
            columns = slice(begin, begin + block_length)
            for step in range(steps // blocks):
                logits = self(x, seen).logits[:, columns].double()
                logits[..., self.config.mask_token_id] = -torch.inf
                noise = -torch.log(-torch.log(torch.rand_like(logits))) if temperature else 0.0
                found = (logits + temperature * noise).argmax(-1)
                sure = logits.softmax(-1).gather(-1, found[..., None])[..., 0]
                is_open = x[:, columns] == self.config.mask_token_id
                sure = sure.masked_fill(~is_open, -1)
                for row in range(len(x)):
                    masks, left = int(is_open[row].sum()), steps // blocks - step
                    chosen = sure[row].topk(-(-masks // left)).indices
                    x[row, begin + chosen] = found[row, chosen]
        return x


class ILLaDAForCausalLM(LLaDAModelLM):
    """The same network under the names of iLLaDA."""

    config_class = ILLaDAConfig

    def _build(self, c: Any) -> None:
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.embedding_size, c.d_model),
            "layers": nn.ModuleList(ILLaDABlock(c) for _ in range(c.n_layers)),
            "norm": RMSNorm(c.d_model, c.rms_norm_eps),
        })  # fmt: skip
        if not c.weight_tying:
            self.lm_head = _linear(c.d_model, c.embedding_size)

    def _parts(self) -> tuple[Any, Any, Any, Any]:
        embedding, layers, norm = self.model.values()
        return embedding, layers, norm, embedding if self.config.weight_tying else self.lm_head

    def set_input_embeddings(self, value):
        self.model["embed_tokens"] = value


def _linear(columns: int, rows: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False)


def _attend(h_BLD, projections, cos, sin, visible):
    """Attention before its output projection; projections: of queries, keys and values."""
    q, k, v = (p(h_BLD).unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2) for p in projections)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)


def _visible(segments_BL):
    """Whether each query sees each key, bool [B, 1, L, L]; padding is seen by none, and sees the rest."""
    if segments_BL is None:
        return None
    query, key = segments_BL[:, None, :, None], segments_BL[:, None, None, :]
    return ((query == key) | (query == 0)) & (key > 0)


def _angles(positions, size: int, theta: float):
    """Cosines and sines, float32 [L, H] or [B, 1, L, H]; the pair of dimension i is i + H/2."""
    frequency = 1.0 / theta ** (torch.arange(0, size, 2, device=positions.device).float() / size)
    angles = (positions.float()[..., None] * frequency).repeat(*[1] * positions.ndim, 2)
    angles = angles if positions.ndim == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def _rotate(x_BNLH, cos, sin):
    x = x_BNLH.float()
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x_BNLH.dtype)
