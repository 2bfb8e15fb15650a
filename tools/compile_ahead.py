"""Compiles the training step for a TPU slice that is not there, and tells whether it fits and how fast it will be.

python tools/compile_ahead.py --config=configs/llada_8b_pretrain.py --topology=v5p:8x8x8 [--slices=2] \\
    [--config.train.microbatches=2] [--json=FILE] [--search] [--cache=DIR]

A slice is CHIP:SHAPE or the name that Google Cloud gives it: v5e:16x16, v6e-256, v5p-128 (64 chips). Any machine with
the TPU compiler will do (pip install 'llada_jax[tpu]'): nothing is run. How the figures arise: tools/ahead/.

--cache=DIR puts the executable into a compilation cache of JAX. A trainer on that slice, of the same versions of jax
and libtpu, started with JAX_COMPILATION_CACHE_DIR=DIR, looks there before it compiles; should the key differ, it
compiles as ever. (A serialized executable of jax.experimental would be a pickle, which this project never loads.)
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX: a TPU of this machine is left alone

from absl import flags
from ml_collections import config_flags

from llada_jax import cli
from llada_jax.fields import InputError
from llada_jax.tools.ahead.compile import compile_step
from llada_jax.tools.ahead.estimate import report
from llada_jax.tools.ahead.search import search
from llada_jax.tools.ahead.slices import parse_topology
from llada_jax.tools.ahead.text import describe, ranking

TOPOLOGY = flags.DEFINE_string("topology", None, "The slice, such as v5e:16x16 or v5p-128.")
SLICES = flags.DEFINE_integer("slices", 1, "How many of them; the data axis of the mesh runs across.")
SEARCH = flags.DEFINE_bool("search", False, "Try meshes, remat and microbatches, and rank what fits.")
CACHE = flags.DEFINE_string("cache", None, "A compilation cache to put the executable into.")
JSON = flags.DEFINE_string("json", None, "Writes all figures here.")


def main(_argv: list[str]) -> None:
    config = flags.FLAGS.config
    if config is None or TOPOLOGY.value is None:
        raise InputError("--config=configs/NAME.py and --topology=CHIP:SHAPE are needed")
    topology = parse_topology(TOPOLOGY.value, SLICES.value)
    if SEARCH.value:
        ranked = search(config, topology, say=lambda line: print(line, file=sys.stderr))
        if not ranked:
            raise InputError(f"nothing fits {topology}: a larger slice, or shorter rows")
        print(ranking(ranked))
        found = ranked[0]
    else:
        found = report(compile_step(config, topology, cache=CACHE.value))
    print(describe(found))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
    cli.run(main)
