"""Objectives: a file each, and a line here; `config.objective.name` is the key."""

from llada_jax.objectives import autoregressive, diffusion
from llada_jax.objectives.elbo import Objective

OBJECTIVES: dict[str, Objective] = {
    "pretrain": Objective(diffusion.pretrain),
    "sft": Objective(diffusion.sft),
    "autoregressive": Objective(autoregressive.next_token, causal=True),
}
