"""All embedded couplets: the quickstart's job on 520 of them, in a longer run.

bash launch/quickstart.sh --config=configs/couplets_all.py --workdir=DIR
"""

from llada_jax.configs import quickstart


def get_config():
    config = quickstart.get_config().unlock()
    config.data.row_length = 20
    config.train.steps = 3000
    config.checkpoint.every_steps = 1000
    config.quickstart.couplets = 0  # all
    config.quickstart.sft_steps = 900
    config.quickstart.sft_row_length = 38
    config.quickstart.sft_text_weight = 0.5
    return config.lock()
