"""Checks of the arrays and numbers that callers pass: a mistake is an InputError of one line."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from llada_jax.fields import InputError


def require(ok, message: str) -> None:
    if not ok:
        raise InputError(message)


def token_ids(name: str, ids, rows: int, shape: str) -> np.ndarray:
    """int32 ids of an embedding with so many rows. shape: "[tokens]" or "[rows, tokens]", which they must have."""
    ids = _array(name, ids)
    require(ids.ndim == shape.count(",") + 1, f"the {name} has shape {ids.shape}; it must be {shape}")
    require(ids.size > 0, f"the {name} is empty")
    require(ids.dtype.kind in "iu", f"the {name} holds {ids.dtype}, not token ids")
    for token in (int(ids.min()), int(ids.max())):
        token_id(f"the {name} holds", token, rows)
    return ids.astype(np.int32)


def token_id(name: str, token: int, rows: int) -> None:
    require(0 <= whole(name, token) < rows, f"{name} {token}, outside the {rows} rows of the embedding")


def zeros_and_ones(name: str, values) -> np.ndarray:
    """A mask as bool: booleans, or numbers that are all 0 or 1."""
    values = _array(name, values)
    require(values.dtype.kind in "biuf" and np.isin(values, (0, 1)).all(), f"{name} may hold 0 and 1 only")
    return values.astype(bool)


def ratios(masked: np.ndarray, ratio: np.ndarray) -> None:
    """Mask ratios [.., 1 or L] are what CE is divided by wherever `masked` [.., L] holds."""
    asked = np.where(masked, ratio, 1.0)
    require(
        ((asked > 0) & (asked <= 1 + 1e-6)).all(),
        "mask_ratio must be positive, and at most 1, where something is masked",
    )


def whole(name: str, value) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} {value!r} is not a whole number") from None


def not_negative(name: str, value) -> float:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    require(math.isfinite(number), f"{name} {value!r} is not a finite number")
    require(number >= 0, f"{name} {value} is negative")
    return number


def random_key(key) -> jax.Array:
    """One key, of `jax.random.key` or the older `jax.random.PRNGKey`; None: key 0."""
    if key is None:
        return jax.random.key(0)
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    one = shape == () if typed else dtype == np.uint32 and shape is not None and len(shape) == 1
    of_shape = "" if shape is None else f" of shape {shape}"
    require(one, f"key must be one key, such as jax.random.key(0), not {type(key).__name__}{of_shape}")
    return key


def values(x) -> np.ndarray | None:
    """What an array holds; None while it is traced or parts of it are on other hosts."""
    if isinstance(x, Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)


def array(name: str, x, kinds: str) -> Any:
    """`x` as an array, traced or not, of one of NumPy's kinds of dtype: "iu" integers, "b" booleans, "f" floats."""
    x = x if isinstance(x, jax.Array) else _array(name, x)
    kind = "f" if jnp.issubdtype(x.dtype, jnp.floating) else np.dtype(x.dtype).kind
    require(kind in kinds, f"{name} holds {x.dtype}; it must be {'numbers' if 'f' in kinds else 'whole numbers'}")
    return x


def _array(name: str, x) -> np.ndarray:
    try:
        return np.asarray(x)
    except (TypeError, ValueError) as error:  # rows of different lengths, for one
        raise InputError(f"{name} is no array ({' '.join(str(error).split())[:100]})") from None


def left_pad(rows: list[list[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as int32 [B, P], and which of it is real, int32 [B, P]."""
    width = max(map(len, rows))
    tokens = np.full((len(rows), width), pad_id, np.int32)
    real = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], real[i, width - len(row) :] = row, 1
    return tokens, real
