"""The parameters of a model, put together from the tensors of published files."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
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

    A scale of int8 is that of an output channel, a whole row, so every process reads whole rows. In int4 the axes of a
    row come before those of the rows.
    """
    cache: dict[tuple, np.ndarray] = {}
    rows, columns = parts[0].shape  # of the published tensors
    is_grouped = values.dtype == jnp.int4
    groups = math.prod(scale.shape) // (len(parts) * rows)
    encode = lambda x: quantize.encode_groups(x, columns // groups) if is_grouped else quantize.encode(x, 1)
    scales = np.zeros((len(parts), rows, groups), np.float32)
    turn = _first_of(values.shape[1:], columns) if is_grouped else 0  # axes of a row that come first

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index, values.shape, strict=True))
        if ranges not in cache:
            out = cache[ranges] = _aligned([stop - start for start, stop in ranges], values.dtype)
            turned = lambda x: [*x[1 + turn :], *x[1 : 1 + turn]]
            own, all_of_row = _published_index(turned(ranges), turned(values.shape), parts[0].shape), slice(0, columns)
            for target, layer in zip(out, range(*ranges[0]), strict=True):
                sizes = [s.stop - s.start for s in own]
                target = target.reshape(sizes[::-1]).T if is_grouped else target.reshape(sizes)
                for some, x in parts[layer].chunks([own[0], all_of_row], _CODED_BYTES):
                    encoded, row_scales = encode(x)
                    place = slice(own[0].start + some.start, own[0].start + some.stop)
                    scales[layer, place] = row_scales.reshape(-1, groups)
                    target[some] = encoded.reshape(-1, columns)[:, own[1]]
                    progress(x.nbytes)
        return cache[ranges]

    made = jax.block_until_ready(jax.make_array_from_callback(values.shape, values.sharding, read, dtype=values.dtype))
    held = (scales.swapaxes(1, 2) if is_grouped else scales).reshape(scale.shape)
    return jax.make_array_from_callback(scale.shape, scale.sharding, lambda index: held[index]), made


def _first_of(shape: Sequence[int], size: int) -> int:
    """How many of the first axes have so many entries together."""
    return next(n for n in range(1, len(shape) + 1) if math.prod(shape[:n]) == size)


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
