"""Converts a published checkpoint to a workdir that training starts from, and a workdir to a published checkpoint.

python tools/convert_checkpoint.py --source=LLaDA-8B-Base --target=runs/llada_8b --to=orbax --verify
python tools/convert_checkpoint.py --source=runs/sft --target=my-llada-8b-sft --to=hf --dtype=bfloat16

python tools/convert_checkpoint.py --source=runs/lora --target=my-llada-8b --to=hf --merge
python tools/convert_checkpoint.py --source=LLaDA-8B-Base --adapter=ADAPTER --target=my-llada-8b --to=hf --merge
python tools/convert_checkpoint.py --source=runs/lora --target=my-adapter --to=peft

A run starts from the first with --config.train.init_from=runs/llada_8b. The tokenizer and generation settings come
along. The target appears when it is complete, and with --verify only if it computes what the source computes and, where
PyTorch is installed, what a forward pass written in PyTorch computes from the published files. Runs on the CPU.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from llada_jax import cli
from llada_jax.fields import InputError
from llada_jax.files import parse_json, read_json
from llada_jax.interop import hf
from llada_jax.interop.workdir import load_config, require_utf8
from llada_jax.model import lora
from llada_jax.model.config import ModelConfig
from llada_jax.model.transformer import Block, Transformer, rms_norm
from llada_jax.storage.buckets import path_of
from llada_jax.storage.mirror import copied

# Largest difference between our float32 logits and PyTorch's, as a part of the largest logit. The order of sums makes
# 1e-7 to 1e-5, and 3e-4 in a random model of 32 layers so sharp that bfloat16 moves its logits by half; exchanging two
# tensors of a trained layer, or its rotary pairs, makes 0.1 and more.
TOLERANCE = 1e-3


def convert(
    source: Path, target: Path, to: str, dtype: str | None, max_shard_size: str, verify: bool,
    adapter: Sequence[str | Path] = (), merge: bool = False,
) -> str:  # fmt: skip
    """Writes `target`; returns a report of one line. The arguments are the flags."""
    if to == "peft":
        return _write_adapter(source, target, adapter)
    with hf.new_directory(require_utf8(target) if to == "orbax" else target) as made:
        tokens = random_tokens(hf.load_config(source))
        before = probe(hf.load(source, adapter=adapter), tokens) if verify else None
        dtype = dtype or (_published_dtype(source) if to == "hf" else None)
        with _bar("read", sum(map(os.path.getsize, filter(os.path.isfile, source.glob("*.safetensors"))))) as bar:
            model = hf.load(source, dtype, adapter=adapter, progress=bar.update)
        moved = None
        if merge:
            model, moved = lora.merge(model)
        elif lora.adapters_of(model):
            raise InputError("the source has adapters: --merge adds them to its weights, --to=peft writes them alone")
        if to == "hf":
            with _bar("write", sum(x.nbytes for x in jax.tree.leaves(model))) as bar:
                hf.write_hf(model, made, max_shard_size, source, bar.update, target.name)
        else:
            hf.write_workdir(model, made, source)
        report = f"{target}: {' and '.join(sorted({x.dtype.name for x in jax.tree.leaves(model)}))} parameters"
        if moved is not None:
            report += f"; merging moved weights by up to {moved:.2g} of the largest of their kind"
        if code := _missing_code(made):
            report += f"; for transformers, put {' and '.join(code)} of the published model beside them"
        if before is not None:
            wanted = probe(model, tokens)
            del model
            found = probe(hf.load(made), tokens)
            report += f"; {compare(before, wanted, found)}"
            sides = ({} if adapter else {"source": (copied(source), before)}) | {"target": (made, found)}
            report += f"; {compare_with_torch(tokens, sides)}"
    return report


def _write_adapter(source: Path, target: Path, adapter: Sequence[str | Path]) -> str:
    """The adapters of a run, or several put together, as PEFT has them."""
    config = load_config(source)
    base = Path(config["train"]["init_from"]) if config.get("lora", {}).get("rank") else source
    hf.save_adapter(hf.load(source, adapter=adapter), target, base=base)
    return f"{target}: an adapter of {base}, float32"


def random_tokens(c: ModelConfig) -> np.ndarray:
    """Ids [2, at most 64] from all rows of the embedding."""
    return np.random.default_rng(0).integers(0, c.embedding_size, (2, min(64, c.max_sequence_length)), np.int32)


def probe(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    """Logits of the tokens in float32, one layer at a time: compiled whole, XLA would widen all of them at once."""
    model = hf.with_dtype(model, "float32")
    x_BLD = jnp.asarray(model.wte[...][tokens], jnp.float32)
    if model.lora is not None:
        x_BLD += model.lora.embed(tokens, "float32")
    for i in range(model.config.n_layers):
        x_BLD = _layer(jax.tree.map(lambda x: x[i], model.blocks), x_BLD)  # noqa: B023
    x_BLD = rms_norm(x_BLD, jnp.asarray(model.ln_f[...], jnp.float32), model.config.rms_norm_eps)
    rows = range(0, model.config.embedding_size, 8192)
    parts = [np.asarray(x_BLD @ model.head[i : i + 8192].T.astype(jnp.float32)) for i in rows]
    return np.concatenate(parts, axis=-1)


@jax.jit
def _layer(block: Block, x_BLD: jax.Array) -> jax.Array:
    return block(x_BLD)[0]


def compare(before: np.ndarray, wanted: np.ndarray, found: np.ndarray) -> str:
    """What --verify found: the target must be exact, and a rounding of the parameters is reported.

    before: logits of the source; wanted: of the parameters that were to be written; found: of what was written.
    """
    if not np.array_equal(wanted, found):
        raise InputError(f"verification failed: logits differ by {np.max(np.abs(wanted - found)):.3g}; nothing is kept")
    if np.array_equal(before, found):
        return f"the logits of {found[..., 0].size} random tokens are those of the source"
    argmax = np.mean(np.argmax(before, -1) == np.argmax(found, -1))
    rounding = f"rounding moved logits by up to {np.max(np.abs(before - found)):.3g}, {argmax:.1%} of argmax kept"
    return f"the logits of {found[..., 0].size} random tokens are those intended; {rounding}"


def compare_with_torch(tokens: np.ndarray, sides: dict[str, tuple[Path, np.ndarray]]) -> str:
    """What PyTorch computes from each side that is published files, held against our logits of it."""
    published = {side: (path, ours) for side, (path, ours) in sides.items() if any(path.glob("*.safetensors"))}
    if not published:
        return "no published files to compare with PyTorch"
    if importlib.util.find_spec("torch") is None:
        return "not compared with PyTorch, which is not installed"
    from llada_jax.tools import torch_logits

    differences = []
    for side, (path, ours) in published.items():
        theirs = torch_logits.logits(path, tokens)
        differences.append(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
        if not differences[-1] <= TOLERANCE:  # NaN fails
            raise InputError(
                f"verification failed: PyTorch computes other logits from the {side}, the largest difference is "
                f"{differences[-1]:.2g} of the largest logit; nothing is kept"
            )
    return f"PyTorch computes the same from the {' and '.join(published)}, within {max(differences):.1g}"


def _missing_code(directory: Path) -> list[str]:
    """The Python files that auto_map of config.json names and that are not in the directory."""
    code = read_json(directory / "config.json").get("auto_map") or {}
    files = {
        f"{name.split('.')[0]}.py"
        for name in (code.values() if isinstance(code, dict) else ())
        if isinstance(name, str) and re.fullmatch(r"[\w.]+", name)  # not a name on a hub: "owner/model--file.Class"
    }
    return sorted(file for file in files if not (directory / file).exists())


def _published_dtype(source: Path) -> str | None:
    """The dtype of the published model that a run began with, by its config.json; None where there is none."""
    model = load_config(source).get("model") or {}
    published = parse_json(model.get("published") or "{}", f"{source / 'config.json'}: model.published")
    dtype = published.get("torch_dtype", published.get("dtype"))
    return dtype if dtype in ("float32", "bfloat16") else None


def _bar(what: str, total: int) -> tqdm:
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=None, leave=False)


def main(_argv: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # memory of the host; accelerators round float32 products
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]; paths of any bytes
    f = flags.FLAGS
    source, target = path_of(f.source), path_of(f.target)
    print(convert(source, target, f.to, f.dtype, f.max_shard_size, f.verify, f.adapter, f.merge))


if __name__ == "__main__":  # flags are defined here, so that other programs may import convert()
    flags.DEFINE_string("source", None, "Directory of a published checkpoint or of a run.", required=True)
    flags.DEFINE_string("target", None, "Directory to make.", required=True)
    flags.DEFINE_enum(
        "to", None, ["hf", "orbax", "peft"], "hf: published files; orbax: a workdir; peft: its adapters alone.",
        required=True,
    )  # fmt: skip
    flags.DEFINE_multi_string("adapter", [], "Directory of a PEFT adapter of the source; several add up.")
    flags.DEFINE_bool("merge", False, "Add the adapters to the weights.")
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "Of the parameters. Default: as stored; for a run that began with a "
        "published model and goes --to=hf: as that one says (torch_dtype of its config.json)."
    )  # fmt: skip
    flags.DEFINE_string("max_shard_size", "5GB", "Of one .safetensors file.")
    flags.DEFINE_bool("verify", False, "Compare the logits of both sides, and PyTorch's, on random tokens.")
    cli.run(main)
