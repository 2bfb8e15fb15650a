"""Converts a published checkpoint to a workdir that training starts from, and a workdir to a published checkpoint.

python tools/convert_checkpoint.py --source=LLaDA-8B-Base --target=runs/llada_8b --to=orbax --verify
python tools/convert_checkpoint.py --source=runs/sft --target=my-llada-8b-sft --to=hf --dtype=bfloat16

A run starts from the former with --config.train.init_from=runs/llada_8b. The tokenizer and generation settings come
along. The target appears when it is complete, and with --verify only if it computes what the source computes.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the checkout

from llada_jax import cli
from llada_jax.config import InputError
from llada_jax.interop import hf, hf_config
from llada_jax.model import Transformer

SOURCE = flags.DEFINE_string("source", None, "Directory of a published checkpoint or of a run.", required=True)
TARGET = flags.DEFINE_string("target", None, "Directory to make.", required=True)
TO = flags.DEFINE_enum("to", None, ["hf", "orbax"], "hf: published names and files; orbax: a workdir.", required=True)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the parameters. Default: as stored; for a run that began with a "
    "published model and goes --to=hf: as that one says (torch_dtype of its config.json)."
)  # fmt: skip
MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "5GB", "Of one .safetensors file.")
VERIFY = flags.DEFINE_bool("verify", False, "Compare the logits of both sides on random tokens.")


def main(_argv: list[str]) -> None:
    source, target = Path(SOURCE.value), Path(TARGET.value)
    jax.config.update("jax_platforms", "cpu")  # the host's memory is the larger one, and nothing is computed
    with hf.new_directory(target) as made:
        before = probe(hf.load(source)) if VERIFY.value else None
        dtype = DTYPE.value or (_published_dtype(source) if TO.value == "hf" else None)
        with _bar("read", sum(file.stat().st_size for file in source.glob("*.safetensors"))) as bar:
            model = hf.load(source, dtype, progress=bar.update)
        if TO.value == "hf":
            with _bar("write", sum(x.nbytes for x in jax.tree.leaves(model))) as bar:
                hf.write_hf(model, made, MAX_SHARD_SIZE.value, source, bar.update)
        else:
            hf.write_workdir(model, made, source)
        report = f"{target}: {' and '.join(sorted({x.dtype.name for x in jax.tree.leaves(model)}))} parameters"
        if before is not None:
            wanted = probe(model)
            del model
            report += f"; {compare(before, wanted, probe(hf.load(made)))}"
    print(report)


def probe(model: Transformer) -> np.ndarray:
    """Float32 logits of some random tokens."""
    shape = (2, min(64, model.config.max_sequence_length))
    tokens = np.random.default_rng(0).integers(0, model.config.embedding_size, shape)
    return np.asarray(_in_float32(model)(jnp.asarray(tokens, jnp.int32)))


def compare(before: np.ndarray, wanted: np.ndarray, found: np.ndarray) -> str:
    """What --verify found: the target must be exact, and a rounding of the parameters is told.

    before: logits of the source; wanted: of the parameters that were to be written; found: of what was written.
    """
    if not np.array_equal(wanted, found):
        raise InputError(f"verification failed: logits differ by {np.max(np.abs(wanted - found)):.3g}; nothing is kept")
    if np.array_equal(before, found):
        return f"the logits of {found[..., 0].size} random tokens are those of the source"
    argmax = np.mean(np.argmax(before, -1) == np.argmax(found, -1))
    rounding = f"rounding moved logits by up to {np.max(np.abs(before - found)):.3g}, {argmax:.1%} of argmax kept"
    return f"the logits of {found[..., 0].size} random tokens are those intended; {rounding}"


def _in_float32(model: Transformer) -> Transformer:
    """The same parameters, computing in float32."""
    config = dataclasses.replace(model.config, dtype="float32")
    like = jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))


def _published_dtype(source: Path) -> str | None:
    """The dtype of the published model that a run began with, as its config.json tells; None where there is none."""
    model = hf_config.parse(hf_config.read_text(source), str(source / "config.json")).get("model") or {}
    told = json.loads(model.get("published") or "{}")
    dtype = told.get("torch_dtype", told.get("dtype"))
    return dtype if dtype in ("float32", "bfloat16") else None


def _bar(what: str, total: int) -> tqdm:
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None, leave=False)


if __name__ == "__main__":
    cli.run(main)
