"""The slices of TPUs that can be rented, and how their chips are wired.

Shapes: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re

from llada_jax.fields import InputError
from llada_jax.parallel.chips import TPUS, Tpu

_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v7x": "tpu7x", "7x": "tpu7x"}
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True)
class Slice:
    """`count` equal slices of one chip; `shape` is that of one of them, in chips."""

    chip: Tpu
    shape: tuple[int, ...]
    count: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.count

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which dimensions are rings: a flat slice's of 16, and all of a slice made of 4x4x4 cubes."""
        if self.chip.dimensions == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * 3

    def __str__(self) -> str:
        one = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return one if self.count == 1 else f"{self.count} slices of {one}"


def parse_topology(text: str, slices: int = 1) -> Slice:
    """The slice that `v5p:4x4x4` or `v5p-128` names. Raises InputError for one that nobody can rent."""
    match = re.fullmatch(r"\s*([a-z0-9]+?)(?::(\d+(?:x\d+){1,2})|-(\d+))\s*", text.lower())
    name = _ALIASES.get(match[1], match[1]) if match else ""
    if match is None or name not in TPUS:
        raise InputError(
            f"--topology={text}: unknown; write CHIP:SHAPE or CHIP-NUMBER with a chip of {', '.join(TPUS)}, "
            "such as v5e:16x16 or v5p-128"
        )
    if slices < 1:
        raise InputError(f"--slices={slices}: must be at least 1")
    chip = TPUS[name]
    if match[2]:
        shape = tuple(int(size) for size in match[2].split("x"))
        if not _exists(chip, shape):
            raise InputError(f"--topology={text}: no such slice; {_shapes(chip)}")
        return Slice(chip, shape, slices)
    number = int(match[3])
    cores = 2 if chip.counts_cores else 1
    shape = _shape_of(chip, number // cores) if number % cores == 0 else None
    if shape is None:
        counted = f"{chip.name}-N counts TensorCores, two a chip; " if cores == 2 else ""
        raise InputError(f"--topology={text}: no such slice; {counted}{_shapes(chip)}")
    return Slice(chip, shape, slices)


def _exists(chip: Tpu, shape: tuple[int, ...]) -> bool:
    if len(shape) != chip.dimensions:
        return False
    if chip.dimensions == 2:
        return shape in _FLAT
    cubes = all(size % 4 == 0 and size > 0 for size in shape)
    ascending = all(a <= b for a, b in itertools.pairwise(shape))
    return shape in _BELOW_A_CUBE or (cubes and ascending and math.prod(shape) <= chip.max_chips)


def _shape_of(chip: Tpu, chips: int) -> tuple[int, ...] | None:
    """The shape that a bare number means: the one nearest to a cube."""
    if chip.dimensions == 2:
        return next((shape for shape in _FLAT if math.prod(shape) == chips), None)
    below = next((shape for shape in _BELOW_A_CUBE if math.prod(shape) == chips), None)
    if below or chips % 64:
        return below
    found = [
        (a, b, chips // (a * b))
        for a in range(4, round(chips ** (1 / 3)) + 1, 4)
        for b in range(a, chips // a + 1, 4)
        if chips % (a * b) == 0 and _exists(chip, (a, b, chips // (a * b)))
    ]
    return min(found, key=lambda shape: shape[2] - shape[0], default=None)


def _shapes(chip: Tpu) -> str:
    if chip.dimensions == 2:
        return f"{chip.name} comes in {', '.join('x'.join(map(str, shape)) for shape in _FLAT)}"
    small = ", ".join("x".join(map(str, shape)) for shape in _BELOW_A_CUBE)
    return (
        f"{chip.name} comes in {small}, and in ascending multiples of 4 such as 4x4x8, up to {chip.max_chips:,} chips"
    )


def absent_devices(topology: Slice) -> list:
    """The devices of a slice that is not there, for a mesh to compile on.

    Raises InputError without libtpu. Without its wrap-around links XLA would believe in a mesh, not a torus, and would
    gather by all-reduce: twice the bytes.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("compiling for a TPU needs its compiler, libtpu: pip install 'llada_jax[tpu]'")
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",  # don't ask a cloud machine who it is,
        "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost",  # nor complain of no answer
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run: two compilers may share a machine
    }  # fmt: skip
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    chip, shape = topology.chip, topology.shape + (1,) * (3 - len(topology.shape))
    options: dict = dict(num_slices=topology.count) if topology.count > 1 else {}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores as one device, as on real machines
    if chip.dimensions == 2 and math.prod(shape) in (1, 8):
        options["chips_per_host_bounds"] = shape  # one host; larger flat slices have four chips a host
    described = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{chip.name}:{'x'.join(map(str, topology.shape))}",
        wrap=topology.wrap + (False,) * (3 - len(topology.shape)),
        **options,
    )
    devices = list(described.devices)
    assert len(devices) == topology.chips * chip.devices and devices[0].device_kind.startswith(chip.kind), devices[0]
    return devices
