"""Reading the compiler's dump and pricing it: small programs written by hand, slices, links."""

import types
from pathlib import Path

import numpy as np
import pytest

from llada_jax.fields import InputError
from llada_jax.parallel.chips import TPUS
from llada_jax.tools.ahead import cost, hlo, links, slices

V5E_LINK = 0.95 * 45e9  # bytes/s, one way: the share of the peak that was measured
PROGRAM = (Path(__file__).parents[1] / "golden" / "scheduled.hlo").read_text()  # in the style of a dump, by hand


def run(program=PROGRAM, seconds=1e-3):
    parsed = hlo.parse(program)
    return cost.Machine(
        parsed, clock=1e6, bandwidth=1e12,
        transfer=lambda kind, payload, group: links.Transfer(
            kind, tuple(map(str, group)), payload, *((seconds, 0.0) if group else (0.0, 0.0, seconds))
        ),
        kernel=lambda i: 0.5, loop_trips=lambda i: 1.0, devices=4,
    ).run()  # fmt: skip


def test_a_loop_multiplies_and_an_early_start_hides():
    found = run()
    assert found.work == {"matmul": pytest.approx(32 * 600e-6), "vector": pytest.approx(1e-3), "attention": 0.5}
    assert found.cycles == 32 * 600 + 1000
    counted = {(t.kind, t.axes, t.payload): n for t, n in found.transfers.items()}
    assert counted == {("all-gather", tuple("0123"), 2048): 32, ("reduce-scatter", tuple("0123"), 2048): 32}
    # 600 of the gather's 1000 microseconds pass during the product; the fused reduction is waited for in full.
    assert found.waits == {"all-gather": pytest.approx(32 * 400e-6), "reduce-scatter": pytest.approx(32 * 1e-3)}
    assert found.seconds == pytest.approx(sum(found.work.values()) + sum(found.waits.values()))


def test_what_the_links_have_no_time_for_costs_nothing():
    found = run(seconds=0.0)
    assert found.seconds == pytest.approx(sum(found.work.values()))


OFFLOADED = """
%product (a: bf16[1,8,128]) -> bf16[1,8,128] {
  %a = bf16[1,8,128]{2,1,0} parameter(0)
  ROOT %dot.1 = bf16[1,8,128]{2,1,0} dot(%a, %a)
}

ENTRY %main (x: bf16[4,8,128]) -> bf16[1,8,128] {
  %x = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)
  %y = bf16[1,8,128]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %put = ((bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, s32[]), \
bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, u32[]{:S(2)}) async-start(%x, %y, %zero), calls=%update
  %get = ((bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, s32[]), bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) async-start(%x, %zero), calls=%slice
  %whole = (bf16[4,8,128]{2,1,0:T(8,128)(2,1)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, u32[]{:S(2)}) copy-start(%x)
  %near = (bf16[1,8,128]{2,1,0:T(8,128)S(1)}, bf16[1,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%y)
  %work = bf16[1,8,128]{2,1,0} fusion(%y), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"1500"}
  %put.done = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} async-done(%put)
  %get.done = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} async-done(%get)
  ROOT %whole.done = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} copy-done(%whole)
}
""".replace("\\\n", "")


def test_what_moves_to_the_host_and_back_takes_a_road_each_way():
    found = run(OFFLOADED)
    moved = {(t.kind, t.payload): n for t, n in found.transfers.items()}
    assert moved == {("to host", 2048): 1, ("from host", 2048): 1, ("from host", 8192): 1}
    # The first millisecond of each way passes during the product, and half of the second copy from the host.
    assert found.waits == {"to host": 0.0, "from host": pytest.approx(0.5e-3)}


def test_a_loop_without_a_constant_has_no_static_length():
    parsed = hlo.parse(PROGRAM.replace("s32[]{:T(128)} constant(32)", "s32[]{:T(128)} get-tuple-element(%s), index=0"))
    (loop,) = [i for i in parsed.computations["main"] if i.opcode == "while"]
    assert parsed.trips(loop) is None
    assert hlo.parse(PROGRAM).trips(loop) == 32


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,2},{1,3}}, x", [0, 2]),
        ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x", [0, 1, 2, 3]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", [0, 4]),
        ("replica_groups={}, x", list(range(8))),
        ("source_target_pairs={{0,4},{4,0}}", [0, 4]),
    ],
)
def test_groups_of_every_notation(text, group):
    assert hlo.first_group(text, 8) == group


def test_an_unknown_notation_is_no_guess():
    with pytest.raises(ValueError, match="can't read the groups"):
        hlo.first_group("replica_groups=new{0}", 8)


def test_types():
    assert hlo.array_bytes("(f32[4,8]{1,0:T(8,128)}, /*index=1*/bf16[2]{0}, u32[]{:S(2)})") == 128 + 4 + 4
    assert hlo.arrays("s32[]") == [("s32", ())]


@pytest.mark.parametrize(
    "text, chips_, shape, wrap",
    [
        ("v5e:16x16", 256, (16, 16), (True, True)),
        ("v5e-16", 16, (4, 4), (False, False)),
        ("v5litepod-128", 128, (8, 16), (False, True)),
        ("v5p-128", 64, (4, 4, 4), (True, True, True)),
        ("v5p-1024", 512, (8, 8, 8), (True, True, True)),
        ("v5p-512", 256, (4, 8, 8), (True, True, True)),
        ("v5p:2x2x4", 16, (2, 2, 4), (False, False, False)),
        ("tpu7x-128", 64, (4, 4, 4), (True, True, True)),
        ("v6e-1", 1, (1, 1), (False, False)),
    ],
)
def test_names_of_slices(text, chips_, shape, wrap):
    found = slices.parse_topology(text)
    assert (found.chips, found.shape, found.wrap) == (chips_, shape, wrap)


@pytest.mark.parametrize(
    "text, message",
    [
        ("v5e:32x32", "no such slice; v5e comes in 1x1"),
        ("v5p:3x3x3", "no such slice; v5p comes in 2x2x1"),
        ("v5p:8x4x4", "no such slice"),
        ("v5p-100", "counts TensorCores"),
        ("v5p:16x16x28", "up to 6,144 chips"),
        ("v9:2x2", "unknown; write CHIP:SHAPE"),
        ("h100", "unknown"),
    ],
)
def test_slices_that_nobody_can_rent(text, message):
    with pytest.raises(InputError, match=message):
        slices.parse_topology(text)


def test_peak_follows_from_the_matrix_units():
    units = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2, "tpu7x": 8 * 256**2}
    for chip in TPUS.values():
        assert 2 * units[chip.name] * chip.clock == pytest.approx(chip.flops, rel=5e-3), chip.name


def mesh_of(shape, axes, torus, slices=1):
    """A stand-in for a mesh: devices with coordinates, in row-major order."""
    coords = [c for _ in range(slices) for c in np.ndindex(*torus)]
    inside = len(coords) // slices
    devices = np.empty(len(coords), object)
    for i, c in enumerate(coords):
        devices[i] = types.SimpleNamespace(coords=list(c) + [0] * (3 - len(c)), slice_index=i // inside)
    sizes = dict(zip(axes, shape, strict=True))
    return types.SimpleNamespace(devices=devices.reshape(shape), axis_names=axes, shape=sizes)


def test_a_gather_over_a_torus_uses_every_ring():
    topology = slices.parse_topology("v5e:16x16")
    mesh = mesh_of((16, 16), ("fsdp", "tensor"), (16, 16))
    whole = links.transfer("all-gather", 1e9, list(range(256)), mesh, topology)
    ring = links.transfer("all-gather", 1e9, list(range(16)), mesh, topology)
    assert (whole.axes, ring.axes) == (("fsdp", "tensor"), ("tensor",))
    assert whole.ici_seconds == pytest.approx(1e9 * 255 / 256 / (4 * V5E_LINK) + 16e-6)
    assert ring.ici_seconds == pytest.approx(1e9 * 15 / 16 / (2 * V5E_LINK) + 8e-6)
    both = links.transfer("all-reduce", 1e9, list(range(256)), mesh, topology)
    assert both.ici_seconds == pytest.approx(2 * whole.ici_seconds)


def test_without_a_ring_a_dimension_gives_half():
    topology = slices.parse_topology("v5e:4x4")
    mesh = mesh_of((16,), ("fsdp",), (4, 4))
    found = links.transfer("reduce-scatter", 1e9, list(range(16)), mesh, topology)
    assert found.ici_seconds == pytest.approx(1e9 * 15 / 16 / (2 * V5E_LINK) + 6e-6)


def test_across_slices_the_network_is_the_road():
    topology = slices.parse_topology("v5p:2x2x1", 2)
    mesh = mesh_of((2, 4), ("data", "fsdp"), (2, 2, 1), slices=2)
    found = links.transfer("all-reduce", 1e9, [0, 4], mesh, topology)
    assert (found.network, found.axes) == ("dcn", ("data",))
    assert found.dcn_seconds == pytest.approx(1e9 / 6.25e9)


def test_the_devices_of_a_chip_share_its_way_to_the_host():
    for name, devices in (("v6e:2x2", 1), ("tpu7x:2x2x1", 2)):
        found = links.host_transfer("to host", 1e9, slices.parse_topology(name))
        assert (found.network, found.seconds) == ("host", pytest.approx(devices * 1e9 / 32e9))


def test_strided_groups_share_links():
    topology = slices.parse_topology("v5e:4x4")
    mesh = mesh_of((8, 2), ("fsdp", "tensor"), (4, 4))
    apart = links.transfer("all-gather", 1e9, [0, 2], mesh, topology)
    assert apart.axes == ("part of", "fsdp")
    assert apart.ici_seconds == pytest.approx(0.5e9 / (V5E_LINK / 2) + 2e-6)


def test_an_exchange_is_bound_by_the_middle():
    topology = slices.parse_topology("v5e:16x16")
    mesh = mesh_of((256,), ("fsdp",), (16, 16))
    found = links.transfer("all-to-all", 1e8, list(range(256)), mesh, topology)
    assert found.ici_seconds == pytest.approx(
        128 * 1e8 / 2 / (2 * 16 * V5E_LINK) + 16e-6
    )  # 128 chips, half their bytes
