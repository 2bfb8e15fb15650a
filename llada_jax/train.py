"""Trains a model: pre-training, fine-tuning and the autoregressive control alike.

python -m llada_jax.train --config=pretrain_tiny --workdir=runs/tiny
python -m llada_jax.train --config=pretrain_tiny --workdir=runs/books --config.data.files='books/*.txt'
python -m llada_jax.train --config=pretrain_tiny --print_config

Any field of the config is a flag, --config.GROUP.FIELD=VALUE; --print_config lists them. The same command again
continues from the newest checkpoint.
"""

from absl import flags
from ml_collections import config_flags

from llada_jax import cli
from llada_jax.config import check_config, describe
from llada_jax.fields import InputError
from llada_jax.parallel import processes
from llada_jax.training.run import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run config: a name or a file.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and the resolved config go.")
_PRINT = flags.DEFINE_bool("print_config", False, "Print every field of the config with its meaning; train nothing.")
_ALLOW = flags.DEFINE_bool("allow_config_change", False, "Continue a run with another config.optimizer.schedule.")


def main(_argv: list[str]) -> None:
    if _PRINT.value and _CONFIG.value is not None:
        check_config(_CONFIG.value)
        print(describe(_CONFIG.value))
        return
    if _CONFIG.value is None or not _WORKDIR.value:
        raise InputError("--config=NAME and --workdir=DIR are needed; --help lists the configs")
    train(_CONFIG.value, _WORKDIR.value, allow_config_change=_ALLOW.value)


def command() -> None:
    """The console script llada-train."""
    processes.define_flags()
    cli.run(processes.joined(main))


if __name__ == "__main__":
    command()
