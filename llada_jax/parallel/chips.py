"""Compiler options of each chip, with the reason for each; they travel with the executable (`compiler_options=`)."""

import jax
import jax.numpy as jnp

Options = dict[str, bool | int]

_WINDOWED_EINSUM_OFF: Options = {
    # XLA turns gathered FSDP matrix products into loops of collective-permutes; whole gathers overlap better.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
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


# By the beginning of `device_kind`; the first that fits.
_TABLE: list[tuple[str, Options]] = [
    ("TPU v5 lite", {**_vmem(32), **_WINDOWED_EINSUM_OFF}),
    ("TPU v6 lite", {**_vmem(96), **_WINDOWED_EINSUM_OFF, **_GATHERS_ON_SPARSE_CORES, **_SPARSE_CORE_REDUCTIONS_OFF}),
    ("TPU v5", {**_vmem(32), **_WINDOWED_EINSUM_OFF, **_GATHERS_ON_SPARSE_CORES, **_SPARSE_CORE_REDUCTIONS_OFF}),
    ("TPU7x", {**_vmem(60), **_WINDOWED_EINSUM_OFF, **_SPARSE_CORE_REDUCTIONS_OFF}),
    ("TPU", _WINDOWED_EINSUM_OFF),
    (
        "NVIDIA",
        {
            "xla_gpu_enable_latency_hiding_scheduler": True,  # gathers of the next layer run during this one
            "xla_gpu_enable_while_loop_double_buffering": True,  # the same, across trips of the scan over layers
            "xla_gpu_enable_triton_gemm": False,  # cuBLAS is faster for large matrices (NVIDIA's JAX-Toolbox)
        },
    ),
]


def compiler_options_for(device_kind: str) -> Options:
    """What the table holds for a chip (`device.device_kind`); nothing for one that it doesn't know."""
    return next((dict(options) for kind, options in _TABLE if device_kind.startswith(kind)), {})


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
