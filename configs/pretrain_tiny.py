"""Pre-trains a tiny LLaDA on your text, or on the embedded couplets; minutes on a laptop, one GPU or one TPU chip.

python -m llada_jax.train --config=configs/pretrain_tiny.py --workdir=DIR --config.data.files='books/*.txt'
python -m llada_jax.train --config=configs/pretrain_tiny.py:python --workdir=DIR     # English: Python's own reference
"""

from llada_jax.config import run_config
from llada_jax.fields import InputError


def get_config(arg: str = ""):
    if arg not in ("", "python"):
        raise InputError(f"configs/pretrain_tiny.py:{arg}: the only option is 'python'")
    config = run_config("tiny")
    config.model.vocab_size = config.model.embedding_size = 0  # the tokenizer's
    config.data.files = "python_reference" if arg == "python" else "couplets"
    config.data.row_length = 128
    config.data.validation_fraction = 0.05
    config.optimizer.schedule = (("linear", 1e-3, "50 steps"), ("constant", 1e-3, "80%"), ("linear", 1e-5, "100%"))
    config.train.steps = 1000
    config.train.batch_size = 16
    config.train.eval_every = 200
    config.train.eval_rows = 64
    config.train.sample_every = 200
    config.train.sample_prompt = "Return" if arg == "python" else "床前明月光，"
    config.checkpoint.every_steps = 200
    return config.lock()
