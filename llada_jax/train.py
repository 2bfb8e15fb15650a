"""Trains a model: pre-training, fine-tuning and the autoregressive control alike.

python -m llada_jax.train --config=configs/pretrain_tiny.py --workdir=DIR [--config.data.files='books/*.txt']
"""

from absl import flags
from ml_collections import config_flags

from llada_jax import cli
from llada_jax.fields import InputError
from llada_jax.parallel import join
from llada_jax.training import preemption

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, logs and the config go: a directory, gs://… or s3://…"
)
_ALLOW = flags.DEFINE_bool("allow_config_change", False, "Continue a run with another config.optimizer.schedule.")


def main(argv: list[str]) -> None:
    workdir = _WORKDIR.value
    if _CONFIG.value is None or not workdir:
        raise InputError("--config=configs/NAME.py and --workdir=DIR are needed")
    with preemption.Signals() as signals:  # before JAX is imported, which takes seconds

        def train(_argv: list[str]) -> None:
            from llada_jax.training import run

            run.train(_CONFIG.value, workdir, allow_config_change=_ALLOW.value, signals=signals)

        signals.before_end.append(join.tell_failure)
        join.joined(train)(argv)


if __name__ == "__main__":
    join.define_flags()
    cli.run(main)
