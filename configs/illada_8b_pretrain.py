"""iLLaDA-8B from scratch: rows of 8192, documents apart, 30% of the rows cut in two (arXiv 2606.25331).

python -m llada_jax.train --config=configs/illada_8b_pretrain.py:v5p-128 --workdir=DIR --config.data.path=DATA
"""

from llada_jax.config import run_config, set_slice
from llada_jax.training.optimizer import ILLADA_PRETRAIN

SLICES = {"v5p-128": dict(microbatches=10, remat="matmuls")}


def get_config(name: str = ""):
    config = run_config("illada_8b")
    config.model.residual = "compute"  # bfloat16, as large models are trained on TPUs: less memory and traffic
    config.data.files = ""
    config.data.row_length = 8192
    config.data.random_length_fraction = 0.0
    config.data.split_fraction = 0.3
    config.objective.attention = "documents"
    config.optimizer.schedule = ILLADA_PRETRAIN
    config.train.steps = 12_000_000_000_000 // (1280 * 8192)
    config.train.batch_size = 1280
    set_slice(config, SLICES, name)
    return config.lock()
