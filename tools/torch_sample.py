"""The official sampler's rule in plain PyTorch: what `tools/benchmark.py sample --torch` compares with.

Written as its users run it (Algorithms 4 and 5 of arXiv 2502.09992): every step runs the whole canvas, takes the logits
of every column, and commits the step's quota of the block's most probable tokens.
"""

import torch

from llada_jax.model.config import ModelConfig
from llada_jax.tools.torch_step import Model


class Sampler:
    """Random weights of a shape, and completions of random prompts."""

    def __init__(self, c: ModelConfig, threads: int):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        self.c, self.model = c, Model(c).eval()

    @torch.inference_mode()
    def __call__(self, prompt_BP: torch.Tensor, gen_length: int, steps: int, block_length: int) -> torch.Tensor:
        """int64 [B, P + gen_length]; greedy."""
        c, (B, P) = self.c, prompt_BP.shape
        x_BS = torch.cat([prompt_BP, torch.full((B, gen_length), c.mask_token_id)], 1)
        blocks = gen_length // block_length
        for block in range(blocks):
            end = P + (block + 1) * block_length
            open_BW = x_BS[:, end - block_length : end] == c.mask_token_id
            base, rest = divmod(int(open_BW[0].sum()), steps // blocks)
            for i in range(steps // blocks):
                logits_BSV = self.model(x_BS)
                logits_BSV[..., c.mask_token_id] = -torch.inf  # as ours: the mask itself is never predicted
                found_BS = logits_BSV.argmax(-1)
                probability_BS = torch.softmax(logits_BSV, -1).gather(-1, found_BS[..., None])[..., 0]
                probability_BS[:, end:] = -torch.inf
                masked_BS = x_BS == c.mask_token_id
                score_BS = torch.where(masked_BS, probability_BS, -torch.inf)
                chosen_BK = score_BS.topk(base + (i < rest), dim=1).indices
                x_BS.scatter_(1, chosen_BK, found_BS.gather(1, chosen_BK))
        return x_BS
