"""Pre-trains a small LLaDA (34M parameters without its vocabulary) on your text, on one TPU chip (Colab) or GPU.

python -m llada_jax.train --config=configs/pretrain_small.py --workdir=DIR --config.data.files='books/*.txt'
"""

from llada_jax.config import run_config, set_slice

SLICES = {"v5e-1": dict(microbatches=1, remat="matmuls"), "v6e-1": dict(microbatches=1, remat="matmuls")}


def get_config(name: str = ""):
    config = run_config("small")
    config.model.dtype, config.model.remat = "bfloat16", "matmuls"
    config.model.vocab_size = config.model.embedding_size = 0  # the tokenizer's
    config.data.row_length = 1024
    config.data.validation_fraction = 0.01
    config.optimizer.schedule = (("linear", 1e-3, "500 steps"), ("constant", 1e-3, "80%"), ("linear", 1e-5, "100%"))
    config.train.steps = 20_000
    config.train.batch_size = 64
    config.train.eval_every = 1000
    set_slice(config, SLICES, name)
    return config.lock()
