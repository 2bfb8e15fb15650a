"""LLaDA-8B from scratch, the published recipe: 2.3T tokens, batches of 1280 x 4096 (arXiv 2502.09992, section 2.2).

python tools/prepare_data.py --files='corpus/**/*.parquet' --tokenizer=LLADA_DIR --row_length=4096 --output=DATA
python -m llada_jax.train --config=configs/llada_8b_pretrain.py:v5p-128 --workdir=DIR --config.data.path=DATA
python tools/compile_ahead.py --config=configs/llada_8b_pretrain.py:v5p-128 --topology=v5p-128
"""

from llada_jax.config import run_config, set_slice
from llada_jax.training.optimizer import LLADA_PRETRAIN

SLICES = {  # found with tools/compile_ahead.py; the global batch is the paper's on all of them
    "v5e-256": dict(microbatches=5, remat="projections"),
    "v5p-128": dict(microbatches=4, remat="matmuls"),
    "v5p-1024": dict(context=2, microbatches=1, remat="matmuls"),  # 1280 rows don't divide over 512 chips
    "v6e-256": dict(microbatches=1, remat="rotated"),
    "2xv5p-512": dict(data=2, context=2, microbatches=1, remat="matmuls"),
    "tpu7x-128": dict(microbatches=2, remat="matmuls"),
}


def get_config(name: str = ""):
    config = run_config("llada_8b")
    config.model.residual = "compute"  # bfloat16, as large models are trained on TPUs: less memory and traffic
    config.data.files = ""
    config.data.row_length = 4096
    config.data.random_length_fraction = 0.01
    config.objective.attention = "padding"  # across documents, as the authors did; "documents" parts them
    config.optimizer.schedule = LLADA_PRETRAIN
    config.train.steps = 438_690
    config.train.batch_size = 1280
    config.checkpoint.every_steps = 1000
    set_slice(config, SLICES, name)
    return config.lock()
