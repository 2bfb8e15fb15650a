"""LLaDA-8B from scratch, the published recipe: 2.3T tokens, batches of 1280 x 4096 (arXiv 2502.09992, section 2.2).

python tools/prepare_data.py --files='corpus/**/*.parquet' --tokenizer=LLADA_DIR --row_length=4096 --output=DATA
python -m llada_jax.train --config=configs/llada_8b_pretrain.py --workdir=DIR --config.data.path=DATA
"""

from llada_jax.config import run_config
from llada_jax.optimizer import LLADA_PRETRAIN


def get_config():
    config = run_config("llada_8b")
    config.data.files = ""
    config.data.row_length = 4096
    config.data.random_length_fraction = 0.01
    config.objective.attention = "padding"  # across documents, as the authors did; "documents" parts them
    config.optimizer.schedule = LLADA_PRETRAIN
    config.train.steps = 438_690
    config.train.batch_size = 1280
    config.checkpoint.every_steps = 1000
    return config.lock()
