"""Trains a model: pre-training, fine-tuning and the autoregressive control alike.

python -m llada_jax.train --config=configs/pretrain_tiny.py --workdir=DIR [--config.data.files='books/*.txt']
"""

from absl import flags
from ml_collections import config_flags

from llada_jax import cli
from llada_jax.fields import InputError
from llada_jax.parallel import processes
from llada_jax.training.run import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and the resolved config go.")
_ALLOW = flags.DEFINE_bool("allow_config_change", False, "Continue a run with another config.optimizer.schedule.")


def main(_argv: list[str]) -> None:
    if _CONFIG.value is None or not _WORKDIR.value:
        raise InputError("--config=configs/NAME.py and --workdir=DIR are needed")
    train(_CONFIG.value, _WORKDIR.value, allow_config_change=_ALLOW.value)


if __name__ == "__main__":
    processes.define_flags()
    cli.run(processes.joined(main))
