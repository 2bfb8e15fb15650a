"""Compiles the training step for a TPU slice that is not there, and tells whether it fits and how fast it will be.

python tools/compile_ahead.py --config=configs/llada_8b_pretrain.py --topology=v5p:8x8x8 [--slices=2] \\
    [--config.train.microbatches=2] [--json=FILE] [--search] [--cache=DIR]
python tools/compile_ahead.py --sampler=llada_8b --topology=v5e-4 [--rows=8 --prompt_length=512 --gen_length=256]
python tools/compile_ahead.py --calibrate=all        # or --calibrate=v5e: published runs beside their estimates

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
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX: a TPU of this machine is left alone

from absl import flags
from ml_collections import config_flags

from llada_jax import cli
from llada_jax.fields import InputError
from llada_jax.model.config import PRESETS
from llada_jax.model.quantize import FEW_BITS
from llada_jax.parallel.chips import TPUS
from llada_jax.tools.ahead import sampler
from llada_jax.tools.ahead.calibration import calibrate
from llada_jax.tools.ahead.compile import compile_step
from llada_jax.tools.ahead.estimate import report
from llada_jax.tools.ahead.search import search
from llada_jax.tools.ahead.slices import parse_topology
from llada_jax.tools.ahead.text import describe, ranking

TOPOLOGY = flags.DEFINE_string("topology", None, "The slice, such as v5e:16x16 or v5p-128.")
SLICES = flags.DEFINE_integer("slices", 1, "How many of them; the data axis of the mesh runs across.")
SEARCH = flags.DEFINE_bool("search", False, "Try meshes, remat and microbatches, and rank what fits.")
CACHE = flags.DEFINE_string("cache", None, "A compilation cache to put the executable into.")
CALIBRATE = flags.DEFINE_enum("calibrate", None, ["all", *TPUS], "Compiles runs that others timed, and compares.")
SAMPLER = flags.DEFINE_enum("sampler", None, list(PRESETS), "A preset: compiles its sampler, not a training step.")
WEIGHTS = flags.DEFINE_enum("weights", "bfloat16", ["bfloat16", *FEW_BITS], "Of --sampler: how it holds its blocks.")
ROWS = flags.DEFINE_integer("rows", 8, "Of --sampler: prompts at once on each copy of the model.", lower_bound=1)
PROMPT_LENGTH = flags.DEFINE_integer("prompt_length", 512, "Of --sampler: tokens.", lower_bound=1)
GEN_LENGTH = flags.DEFINE_integer("gen_length", 256, "Of --sampler: tokens that are generated.", lower_bound=32)
JSON = flags.DEFINE_string("json", None, "Writes all figures here.")


def main(_argv: list[str]) -> None:
    config = flags.FLAGS.config
    if CALIBRATE.value:
        for line in calibrate(TPUS if CALIBRATE.value == "all" else [CALIBRATE.value]):
            print(line, flush=True)
        return
    if TOPOLOGY.value is None or (config is None) == (SAMPLER.value is None):
        raise InputError("--topology=CHIP:SHAPE is needed, and --config=configs/NAME.py or --sampler=PRESET")
    topology = parse_topology(TOPOLOGY.value, SLICES.value)
    if SAMPLER.value:
        job = sampler.Job(ROWS.value, PROMPT_LENGTH.value, GEN_LENGTH.value)
        found = sampler.compile_sampler(SAMPLER.value, topology, job, WEIGHTS.value)
        print(sampler.describe(found))
        _write(found)
        return
    if SEARCH.value:
        ranked = search(config, topology, say=lambda line: print(line, file=sys.stderr))
        if not ranked:
            raise InputError(f"nothing fits {topology}: a larger slice, or shorter rows")
        print(ranking(ranked))
        found = ranked[0]
    else:
        found = report(compile_step(config, topology, cache=CACHE.value))
    print(describe(found))
    _write(found)


def _write(found: dict[str, Any]) -> None:
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
    cli.run(main)
