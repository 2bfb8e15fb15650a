"""A plain PyTorch training step of the same model, loss and optimizer: what tools/benchmark.py compares with.

Written as a PyTorch user would: nn.Linear, scaled_dot_product_attention, logits of every position, cross_entropy at the
masked ones (GUIDELINES of the LLaDA authors), fused AdamW.
"""

import torch
import torch.nn.functional as F
from torch import nn

from llada_jax.model.config import ModelConfig


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        kv = c.n_kv_heads * c.head_dim
        self.c = c
        self.attn_norm = nn.RMSNorm(c.d_model, c.rms_norm_eps)
        self.ff_norm = nn.RMSNorm(c.d_model, c.rms_norm_eps)
        self.q_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.k_proj = nn.Linear(c.d_model, kv, bias=False)
        self.v_proj = nn.Linear(c.d_model, kv, bias=False)
        self.attn_out = nn.Linear(c.d_model, c.d_model, bias=False)
        self.ff_proj = nn.Linear(c.d_model, c.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(c.d_model, c.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(c.mlp_hidden_size, c.d_model, bias=False)

    def forward(self, x_BLD: torch.Tensor, cos_LH: torch.Tensor, sin_LH: torch.Tensor) -> torch.Tensor:
        B, L, D = x_BLD.shape
        h_BLD = self.attn_norm(x_BLD)
        q, k, v = (
            w(h_BLD).view(B, L, -1, self.c.head_dim).transpose(1, 2) for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (x * cos_LH + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin_LH for x in (q, k))
        a_BNLH = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.c.n_kv_heads != self.c.n_heads)
        x_BLD = x_BLD + self.attn_out(a_BNLH.transpose(1, 2).reshape(B, L, D))
        h_BLD = self.ff_norm(x_BLD)
        return x_BLD + self.ff_out(F.silu(self.ff_proj(h_BLD)) * self.up_proj(h_BLD))


class Model(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.wte = nn.Embedding(c.embedding_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.ln_f = nn.RMSNorm(c.d_model, c.rms_norm_eps)
        self.ff_out = nn.Linear(c.d_model, c.embedding_size, bias=False)
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        H = self.c.head_dim
        frequency = self.c.rope_theta ** -(torch.arange(0, H, 2) / H)
        angle_LH = torch.outer(torch.arange(tokens_BL.shape[1]), frequency).repeat(1, 2)
        x_BLD = self.wte(tokens_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD, angle_LH.cos(), angle_LH.sin())
        return self.ff_out(self.ln_f(x_BLD))


class Step:
    """Forward, backward, clipping and AdamW on random tokens; the noise is drawn anew in every call."""

    def __init__(self, c: ModelConfig, rows: int, length: int, threads: int):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        self.c, self.model = c, Model(c)
        self.adamw = torch.optim.AdamW(self.model.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.tokens_BL = torch.randint(7, c.vocab_size, (rows, length))

    def __call__(self) -> float:
        ratio_B1 = (1 - 1e-3) * torch.rand(len(self.tokens_BL), 1) + 1e-3
        masked_BL = torch.rand(self.tokens_BL.shape) < ratio_B1
        logits_BLV = self.model(torch.where(masked_BL, self.c.mask_token_id, self.tokens_BL))
        ce_N = F.cross_entropy(logits_BLV[masked_BL], self.tokens_BL[masked_BL], reduction="none")
        loss = (ce_N / ratio_B1.expand_as(masked_BL)[masked_BL]).sum() / masked_BL.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return loss.item()
