"""What each chip can do and how programs are compiled for it: peaks, memory, links, compiler options.

Sources: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} and NVIDIA's data sheets for peaks and memory;
jax-ml.github.io/scaling-book for one-way speeds of links and of the way to the host; the compiler's own messages for
the memory that programs can use. Shares of the links' peak that were measured: 95% on v5e (scaling-book, sharding); 65%
on v6e-256 (a sum of 0.6 GB at 236 of 360 GB/s) and 89% on 7x (a gather at 179 of 200 GB/s), both in microbenchmarks/ of
AI-Hypercomputer/tpu-recipes, c8cfe2f6. None is known of v4 and v5p: 90% is assumed there.
"""

import dataclasses

import jax
import jax.numpy as jnp

GIB = 2**30

Options = dict[str, bool | int | str]

_WINDOWED_EINSUM_OFF: Options = {
    # XLA turns gathered FSDP matrix products into loops of collective-permutes; whole gathers overlap better.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
}
SUMS_BESIDE_PRODUCTS: Options = {
    # Gradients are summed over the devices while the next product is computed, and each by itself: a sum of several
    # arrays runs alone. On v5e-256 a step takes 9.1 instead of 9.8 s. For other chips the compiler refuses the second
    # option ("not supported/recommended on platforms other than TPU v5e", libtpu 0.0.52).
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    "xla_jf_crs_combiner_threshold_in_bytes": 2**20,
}
_SPARSE_CORE_REDUCTIONS_OFF: Options = {
    # Sums on the sparse cores gave other losses on v6e and 7x (axlearn's notes, JAX 0.6 to 0.8).
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": False,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": False,
}
_GATHERS_ON_SPARSE_CORES: Options = {
    # The cores that gather are idle otherwise, and products go on meanwhile: over half of the time of gathering a
    # layer is hidden (v5p 4x4x4, v6e 16x16); on the TensorCore it would wait. Nothing is summed there.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,  # the other way to do it; they exclude each other
}


def _vmem(mib: int) -> Options:
    """VMEM that one fusion may use, 16 MiB by default: with more, large products are cut into larger parts.

    Estimated cycles of the 8B's MLP, forward and backward: 12% fewer on v5e and v5p with 32 (13% with 48 or 64, for
    which the v5p's compiler takes three times as long); on v6e, 5 rows of 4096, 21% fewer with 96 than with 48, which
    leaves them 10% above the peak's time; on 7x 24% fewer with 60. The whole step of the 8B on 64 v5p: 13.3 s instead
    of 17.4.
    """
    return {"xla_tpu_scoped_vmem_limit_kib": mib * 1024}


_NVIDIA: Options = {
    "xla_gpu_enable_latency_hiding_scheduler": True,  # gathers of the next layer run during this one
    "xla_gpu_enable_while_loop_double_buffering": True,  # the same, across trips of the scan over layers
    "xla_gpu_enable_triton_gemm": False,  # cuBLAS is faster for large matrices (NVIDIA's JAX-Toolbox)
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. Speeds are of a whole chip, in units without prefix: FLOP/s, bytes/s, Hz, bytes."""

    name: str
    kind: str  # how `device.device_kind` begins
    flops: float  # peak of dense bfloat16 with float32 accumulation
    options: Options  # of XLA; they travel with the executable (`compiler_options=`)
    devices: int = 1  # JAX devices of a chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu(Chip):
    """What tools/ahead/ needs to know of a chip that is not there."""

    clock: float  # of the TensorCore: turns the compiler's estimated cycles into seconds
    memory: float  # HBM that a program can use, of one device (the compiler's "available HBM")
    memory_bandwidth: float
    link: float  # one ICI link, one way, peak
    link_share: float  # of that, what large collectives reach
    host: float  # between a chip and its host, one way
    dimensions: int  # of the torus
    network: float  # data-center network (DCN), one way
    attention: float  # assumed share of peak that the splash kernel reaches; see tools/ahead/estimate.py
    counts_cores: bool = False  # the number in a name such as v5p-128 counts TensorCores, two a chip
    max_chips: int = 256


_V5E = {**_vmem(32), **_WINDOWED_EINSUM_OFF, **SUMS_BESIDE_PRODUCTS}
_V6E = {**_vmem(96), **_WINDOWED_EINSUM_OFF, **_GATHERS_ON_SPARSE_CORES, **_SPARSE_CORE_REDUCTIONS_OFF}
_V5P = {**_vmem(32), **_WINDOWED_EINSUM_OFF, **_GATHERS_ON_SPARSE_CORES, **_SPARSE_CORE_REDUCTIONS_OFF}
_7X = {**_vmem(60), **_WINDOWED_EINSUM_OFF, **_SPARSE_CORE_REDUCTIONS_OFF}

TPUS = {
    chip.name: chip
    for chip in (
        Tpu("v4", "TPU v4", 275e12, _WINDOWED_EINSUM_OFF, clock=1.05e9, memory=30.75 * GIB, memory_bandwidth=1.23e12,
            link=45e9, link_share=0.9, host=16e9, dimensions=3, network=6.25e9, attention=0.55, counts_cores=True,
            max_chips=4096),
        Tpu("v5e", "TPU v5 lite", 197e12, _V5E, clock=1.5e9, memory=15.75 * GIB, memory_bandwidth=0.82e12, link=45e9,
            link_share=0.95, host=16e9, dimensions=2, network=3.125e9, attention=0.55),
        Tpu("v5p", "TPU v5", 459e12, _V5P, clock=1.75e9, memory=95.73 * GIB, memory_bandwidth=2.765e12, link=90e9,
            link_share=0.9, host=16e9, dimensions=3, network=6.25e9, attention=0.55, counts_cores=True, max_chips=6144),
        Tpu("v6e", "TPU v6 lite", 918e12, _V6E, clock=1.75e9, memory=31.24 * GIB, memory_bandwidth=1.64e12, link=90e9,
            link_share=0.65, host=32e9, dimensions=2, network=12.5e9, attention=0.35),
        # The clock follows from the peak, as it does for the others: four 256 x 256 units a core. The speed to the host
        # is not published: that of v6e.
        Tpu("tpu7x", "TPU7x", 2307e12, _7X, devices=2, clock=2.2e9, memory=94.74 * GIB, memory_bandwidth=7.38e12,
            link=100e9, link_share=0.89, host=32e9, dimensions=3, network=12.5e9, attention=0.35, counts_cores=True,
            max_chips=9216),
    )
}  # fmt: skip
_GPUS = (
    Chip("a100", "NVIDIA A100", 312e12, _NVIDIA),
    Chip("h100", "NVIDIA H100", 989e12, _NVIDIA),
    Chip("h200", "NVIDIA H200", 989e12, _NVIDIA),
)
_CPU: Options = {
    # XLA's default lets more run at once and keeps more for it: on 2 cores 0.25 GB more for a step of 34M parameters,
    # and 1 GB more to draw 136M, at the same speed.
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}
_OTHERS = (("TPU", _WINDOWED_EINSUM_OFF), ("NVIDIA", _NVIDIA), ("cpu", _CPU))  # options of chips that no line describes


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device (`device.device_kind`); None for one that is not in the table, such as a CPU."""
    found = [chip for chip in (*TPUS.values(), *_GPUS) if device_kind.startswith(chip.kind)]
    return max(found, key=lambda chip: len(chip.kind), default=None)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device; None where it is not known."""
    chip = chip_of(device_kind)
    return chip and chip.flops / chip.devices


def compiler_options_for(device_kind: str) -> Options:
    """XLA's options for a chip; none for one that is not known."""
    if chip := chip_of(device_kind):
        return dict(chip.options)
    return next((dict(options) for kind, options in _OTHERS if device_kind.startswith(kind)), {})


def of_mesh(mesh: jax.sharding.Mesh) -> tuple[Options, list[str]]:
    """(options for the chips of `mesh` that the installed compiler knows, one line for each that it doesn't).

    The devices may be those of a topology that is only compiled for. Trivial programs are compiled to find out.
    """
    options = compiler_options_for(mesh.devices.flat[0].device_kind)
    if _refusal(options, mesh) is None:
        return options, []
    refusals = {name: _refusal({name: value}, mesh) for name, value in options.items()}
    known = {name: value for name, value in options.items() if refusals[name] is None}
    return known, [f"compiler option {name} is left out: {line}" for name, line in refusals.items() if line]


def _refusal(options: Options, mesh: jax.sharding.Mesh) -> str | None:
    if not options:
        return None
    try:
        with jax.set_mesh(mesh):
            jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0]
    return None
