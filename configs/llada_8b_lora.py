"""Fine-tunes LLaDA-8B on dialogues by LoRA: one chip is enough. Adapters of rank 32 on every matrix of the blocks.

python tools/prepare_data.py --kind=chat --files='dialogues/*.jsonl' --tokenizer=LLADA_DIR \\
    --row_length=2048 --output=DATA
python -m llada_jax.train --config=configs/llada_8b_lora.py:v5e-1 --workdir=DIR \\
    --config.train.init_from=LLADA_DIR --config.data.path=DATA
python tools/convert_checkpoint.py --source=DIR --target=ADAPTER --to=peft

Rows of a slice are as long as it says below (--row_length of the first line). What each takes: configs/README.md.
"""

from llada_jax.config import run_config, set_slice

SLICES = {
    "v5e-1": dict(base="int8", row_length=2048, batch_size=16, microbatches=16, remat="full"),
    "v6e-1": dict(base="bfloat16", row_length=4096, batch_size=16, microbatches=16, remat="full"),
    "v5e-8": dict(base="bfloat16", row_length=4096, batch_size=32, microbatches=4, remat="projections"),
    "h200": dict(base="bfloat16", row_length=4096, batch_size=16, microbatches=4, remat="full"),
    "rtx-24gb": dict(base="int8", row_length=2048, batch_size=16, microbatches=16, remat="full"),
}


def get_config(name: str = ""):
    config = run_config("llada_8b")
    config.model.residual = "compute"
    config.data.files = ""
    config.data.kind = "chat"
    config.data.row_length = 2048
    config.data.random_length_fraction = 0.0
    config.objective.name = "sft"
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.lora.dropout = 0.05
    config.optimizer.schedule = (("linear", 1e-4, "50 steps"), ("constant", 1e-4, "90%"), ("linear", 1e-5, "100%"))
    config.optimizer.weight_decay = 0.0
    config.train.steps = 2000
    config.train.batch_size = 16
    config.train.eval_every = 200
    config.checkpoint.every_steps = 200
    set_slice(config, SLICES, name)
    return config.lock()
