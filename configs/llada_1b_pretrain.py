"""LLaDA-1B or its autoregressive control of the same shape, data, batch and rate (arXiv 2502.09992, section 3.2).

python -m llada_jax.train --config=configs/llada_1b_pretrain.py --workdir=DIR --config.data.path=DATA
python -m llada_jax.train --config=configs/llada_1b_pretrain.py:arm,v5e-16 --workdir=DIR --config.data.path=DATA
"""

from llada_jax.config import run_config, set_slice

SLICES = {"v5e-16": dict(microbatches=4, remat="full")}


def get_config(arg: str = ""):
    names = [name for name in arg.split(",") if name not in ("", "llada")]
    arm = "arm" in names
    config = run_config("arm_1b" if arm else "llada_1b")
    config.model.residual = "compute"  # bfloat16, as large models are trained on TPUs: less memory and traffic
    config.data.files = ""
    config.data.row_length = 4096
    config.objective.name = "autoregressive" if arm else "pretrain"
    config.data.random_length_fraction = 0.0 if arm else 0.01
    config.optimizer.schedule = (("linear", 4e-4, "2000 steps"), ("cosine", 4e-5, "100%"))
    config.train.steps = 100_000
    config.train.batch_size = 256
    for name in names:
        if name != "arm":
            set_slice(config, SLICES, name)
    return config.lock()
