"""The mesh, its four axes, and what each of them shards.

data     rows of the batch, parameters copied; across slices
fsdp     rows of the batch, parameters and optimizer state split; inside a slice
tensor   heads, the MLP's hidden width and the vocabulary
context  positions of a row

The mesh is Explicit: shardings are part of array types, so each spec stands next to the shape that it splits. Without
a mesh (`jax.set_mesh` not called) everything runs on one device and the specs say nothing.
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.config import InputError

AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")  # the axes that split the rows of a batch
TOKENS = P(BATCH, "context")  # [B, L]
HIDDEN = P(BATCH, "context", None)  # [B, L, D]


def make_mesh(sizes: dict[str, int], devices: list | None = None) -> Mesh:
    """A mesh over all devices (or the given ones). One axis may be -1: it takes the devices that are left.

    Raises InputError when the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    fixed = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise InputError(f"config.mesh {_show(shape)}: sizes must be positive and at most one may be -1")
    if -1 in shape and len(devices) % fixed == 0:
        shape[shape.index(-1)] = len(devices) // fixed
    if math.prod(shape) != len(devices):
        raise InputError(
            f"config.mesh {_show(shape)} does not fit {len(devices)} devices: the product must be {len(devices)}, "
            "or set one axis to -1"
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Explicit,) * 4, devices=devices)


def require_mesh(mesh) -> None:
    """Raises InputError for a mesh that `make_mesh` would not make."""
    if not isinstance(mesh, Mesh) or mesh.axis_names != AXES or set(mesh.axis_types) != {AxisType.Explicit}:
        raise InputError(f"mesh must have the explicit axes {', '.join(AXES)}; make it with sharding.make_mesh")


def _show(shape: list[int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set with `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def spec(*axes) -> P | None:
    """`PartitionSpec(*axes)` for an `out_sharding=`, or None where no mesh is set."""
    return None if current_mesh() is None else P(*axes)


def reshard(x: jax.Array, *axes) -> jax.Array:
    """`x` moved to the given axes; unchanged without a mesh."""
    return x if current_mesh() is None else jax.sharding.reshard(x, P(*axes))


def use(param, dtype) -> jax.Array:
    """FSDP in one line: a parameter cast for compute, then gathered over fsdp (it stays split over tensor)."""
    w = param[...].astype(dtype)
    if current_mesh() is None:
        return w
    return reshard(w, *(None if axis == "fsdp" else axis for axis in jax.typeof(w).sharding.spec))


def place_rows(x_host, mesh: Mesh) -> jax.Array:
    """This process's rows [B/hosts, ...] as its part of one global array [B, ...], split over the batch axes."""
    sharding = NamedSharding(mesh, P(*TOKENS[: x_host.ndim]))
    return jax.make_array_from_process_local_data(sharding, x_host)
