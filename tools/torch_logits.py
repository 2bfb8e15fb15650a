"""Logits of a published checkpoint by PyTorch: a second reading of the files, which shares no code with llada_jax.

Written from the published architecture. Tensors are mapped and widened to float32 one at a time, so that 8B parameters
need little memory. B batch, L length, D model width, N query heads, K key heads, H head size, V rows of the vocabulary.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

# What LLaDA, and what Llama and iLLaDA call the same things: keys of config.json, tensors, tensors of one layer.
LLADA = {
    "layers": "n_layers", "heads": "n_heads", "tied": "weight_tying",
    "embedding": "model.transformer.wte", "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.{}", "attention_norm": "attn_norm", "mlp_norm": "ff_norm",
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
}  # fmt: skip
LLAMA = {
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "tied": "tie_word_embeddings",
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "layer": "model.layers.{}", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip

_ROWS = 8192  # of the vocabulary at a time


@torch.inference_mode()
def logits(directory: Path, tokens_BL: np.ndarray) -> np.ndarray:
    """Float32 logits [B, L, V] of token ids by the checkpoint in `directory`, nothing masked from attention."""
    config = json.loads((directory / "config.json").read_text("utf-8"))
    tensors = _tensors(directory)
    names = LLADA if LLADA["embedding"] + ".weight" in tensors else LLAMA
    theta, eps = config.get("rope_theta", 10000.0), config.get("rms_norm_eps", 1e-5)
    embedding_VD = tensors[names["embedding"] + ".weight"]
    x_BLD = embedding_VD[torch.from_numpy(tokens_BL).long()].float()
    head_size = x_BLD.shape[-1] // config[names["heads"]]
    for layer in range(config[names["layers"]]):
        weight = lambda part: tensors[f"{names['layer'].format(layer)}.{names[part]}.weight"].float()  # noqa: B023
        h_BLD = _rms_norm(x_BLD, weight("attention_norm"), eps)
        q, k, v = (F.linear(h_BLD, weight(part)).unflatten(-1, (-1, head_size)).transpose(1, 2) for part in "qkv")
        a_BNLH = _attention(_rotate(q, theta), _rotate(k, theta), v)
        x_BLD = x_BLD + F.linear(a_BNLH.transpose(1, 2).flatten(2), weight("o"))
        h_BLD = _rms_norm(x_BLD, weight("mlp_norm"), eps)
        gated_BLF = F.silu(F.linear(h_BLD, weight("gate"))) * F.linear(h_BLD, weight("up"))
        x_BLD = x_BLD + F.linear(gated_BLF, weight("down"))
    x_BLD = _rms_norm(x_BLD, tensors[names["norm"] + ".weight"].float(), eps)
    head_VD = embedding_VD if config.get(names["tied"], True) else tensors[names["head"] + ".weight"]
    return torch.cat([F.linear(x_BLD, rows.float()) for rows in head_VD.split(_ROWS)], -1).numpy()


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor by its name, mapped: read from the disk where it is touched."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(x_BNLH: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of positions 0 … L−1: the pair of dimension i is i + H/2."""
    length, size = x_BNLH.shape[-2:]
    angles = torch.outer(torch.arange(length).float(), theta ** (-torch.arange(0, size, 2).float() / size))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    first, second = x_BNLH.chunk(2, -1)
    return x_BNLH * cos + torch.cat([-second, first], -1) * sin


def _attention(q_BNLH: torch.Tensor, k_BKLH: torch.Tensor, v_BKLH: torch.Tensor) -> torch.Tensor:
    """Of every position to every position; N/K consecutive query heads share a key head."""
    group = q_BNLH.shape[1] // k_BKLH.shape[1]
    k, v = k_BKLH.repeat_interleave(group, 1), v_BKLH.repeat_interleave(group, 1)
    scores = q_BNLH @ k.transpose(-1, -2) / q_BNLH.shape[-1] ** 0.5
    return scores.softmax(-1) @ v
