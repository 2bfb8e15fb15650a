"""TPU chips and the slices that exist of them: what a chip can do, which shapes can be rented, how chips are wired.

Sources: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} for peaks, memory, links and shapes;
jax-ml.github.io/scaling-book for one-way link speeds; the compiler's own messages for the memory that programs can use.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re

from llada_jax.fields import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. Speeds are of a whole chip, in units without prefix: FLOP/s, bytes/s, Hz, bytes."""

    name: str
    kind: str  # how `device.device_kind` begins
    flops: float  # peak, bfloat16 with float32 accumulation
    clock: float  # of the TensorCore: turns the compiler's estimated cycles into seconds
    memory: float  # HBM that a program can use, of one device (the compiler's "available HBM")
    memory_bandwidth: float
    link: float  # one ICI link, one way
    dimensions: int  # of the torus
    network: float  # data-center network (DCN), one way
    attention: float  # assumed share of peak that the splash kernel reaches; see estimate.py
    devices: int = 1  # JAX devices of a chip
    counts_cores: bool = False  # the number in a name such as v5p-128 counts TensorCores, two a chip
    max_chips: int = 256


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 1.05e9, 30.75 * GIB, 1.23e12, 45e9, 3, 6.25e9, 0.55,
             counts_cores=True, max_chips=4096),
        Chip("v5e", "TPU v5 lite", 197e12, 1.5e9, 15.75 * GIB, 0.82e12, 45e9, 2, 3.125e9, 0.55),
        Chip("v5p", "TPU v5", 459e12, 1.75e9, 95.73 * GIB, 2.765e12, 90e9, 3, 6.25e9, 0.55,
             counts_cores=True, max_chips=6144),
        Chip("v6e", "TPU v6 lite", 918e12, 1.75e9, 31.24 * GIB, 1.64e12, 90e9, 2, 12.5e9, 0.35),
        # The clock follows from the peak, as it does for the others: four 256 x 256 units a core.
        Chip("tpu7x", "TPU7x", 2307e12, 2.2e9, 94.74 * GIB, 7.38e12, 90e9, 3, 12.5e9, 0.35,
             devices=2, counts_cores=True, max_chips=9216),
    )
}  # fmt: skip
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v7x": "tpu7x", "7x": "tpu7x"}
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True)
class Slice:
    """`count` equal slices of one chip; `shape` is that of one of them, in chips."""

    chip: Chip
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
    if match is None or name not in CHIPS:
        raise InputError(
            f"--topology={text}: unknown; write CHIP:SHAPE or CHIP-NUMBER with a chip of {', '.join(CHIPS)}, "
            "such as v5e:16x16 or v5p-128"
        )
    if slices < 1:
        raise InputError(f"--slices={slices}: must be at least 1")
    chip = CHIPS[name]
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


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    if len(shape) != chip.dimensions:
        return False
    if chip.dimensions == 2:
        return shape in _FLAT
    cubes = all(size % 4 == 0 and size > 0 for size in shape)
    ascending = all(a <= b for a, b in itertools.pairwise(shape))
    return shape in _BELOW_A_CUBE or (cubes and ascending and math.prod(shape) <= chip.max_chips)


def _shape_of(chip: Chip, chips: int) -> tuple[int, ...] | None:
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


def _shapes(chip: Chip) -> str:
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
