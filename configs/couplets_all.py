"""All embedded couplets: the quickstart's job on 520 of them, in a longer run.

bash launch/quickstart.sh --config=configs/couplets_all.py --workdir=DIR
"""

import importlib.util
from pathlib import Path


def get_config():
    spec = importlib.util.spec_from_file_location("quickstart", Path(__file__).with_name("quickstart.py"))
    assert spec is not None and spec.loader is not None
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    config = quickstart.get_config().unlock()
    config.data.row_length = 20
    config.train.steps = 3000
    config.checkpoint.every_steps = 1000
    config.quickstart.couplets = 0  # all
    config.quickstart.sft_steps = 900
    config.quickstart.sft_row_length = 38
    config.quickstart.sft_text_weight = 0.5
    return config.lock()
