"""LLaDA-1B or its autoregressive control of the same shape, data, batch and rate (arXiv 2502.09992, section 3.2).

python -m llada_jax.train --config=configs/llada_1b_pretrain.py --workdir=DIR --config.data.path=DATA
python -m llada_jax.train --config=configs/llada_1b_pretrain.py:arm --workdir=DIR --config.data.path=DATA
"""

from llada_jax.config import InputError, run_config


def get_config(arg: str = ""):
    if arg not in ("", "arm", "llada"):
        raise InputError(f"configs/llada_1b_pretrain.py:{arg}: choose 'llada' or 'arm'")
    config = run_config("arm_1b" if arg == "arm" else "llada_1b")
    config.data.files = ""
    config.data.row_length = 4096
    config.objective.name = "autoregressive" if arg == "arm" else "pretrain"
    config.data.random_length_fraction = 0.0 if arg == "arm" else 0.01
    config.optimizer.schedule = (("linear", 4e-4, "2000 steps"), ("cosine", 4e-5, "100%"))
    config.train.steps = 100_000
    config.train.batch_size = 256
    return config.lock()
