"""The mesh, its four axes, and what each of them shards.

data     rows of the batch, parameters copied; across slices
fsdp     rows of the batch, parameters and optimizer state split; inside a slice
tensor   heads, the MLP's hidden width and the vocabulary
context  positions of a row

The mesh is Explicit: shardings are part of array types, so each spec stands next to the shape that it splits. Without
a mesh (`jax.set_mesh` not called) everything runs on one device and the specs say nothing.
"""

import contextlib
import functools
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.fields import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.parallel.chips import SUMS_BESIDE_PRODUCTS, compiler_options_for

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")  # the axes that split the rows of a batch
TOKENS = P(BATCH, "context")  # [B, L]
HIDDEN = P(BATCH, "context", None)  # [B, L, D]


def make_mesh(sizes: dict[str, int], devices: list | None = None) -> Mesh:
    """A mesh over all devices (or the given ones). One axis may be -1: it takes the devices that are left.

    Devices of several TPU slices, or GPU hosts, are told by their `slice_index`: `data` runs across them as far as it
    goes, then `fsdp`; the others stay inside one. Raises InputError when the product of the sizes is not the number of
    devices, or data x fsdp not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = list(mesh_shape(sizes, len(devices)).values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})  # lone slices may lack the attribute
    across = _across_slices(shape, slices)
    inside = [size // count for size, count in zip(shape, across, strict=True)]
    # A logical axis may take part of a physical one, such as fsdp=8 context=2 on a 4x4 slice.
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 4)


def mesh_shape(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """The size of each axis over so many devices, -1 filled in. Raises InputError where they don't fit."""
    shape = [sizes[axis] for axis in AXES]
    fixed = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise InputError(f"config.mesh {_show(shape)}: sizes must be positive and at most one may be -1")
    if -1 in shape and devices % fixed == 0:
        shape[shape.index(-1)] = devices // fixed
    if math.prod(shape) != devices:
        raise InputError(
            f"config.mesh {_show(shape)} does not fit {devices} devices: the product must be {devices}, "
            "or set one axis to -1"
        )
    return dict(zip(AXES, shape, strict=True))


def inference_mesh(model: ModelConfig, tensor: int = 0) -> Mesh | None:
    """A mesh for sampling and scoring: copies of the model over `data`, each split over `tensor` devices.

    tensor 0: as few as hold the weights in half of their memory, in bfloat16. None for one device. Raises InputError
    where `tensor` does not divide the devices or the heads.
    """
    devices = jax.device_count()
    if devices == 1 and tensor in (0, 1):
        return None
    if not tensor:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")  # CPUs name none
        d, f, kv = model.d_model, model.mlp_hidden_size, model.n_kv_heads * model.head_dim
        layer = 2 * d * d + 2 * d * kv + 3 * d * f
        nbytes = 2 * (model.n_layers * layer + (1 if model.weight_tying else 2) * d * model.embedding_size)
        tensor = 1
        while limit and nbytes / tensor > limit / 2 and devices % (2 * tensor) == 0:
            tensor *= 2
    if devices % tensor:
        raise InputError(f"--tensor={tensor} does not divide the {devices} devices")
    return make_mesh(dict(data=-1, fsdp=1, tensor=tensor, context=1))


def _across_slices(shape: list[int], slices: int) -> list[int]:
    """How the axes run over slices, or over GPU hosts, between which the network is slow: data first, then fsdp."""
    data = math.gcd(shape[0], slices)
    if shape[1] % (slices // data):
        raise InputError(
            f"config.mesh {_show(shape)}: the devices are in {slices} slices or hosts; data x fsdp must be a "
            "multiple of that"
        )
    return [data, slices // data, 1, 1]


def require_mesh(mesh) -> None:
    """Raises InputError for a mesh that `make_mesh` would not make."""
    if not isinstance(mesh, Mesh) or mesh.axis_names != AXES or set(mesh.axis_types) != {AxisType.Explicit}:
        raise InputError(f"mesh must have the explicit axes {', '.join(AXES)}; make it with sharding.make_mesh")


def require_divides(model: ModelConfig, mesh: Mesh, row_length: int | None = None) -> None:
    """Raises InputError where an axis of the mesh does not divide what it shards."""
    sharded = [
        ("fsdp", "model.d_model", model.d_model),
        ("tensor", "model.n_kv_heads", model.n_kv_heads),
        ("tensor", "model.mlp_hidden_size", model.mlp_hidden_size),
        ("tensor", "model.embedding_size", model.embedding_size),
        ("context", "data.row_length", row_length or 0),
    ]
    for axis, name, size in sharded:
        if size % mesh.shape[axis]:
            raise InputError(f"config.mesh.{axis}={mesh.shape[axis]} does not divide config.{name}, which is {size}")


def _show(shape: list[int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set with `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def under(mesh: Mesh | None):
    """A context in which the mesh is set; without one, in which nothing is."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def platform() -> str:
    """What is compiled for, "cpu", "gpu" or "tpu": the devices of the mesh, which may be absent ones of a topology."""
    mesh = current_mesh()
    device = None if mesh is None else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def spec(*axes) -> P | None:
    """`PartitionSpec(*axes)` for an `out_sharding=`, or None where no mesh is set."""
    return None if current_mesh() is None else P(*axes)


def reshard(x: jax.Array, *axes) -> jax.Array:
    """`x` moved to the given axes; unchanged without a mesh."""
    return x if current_mesh() is None else jax.sharding.reshard(x, P(*axes))


def gather_fsdp(param, dtype) -> jax.Array:
    """FSDP in one line: a parameter cast for compute, then gathered over fsdp (it stays split over tensor)."""
    return gathered(param[...].astype(dtype))


def gathered(w: jax.Array) -> jax.Array:
    """`w`, no longer split over fsdp."""
    if current_mesh() is None:
        return w
    return reshard(w, *(None if axis == "fsdp" else axis for axis in jax.typeof(w).sharding.spec))


def sum_gradients_first(x, weights):
    """(x, weights), unchanged. Backward, the gradient of x waits for those of `weights`, summed over the devices.

    Only where `sums_beside_products`: XLA would leave these sums for the end of a layer's backward pass, where nothing
    is left to compute beside them. On v5e-256 half of the time of all sums would be waited for.
    """
    return _together(x, weights) if sums_beside_products() else (x, weights)


def sums_beside_products() -> bool:
    """Whether the chips of the mesh sum gradients while they compute something else (`chips.SUMS_BESIDE_PRODUCTS`)."""
    mesh = current_mesh()
    if mesh is None or mesh.shape["data"] * mesh.shape["fsdp"] == 1 or mesh.abstract_device is None:
        return False
    return SUMS_BESIDE_PRODUCTS.items() <= compiler_options_for(mesh.abstract_device.device_kind).items()


@jax.custom_vjp
def _together(x, weights):
    return x, weights


_together.defvjp(lambda x, weights: ((x, weights), None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


@functools.lru_cache
def rows_of_process(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, ascending int [B].

    They need not be neighbours, as a mesh follows the wiring of the chips, and processes between which `tensor` or
    `context` is split hold the same ones.
    """
    parts = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((batch_size,)).values()
    return np.unique([row for index in parts if index for row in range(*index[0].indices(batch_size))])


def global_batch(x_host: np.ndarray, mesh: Mesh, batch_size: int | None = None) -> jax.Array:
    """A global array [batch_size, ...] of which `x_host` holds the rows of this process; None: it holds all of them."""
    rows = np.arange(len(x_host)) if batch_size is None else rows_of_process(mesh, batch_size)
    size = batch_size or len(x_host)

    def part(index) -> np.ndarray:
        start, stop, _ = index[0].indices(size)
        at = np.searchsorted(rows, start)
        return x_host[at : at + stop - start, *index[1:]]

    sharding = rows_sharding(mesh, x_host.ndim)
    shape = (size, *x_host.shape[1:])
    parts = sharding.addressable_devices_indices_map(shape)
    placed = jax.device_put([part(index) for index in parts.values()], list(parts))  # asked for, says transfer_guard
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def rows_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """How an array [B, ...] of a batch lies on the mesh."""
    return NamedSharding(mesh, P(*TOKENS[:ndim]))


def of_hosts(value: float, mesh: Mesh) -> jax.Array:
    """float32 [devices] on every device: the `value` that the host of each gave. Waits for nothing."""
    sharding = NamedSharding(mesh, P(AXES))
    devices = list(sharding.addressable_devices)
    placed = jax.device_put([np.full(1, value, np.float32)] * len(devices), devices)
    return _on_every_device(jax.make_array_from_single_device_arrays((mesh.size,), sharding, placed))


@jax.jit
def _on_every_device(x: jax.Array) -> jax.Array:
    return jax.sharding.reshard(x, P(None))
