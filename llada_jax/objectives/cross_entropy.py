"""Cross-entropy at scored positions only: the vocabulary matrix never meets a position without a loss.

B rows, L length, D model width, V vocabulary, N positions of one device, C positions of a chunk.

About half of the positions of a masked-diffusion batch carry no loss. They are sorted behind the scored ones, and a
loop with as many trips as there are scored chunks multiplies the rest by the vocabulary matrix; the gradient is formed
in the same trip, so no [B, L, V] array ever exists and the product is computed once, not again in the backward pass.
Over a mesh each device works on its own rows: the matrix is gathered once per call, and its gradient, accumulated
locally in float32, is reduced once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llada_jax.parallel.mesh import BATCH, HIDDEN, TOKENS, current_mesh, platform

_LOGITS_BYTES = 2**29  # of one chunk, float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def scored_cross_entropy(
    hidden_BLD: jax.Array, head_VD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Σ weight·CE (float32 scalar) and the cross-entropy of each position (float32 [B, L], nats; 0 where weight is 0).

    hidden and head share the compute dtype; logits, softmax and sums are float32. Only the first result is
    differentiable, with respect to hidden and head; the second is for metrics. `chunk`: positions per trip. The
    gradient of a head that is not differentiated is not formed.
    """
    loss, ce_BL, _, _ = _over_mesh((), hidden_BLD, head_VD, targets_BL, weights_BL, chunk)
    return loss, ce_BL


def _forward(hidden_BLD, head_VD, targets_BL, weights_BL, chunk):
    arrays = (hidden_BLD.value, head_VD.value, targets_BL.value, weights_BL.value)
    wanted = ("hidden", "head") if head_VD.perturbed else ("hidden",)
    loss, ce_BL, d_hidden, d_head = _over_mesh(wanted, *arrays, chunk)
    return (loss, ce_BL), (d_hidden, d_head.astype(arrays[1].dtype) if head_VD.perturbed else None)


def _backward(chunk, gradients, cotangents):
    g, _ = cotangents
    d_hidden, d_head = (None if d is None else g.astype(d.dtype) * d for d in gradients)
    return (d_hidden, d_head, None, None)


scored_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_mesh(gradients: tuple[str, ...], hidden_BLD, head_VD, targets_BL, weights_BL, chunk):
    mesh = current_mesh()
    # Collectives over an axis of one device move nothing, but a CPU would copy for them.
    axes = () if mesh is None else tuple(axis for axis, size in mesh.shape.items() if size > 1)
    local = functools.partial(_local, gradients=gradients, chunk=chunk, axes=axes)
    arrays = (hidden_BLD, head_VD, targets_BL, weights_BL)
    if mesh is None:
        return local(*arrays)
    head = P("tensor", "fsdp")
    outs = (P(), TOKENS, HIDDEN if gradients else P(), head if "head" in gradients else P())
    return jax.shard_map(local, in_specs=(HIDDEN, head, TOKENS, TOKENS), out_specs=outs, check_vma=False)(*arrays)


def _local(hidden_BLD, head_VD, targets_BL, weights_BL, *, gradients: tuple[str, ...], chunk: int | None, axes):
    """One device's rows against its part of the vocabulary. Sums over the mesh happen here, and nowhere else.

    axes: those of the mesh that have more than one device.
    """
    B, L, D = hidden_BLD.shape
    if "fsdp" in axes:
        head_VD = jax.lax.all_gather(head_VD, "fsdp", axis=1, tiled=True)
    C = chunk_size(B * L, len(head_VD)) if chunk is None else min(chunk, B * L)
    N = -(-B * L // C) * C
    U = _part_size(*head_VD.shape)

    def rows(x):  # flat, padded to whole chunks; the padding has weight 0
        flat = x.reshape(B * L, *x.shape[2:])
        return jnp.pad(flat, [(0, N - B * L)] + [(0, 0)] * (flat.ndim - 1))

    weights_N = rows(weights_BL)
    order_N = jnp.argsort(weights_N == 0, stable=True)  # scored positions first
    h_ND, t_N, w_N = rows(hidden_BLD)[order_N], rows(targets_BL)[order_N], weights_N[order_N]

    def trip(i, carry):
        loss, ce_N, dh_ND, dw_VD = carry
        h_CD, t_C, w_C = (jax.lax.dynamic_slice_in_dim(x, i * C, C) for x in (h_ND, t_N, w_N))
        ce_C, logit_gradient = _chunk(h_CD, head_VD, t_C, "tensor" in axes)
        ce_N = jax.lax.dynamic_update_slice_in_dim(ce_N, jnp.where(w_C == 0, 0.0, ce_C), i * C, 0)
        if gradients:

            def part(j, carry):
                dh_CD, dw_VD = carry
                g_CU = logit_gradient(w_C, j * U, U)
                dh_CD += jax.lax.dot(g_CU, rows_of(head_VD, j), preferred_element_type=jnp.float32)
                if "head" not in gradients:
                    return dh_CD, dw_VD
                dw_UD = jax.lax.dot_general(g_CU, h_CD, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
                return dh_CD, jax.lax.dynamic_update_slice_in_dim(dw_VD, rows_of(dw_VD, j) + dw_UD, j * U, 0)

            rows_of = lambda x_VD, j: jax.lax.dynamic_slice_in_dim(x_VD, j * U, U)  # noqa: E731
            dh_CD, dw_VD = jax.lax.fori_loop(0, len(head_VD) // U, part, (jnp.zeros(h_CD.shape), dw_VD))
            dh_CD = _psum(dh_CD, axes, ("tensor",))
            dh_ND = jax.lax.dynamic_update_slice_in_dim(dh_ND, dh_CD.astype(dh_ND.dtype), i * C, 0)
        return loss + jnp.sum(jnp.where(w_C == 0, 0.0, w_C * ce_C)), ce_N, dh_ND, dw_VD

    zero = jnp.zeros((), jnp.float32)
    dh_ND = jnp.zeros_like(h_ND) if gradients else zero
    dw_VD = jnp.zeros(head_VD.shape) if "head" in gradients else zero
    trips = (jnp.sum(weights_N != 0) + C - 1) // C
    loss, ce_N, dh_ND, dw_VD = jax.lax.fori_loop(0, trips, trip, (zero, jnp.zeros(N), dh_ND, dw_VD))

    def unsorted(x_N):
        return jnp.zeros_like(x_N).at[order_N].set(x_N)[: B * L].reshape(B, L, *x_N.shape[1:])

    loss = _psum(loss, axes, (*BATCH, "context"))
    if gradients:
        dh_ND = unsorted(dh_ND)
    if "head" in gradients:
        if "fsdp" in axes:
            dw_VD = jax.lax.psum_scatter(dw_VD, "fsdp", scatter_dimension=1, tiled=True)
        dw_VD = _psum(dw_VD, axes, ("data", "context"))
    return loss, unsorted(ce_N), dh_ND, dw_VD


def _psum(x, present, axes):
    """The sum over those of the axes that are present."""
    axes = tuple(axis for axis in axes if axis in present)
    return jax.lax.psum(x, axes) if axes else x


def _chunk(h_CD, head_VD, targets_C, split: bool):
    """Cross-entropy of one chunk, and the function that gives its gradient in the logits for given weights.

    With a vocabulary split over `tensor`, maximum, sum and target logit are combined over that axis.
    """

    def combine(x, reduce):
        return reduce(x, "tensor") if split else x

    logits_CV = jax.lax.dot_general(h_CD, head_VD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    first = jax.lax.axis_index("tensor") * len(head_VD) if split else 0
    is_target_CV = jnp.arange(len(head_VD)) + first == targets_C[:, None]
    top_C = combine(jnp.max(logits_CV, axis=1), jax.lax.pmax)
    exp_CV = jnp.exp(logits_CV - top_C[:, None])
    total_C = combine(jnp.sum(exp_CV, axis=1), jax.lax.psum)
    target_C = combine(jnp.sum(jnp.where(is_target_CV, logits_CV, 0.0), axis=1), jax.lax.psum)

    def logit_gradient(weights_C, start, size):
        exp_CU, is_target_CU = (jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in (exp_CV, is_target_CV))
        softmax_CU = exp_CU * (weights_C / total_C)[:, None]
        return (softmax_CU - jnp.where(is_target_CU, weights_C[:, None], 0.0)).astype(h_CD.dtype)

    return jnp.log(total_C) + top_C - target_C, logit_gradient


def chunk_size(positions: int, rows: int) -> int:
    """A chunk's logits stay under `_LOGITS_BYTES`; and there are at least eight, so that skipping has a grain.

    Large ones are multiples of 128: matrix units take rows by that. Every trip reads and writes the gradient of the
    whole vocabulary matrix, 4.1 GB for 8B: with 530 rows, not 1024, a v5p spent 30% of its time there.
    """
    fits = max(_LOGITS_BYTES // (4 * rows), 8)
    size = max(min(fits, -(-positions // 8)), 1)
    return size - size % 128 if size > 128 else size


def _part_size(rows: int, width: int) -> int:
    """Rows of the vocabulary whose gradient is added up at once. On a CPU, which multiplies into memory of its own
    before it adds, so few that this stays in its cache; elsewhere all."""
    if platform() != "cpu":
        return rows
    parts = next(n for n in range(-(-4 * rows * width // 2**24), 0, -1) if rows % n == 0)
    return rows // parts
