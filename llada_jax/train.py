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
from llada_jax.parallel import join
from llada_jax.training import preemption

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run config: a name or a file.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, logs and the config go: a directory, gs://… or s3://…"
)
_PRINT = flags.DEFINE_bool("print_config", False, "Print every field of the config with its meaning; train nothing.")
_ALLOW = flags.DEFINE_bool("allow_config_change", False, "Continue a run with another config.optimizer.schedule.")


def main(argv: list[str]) -> None:
    config, workdir = _CONFIG.value, _WORKDIR.value
    if _PRINT.value and config is not None:
        check_config(config)
        print(describe(config))
        return
    if config is None or not workdir:
        raise InputError("--config=NAME and --workdir=DIR are needed; --help lists the configs")
    with preemption.Signals() as signals:  # before JAX is imported, which takes seconds

        def train(_argv: list[str]) -> None:
            from llada_jax.training import run

            run.train(config, workdir, allow_config_change=_ALLOW.value, signals=signals)

        signals.before_end.append(join.tell_failure)
        join.joined(train)(argv)


def command() -> None:
    """The console script llada-train."""
    join.define_flags()
    cli.run(main)


if __name__ == "__main__":
    command()
