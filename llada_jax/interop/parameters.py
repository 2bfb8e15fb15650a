"""The parameters of a model, put together from the tensors of published files."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from llada_jax.fields import InputError
from llada_jax.interop import tensor_names
from llada_jax.interop.safetensors_io import Stored, some
from llada_jax.model import quantize
from llada_jax.model.config import ModelConfig

_CODED_BYTES = 2**19  # of a tensor that are quantised at a time, which takes ten times the memory

Progress = Callable[[int], object]  # called with the bytes that were read or written, such as tqdm.update


def assign(stored: dict[str, Stored], c: ModelConfig, directory: Path) -> dict[str, list[Stored]]:
    """The tensors of each parameter in the order of the layers.

    Raises InputError for a tensor that is missing, of another shape than config.json says, or not part of this model.
    """
    parts: dict[str, list[Stored]] = {}
    missing: list[str] = []
    for tensor in tensor_names.tensors(c):
        found = stored.get(tensor.name)
        if found is None:
            missing.append(tensor.name)
            if len(missing) > 5:  # config.json may promise any number of layers
                break
        elif found.shape != tensor.shape:
            raise InputError(
                f"{found.path}: tensor {tensor.name} has shape {found.shape}, config.json makes it {tensor.shape}"
            )
        else:
            parts.setdefault(tensor.parameter, []).append(found)
    if missing:
        raise InputError(f"{directory}: lacks {some(missing)}, which config.json calls for")
    head = tensor_names.head_name(c)
    if c.weight_tying and head in stored:
        _require_tied(stored[head], parts["wte"][0], head)
    used = {tensor.name for tensor in tensor_names.tensors(c)} | ({head} if c.weight_tying else set())
    if extra := sorted(set(stored) - used):
        raise InputError(f"{directory}: holds {some(extra)}, which config.json has no place for")
    return parts


def _require_tied(head: Stored, embedding: Stored, name: str) -> None:
    """Raises InputError unless a tied head that is stored a second time holds the numbers of the embedding."""
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    pairs = zip(head.chunks(head.whole), embedding.chunks(embedding.whole), strict=True)
    if not same or not all(a.tobytes() == b.tobytes() for (_, a), (_, b) in pairs):
        raise InputError(f"{head.path}: {name} differs from the embedding, but config.json ties them")


def parameter(leaf, dtype, parts: Sequence[Stored], stacked: bool, progress: Progress) -> jax.Array:
    """One parameter sharded like `leaf`; of each tensor only the slices that this process holds are read."""
    cache: dict[tuple, np.ndarray] = {}  # devices that hold copies share what was read

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        if ranges not in cache:
            out = cache[ranges] = _aligned([stop - start for start, stop in ranges], dtype)
            layers, axes = (parts[index[0]], 1) if stacked else (parts, 0)
            for target, part in zip(out if stacked else [out], layers, strict=True):
                published = _published_index(ranges[axes:], leaf.shape[axes:], part.shape)
                target = target.reshape([s.stop - s.start for s in published])
                for rows, values in part.chunks(published):
                    target[rows] = values
                    progress(values.nbytes)
        return cache[ranges]

    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, leaf.sharding, read, dtype=dtype))


def coded(scale, values, parts: Sequence[Stored], progress: Progress) -> tuple[jax.Array, jax.Array]:
    """A stacked weight in few bits: (scale, values), sharded like the leaves given, quantised some rows at a time.

    A scale of int8 is that of an output channel, a whole row, so every process reads whole rows.
    """
    cache: dict[tuple, np.ndarray] = {}
    is_grouped = scale.ndim == values.ndim
    encode = lambda x: quantize.encode_groups(x, group) if is_grouped else quantize.encode(x, 1)
    group = values.shape[-1] // scale.shape[-1]
    rows_of = (len(parts), parts[0].shape[0])  # layers, rows of the published tensor
    scales = np.zeros((*rows_of, *[math.prod(scale.shape) // math.prod(rows_of)] * is_grouped), np.float32)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index, values.shape, strict=True))
        if ranges not in cache:
            out = cache[ranges] = _aligned([stop - start for start, stop in ranges], values.dtype)
            for target, layer in zip(out, range(*ranges[0]), strict=True):
                rows, columns = _published_index(ranges[1:], values.shape[1:], parts[layer].shape)
                target = target.reshape(rows.stop - rows.start, columns.stop - columns.start)
                whole = slice(0, parts[layer].shape[1])
                for some_rows, x in parts[layer].chunks([rows, whole], _CODED_BYTES):
                    encoded, row_scales = encode(x)
                    scales[layer, rows.start + some_rows.start : rows.start + some_rows.stop] = row_scales
                    target[some_rows] = encoded[:, columns]
                    progress(x.nbytes)
        return cache[ranges]

    made = jax.block_until_ready(jax.make_array_from_callback(values.shape, values.sharding, read, dtype=values.dtype))
    scales = scales.reshape(scale.shape)
    return jax.make_array_from_callback(scale.shape, scale.sharding, lambda index: scales[index]), made


def _published_index(ranges: Sequence[tuple[int, int]], shape: Sequence[int], published: Sequence[int]) -> list[slice]:
    """Where a part of a parameter of one layer lies in the published tensor.

    Heads and head size are two axes here and one there; of such axes only the first is ever split.
    """
    axes, index = iter(zip(ranges, shape, strict=True)), []
    for size in published:
        (start, stop), covered = next(axes)
        while covered < size:
            inner, n = next(axes)
            assert inner == (0, n)
            start, stop, covered = start * n, stop * n, covered * n
        index.append(slice(start, stop))
    return index


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that XLA on CPU takes over as it is; of other memory it keeps a copy beside the original."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)
