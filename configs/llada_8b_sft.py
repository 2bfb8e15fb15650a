"""Fine-tunes LLaDA-8B on dialogues, the published recipe: batches of 256, 3 epochs of 4.5M pairs, 2.5e-5.

python tools/prepare_data.py --kind=chat --files='dialogues/*.jsonl' --tokenizer=LLADA_DIR \
    --row_length=4096 --output=DATA
python -m llada_jax.train --config=configs/llada_8b_sft.py:v5e-64 --workdir=DIR \
    --config.train.init_from=PRETRAINED --config.data.path=DATA
"""

from llada_jax.config import run_config, set_slice
from llada_jax.training.optimizer import LLADA_SFT

SLICES = {"v5e-64": dict(microbatches=4, remat="projections")}


def get_config(name: str = ""):
    config = run_config("llada_8b")
    config.model.residual = "compute"  # bfloat16, as large models are trained on TPUs: less memory and traffic
    config.data.files = ""
    config.data.kind = "chat"
    config.data.row_length = 4096
    config.data.random_length_fraction = 0.0
    config.objective.name = "sft"
    config.optimizer.schedule = LLADA_SFT
    config.train.steps = 3 * 4_500_000 // 256
    config.train.batch_size = 256
    config.train.eval_every = 500
    set_slice(config, SLICES, name)
    return config.lock()
