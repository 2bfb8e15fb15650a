"""How long a transfer keeps its road busy: the links between chips, the network between slices, the way to the host.

Of a collective that is the bandwidth of the rings that its devices form, at the share of the peak that was measured.

Gathering P bytes over n devices brings (n-1)/n·P to each; on a torus, XLA sends parts of it around every dimension at
once, both ways, so a chip takes 2 links' worth per ring dimension, and 1 where the ends don't meet. Reducing with
scatter is the same backwards, all-reduce is both. In an all-to-all half of all bytes cross the middle of the longest
dimension. A hop costs a microsecond more.
"""

import dataclasses

import numpy as np

from llada_jax.tools.ahead.slices import Slice

_HOP_SECONDS = 1e-6
_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1, "ragged-all-to-all": 1,
           "collective-broadcast": 1, "collective-permute": 1}  # fmt: skip
_EXCHANGES = ("all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One execution of a collective. `payload`: bytes of the whole array; of an exchange, what one device gives."""

    kind: str
    axes: tuple[str, ...]
    payload: float
    ici_seconds: float
    dcn_seconds: float
    host_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ici_seconds + self.dcn_seconds + self.host_seconds

    @property
    def network(self) -> str:
        return "host" if self.host_seconds else "dcn" if self.dcn_seconds else "ici"


def transfer(kind: str, payload: float, group: list[int], mesh, topology: Slice) -> Transfer:
    """The time on the links of a collective over `group`, positions in `mesh.devices.flat`."""
    devices = [mesh.devices.flat[i] for i in group]
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    inside = len(devices) // slices
    passes = _PASSES[kind]
    dcn = passes * payload * (slices - 1) / slices / inside / (topology.chip.network / topology.chip.devices)
    first = getattr(devices[0], "slice_index", 0) or 0
    coords = np.array(
        [d.coords[: len(topology.shape)] for d in devices if (getattr(d, "slice_index", 0) or 0) == first]
    )
    if kind == "collective-permute":
        ici = payload / _link(topology) * topology.chip.devices if slices == 1 else 0.0
    else:
        ici = _ici_seconds(kind, payload, coords, inside, topology)
    return Transfer(kind, _axes(group, mesh), payload, ici, dcn)


def _ici_seconds(kind: str, payload: float, coords: np.ndarray, devices: int, topology: Slice) -> float:
    bandwidth, hops, crossing = 0.0, 0.0, 0.0
    for along, size, wrapped in zip(coords.T, topology.shape, topology.wrap, strict=True):
        places = np.unique(along)
        if len(places) == 1:
            continue
        stride = (places[-1] - places[0]) / (len(places) - 1)  # other groups use the links in between, too
        ring = wrapped and len(places) * stride == size
        along_this = (2 if ring else 1) * _link(topology) / stride
        bandwidth += along_this
        crossing = max(crossing, payload * topology.chip.devices * len(places) / 4 / along_this)
        hops += size / 2 if ring else places[-1] - places[0]
    if not bandwidth:  # one chip, or two cores of one
        return 0.0
    if kind in _EXCHANGES:
        return crossing + hops * _HOP_SECONDS
    return _PASSES[kind] * (
        payload * (devices - 1) / devices / (bandwidth / topology.chip.devices) + hops * _HOP_SECONDS
    )


def _link(topology: Slice) -> float:
    return topology.chip.link * topology.chip.link_share


def host_transfer(kind: str, payload: float, topology: Slice) -> Transfer:
    """`kind`: "to host" or "from host". The devices of a chip share its way."""
    return Transfer(kind, (), payload, 0.0, 0.0, payload * topology.chip.devices / topology.chip.host)


def _axes(group: list[int], mesh) -> tuple[str, ...]:
    """The axes of the mesh along which the group's devices differ; "part of" where they don't fill them."""
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    axes = tuple(name for name, along in zip(mesh.axis_names, places, strict=True) if len(set(along)) > 1)
    whole = int(np.prod([mesh.shape[name] for name in axes])) == len(group)
    return axes if whole else ("part of", *axes)
