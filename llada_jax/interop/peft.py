"""Adapters in the files of PEFT: adapter_config.json and adapter_model.safetensors, read and written.

R rank. A file holds, for each module that has an adapter, lora_A [R, in] and lora_B [out, R]; a scale is alpha / R.
"""

import collections
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.fields import InputError
from llada_jax.files import checksums, read_json
from llada_jax.interop import safetensors_io as files
from llada_jax.interop import tensor_names
from llada_jax.interop.workdir import place_of
from llada_jax.model import lora
from llada_jax.model.config import ModelConfig
from llada_jax.parallel.mesh import spec, under

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every tensor, by PEFT
_FINGERPRINT = "base_fingerprint"  # in the metadata of the weights
_SAMPLE = 4096  # bytes of each tensor that a fingerprint covers

# What adapter_config.json says that changes no number here, or only which numbers the files hold.
_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
)  # fmt: skip
_READ = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights",
)  # fmt: skip
# What a new adapter_config.json holds besides; PEFT adds its own defaults.
_FRESH = dict(
    peft_type="LORA", task_type=None, inference_mode=True, bias="none", fan_in_fan_out=False,
    init_lora_weights=True,
    use_rslora=False, use_dora=False, modules_to_save=None, layers_to_transform=None, layers_pattern=None,
    revision=None,
)  # fmt: skip


def load(model, directory: Path, mesh, *, base: Path | None = None):
    """The model with the adapter of a directory, beside those that it has.

    base: the directory of the model; where the adapter notes the fingerprint of its own, they are compared. Raises
    InputError for an adapter that this model cannot carry, and for whatever changes its numbers beyond plain LoRA.
    """
    fields = _read_config(directory / CONFIG)
    stored = files.read_header(directory / WEIGHTS)
    noted = files.read_metadata(directory / WEIGHTS).get(_FINGERPRINT)
    if base is not None and noted and noted != fingerprint(base):
        raise InputError(
            f"{directory}: was trained on another model than {base}; its own is "
            f"{fields.get('base_model_name_or_path') or 'not named'}"
        )
    pairs = _pairs(stored, model.config, directory)
    if not pairs:
        raise InputError(f"{directory / WEIGHTS}: holds no adapter")
    made = {name: _adapter(model, name, layers, fields, directory, mesh) for name, layers in pairs.items()}
    with under(mesh):
        return lora.with_adapters(model, jax.jit(lora.combined)(lora.adapters_of(model), made))


def _read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json. Raises InputError for what it asks beyond plain LoRA."""
    fields = read_json(path)
    if fields.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {fields.get('peft_type')!r}; only LORA can be loaded")
    for name, value in fields.items():
        if name not in (*_READ, *_HARMLESS) and value not in (None, False, "", [], {}):
            raise InputError(f"{path}: {name} is {str(value)[:60]!r}, which this model does not compute")
    if fields.get("bias", "none") != "none":
        raise InputError(f"{path}: bias is {fields['bias']!r}; these models have none")
    if isinstance(fields.get("init_lora_weights"), str) and fields["init_lora_weights"] != "gaussian":
        raise InputError(
            f"{path}: init_lora_weights is {fields['init_lora_weights']!r}, which changes the base, too; convert it "
            "to plain LoRA with PEFT"
        )
    patterns = {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if not isinstance(patterns[name], dict):
            raise InputError(f"{path}: {name} is {str(patterns[name])[:60]!r}, must map modules to numbers")
        for value in (fields.get(default), *patterns[name].values()):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                raise InputError(f"{path}: {default} or {name} is {str(value)[:60]!r}, must be a number above 0")
    rate = fields.get("lora_dropout") or 0.0
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise InputError(f"{path}: lora_dropout is {str(rate)[:60]!r}, must be from 0 and below 1")
    return fields | patterns | {"lora_dropout": float(rate)}


Pair = tuple[files.Stored, files.Stored, str]  # A, B, path of the module


def _pairs(stored: dict[str, files.Stored], c: ModelConfig, directory: Path) -> dict[str, dict[int, Pair]]:
    """{target: {layer: its pair}}; the embedding's layer is 0. Raises InputError for a tensor that has no place."""
    left, found = dict(stored), collections.defaultdict(dict)
    for tensor in tensor_names.tensors(c):
        module = _PREFIX + tensor.name.removesuffix(".weight")
        ends = [".lora_A.weight", ".lora_B.weight"]
        if tensor.parameter == "wte":
            ends = [".lora_embedding_A", ".lora_embedding_B"]
        names = [module + end for end in ends]
        missing = [name for name in names if name not in left]
        if len(missing) == 2:
            continue
        if missing:
            raise InputError(f"{directory / WEIGHTS}: lacks {missing[0]}, the other half of its adapter")
        A, B = (left.pop(name) for name in names)
        if tensor.parameter == "ff_out":
            raise InputError(
                f"{directory}: has an adapter of the head, {module.removeprefix(_PREFIX)}, which is not supported; "
                "merge it with PEFT"
            )
        rows, columns = tensor.shape
        inner, outer = (rows, columns) if tensor.parameter == "wte" else (columns, rows)
        if len(A.shape) != 2 or A.shape[1] != inner or B.shape != (outer, A.shape[0]):
            raise InputError(
                f"{directory / WEIGHTS}: {module} has A {A.shape} and B {B.shape}; this model needs (R, {inner}) and "
                f"({outer}, R)"
            )
        found[tensor.parameter.removeprefix("blocks.")][tensor.layer or 0] = (A, B, module.removeprefix(_PREFIX))
    if left:
        raise InputError(f"{directory / WEIGHTS}: holds {files.some(sorted(left))}, which this model has no place for")
    return found


def _adapter(model, name: str, layers: dict[int, Pair], fields, directory: Path, mesh) -> lora.Adapter:
    rank = max(A.shape[0] for A, _, _ in layers.values())
    shape_A, shape_B = lora.shapes(model, name, rank)
    count = 1 if name == "wte" else model.config.n_layers
    A_LRI = np.zeros((count, rank, math.prod(shape_A) // (count * rank)), np.float32)
    B_LOR = np.zeros((count, math.prod(shape_B) // (count * rank), rank), np.float32)
    scale_LR = np.zeros((count, rank), np.float32)
    for layer, (A, B, module) in layers.items():
        r = A.shape[0]
        _require_rank(r, module, fields, directory)
        A_LRI[layer, :r], B_LOR[layer, :, :r] = _whole(A), _whole(B)
        alpha = _by_pattern(fields["alpha_pattern"], module, fields["lora_alpha"], directory)
        scale_LR[layer, :r] = alpha / (math.sqrt(r) if fields.get("use_rslora") else r)
    shape_s = (rank,) if name == "wte" else (count, rank)
    arrays = A_LRI.reshape(shape_A), B_LOR.reshape(shape_B), scale_LR.reshape(shape_s)
    A, B, scale = _placed(arrays, name, mesh)
    return lora.Adapter(A, B, scale, fields["lora_dropout"])


def _require_rank(r: int, module: str, fields: dict[str, Any], directory: Path) -> None:
    wanted = _by_pattern(fields["rank_pattern"], module, fields["r"], directory)
    if r != wanted:
        raise InputError(f"{directory}: {module} has rank {r}, {CONFIG} makes it {wanted}")


def _by_pattern(patterns: dict[str, Any], module: str, default, directory: Path):
    """The value whose pattern matches the end of a module's path, as in PEFT."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise InputError(f"{directory / CONFIG}: {pattern[:60]!r} is no regular expression ({error})") from error
    return default


def _whole(tensor: files.Stored) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float32) for _, x in tensor.chunks(tensor.whole)])


def _placed(arrays, name: str, mesh) -> list[jax.Array]:
    if mesh is None:
        return [jax.numpy.asarray(x) for x in arrays]
    with under(mesh):
        specs = (*lora.sharding(name), spec())
    put = lambda x, s: jax.make_array_from_callback(x.shape, jax.sharding.NamedSharding(mesh, s), lambda i: x[i])
    return [put(x, s) for x, s in zip(arrays, specs, strict=True)]


class Plan(NamedTuple):
    """What an adapter directory will hold."""

    config_text: str
    tensors: dict[str, np.ndarray]  # by name
    metadata: dict[str, str]


def plan(model, base: str | Path | None = None) -> Plan:
    """The adapters of a model as PEFT has them. All processes take part. Raises InputError for a model without any.

    Several adapters on one weight become one, whose scale is in B.
    """
    adapters = lora.adapters_of(model)
    if not adapters:
        raise InputError("the model has no adapters; save_hf writes a plain model")
    host = {name: [_gathered(x[...]) for x in (a.A, a.B, a.scale)] for name, a in adapters.items()}
    tensors, modules = {}, {}
    for tensor in tensor_names.tensors(model.config):
        name = tensor.parameter.removeprefix("blocks.")
        is_target = tensor.parameter == "wte" or (tensor.layer is not None and name in host)
        if not is_target or name not in host:
            continue
        A, B, scale = host[name] if tensor.layer is None else (x[tensor.layer] for x in host[name])
        used = scale != 0
        A, B, scale = A.reshape(len(A), -1)[used], B.reshape(-1, len(scale))[:, used], scale[used]
        if not len(scale):
            continue
        if (scale != scale[0]).any():
            B, scale = B * scale, np.ones_like(scale)
        module = tensor.name.removesuffix(".weight")
        modules[module] = (len(scale), _round(float(scale[0]) * len(scale)))
        ends = ("lora_embedding_A", "lora_embedding_B") if name == "wte" else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{_PREFIX}{module}.{end}": np.ascontiguousarray(x) for end, x in zip(ends, (A, B), strict=True)}
    (rank, alpha), _ = collections.Counter(modules.values()).most_common(1)[0]
    fields = _FRESH | dict(
        r=rank, lora_alpha=alpha, lora_dropout=max(a.rate for a in adapters.values()), target_modules=sorted(modules),
        rank_pattern={module: r for module, (r, _) in modules.items() if r != rank},
        alpha_pattern={module: a for module, (_, a) in modules.items() if a != alpha},
        base_model_name_or_path=None if base is None else str(base),
    )  # fmt: skip
    metadata = {} if base is None else {_FINGERPRINT: fingerprint(Path(base))}
    return Plan(json.dumps(fields, indent=2, sort_keys=True) + "\n", tensors, metadata)


def write(directory: Path, made: Plan) -> None:
    """Writes a plan into a directory that exists."""
    layout = files.file_order([(name, "F32", x.shape) for name, x in made.tensors.items()])
    files.write_file(directory / WEIGHTS, layout, (made.tensors[name] for name, _, _ in layout), made.metadata)
    (directory / CONFIG).write_bytes(made.config_text.encode())


def fingerprint(directory: Path) -> str:
    """SHA-256 of a model's name, however it is sharded: of each tensor the name, dtype, shape and first bytes.

    For a workdir, of the checksums of its newest checkpoint's model. Cheap: an 8B model has 291 tensors.
    """
    if (directory / "checkpoints").is_dir():
        return _fingerprint_of_workdir(directory)
    digest = hashlib.sha256()
    for name, tensor in sorted(files.read_directory(directory).items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        row = math.prod(tensor.shape[1:]) * files.DTYPES[tensor.dtype].itemsize
        rows = slice(0, min(tensor.shape[0], -(-_SAMPLE // max(row, 1))))
        for _, values in tensor.chunks([rows, *tensor.whole[1:]]):
            digest.update(values.tobytes()[:_SAMPLE])
    return digest.hexdigest()


def _fingerprint_of_workdir(directory: Path) -> str:
    place = place_of(directory)
    found = {name: facts for name, facts in checksums(place).items() if name.startswith("model/")}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else ""


def _gathered(x: jax.Array) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def _round(alpha: float) -> int | float:
    """PEFT's alpha is a whole number where it can be."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-6) else alpha
