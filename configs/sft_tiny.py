"""Fine-tunes a model on chat messages: JSONL, {"messages": [{"role": "user", "content": …}, …]} a line.

python -m llada_jax.train --config=configs/sft_tiny.py --workdir=DIR \
    --config.train.init_from=PRETRAINED --config.data.files='chats/*.jsonl'
"""

from llada_jax.config import run_config


def get_config():
    config = run_config("tiny")
    config.data.files = ""
    config.data.kind = "chat"
    config.data.row_length = 128
    config.data.validation_fraction = 0.05
    config.data.random_length_fraction = 0.0
    config.objective.name = "sft"
    config.objective.stratified = True
    config.optimizer.schedule = (("linear", 5e-4, "20 steps"), ("constant", 5e-4, "70%"), ("linear", 1e-5, "100%"))
    config.train.steps = 500
    config.train.batch_size = 32
    config.train.eval_every = 100
    config.train.eval_rows = 64
    config.checkpoint.every_steps = 100
    return config.lock()
