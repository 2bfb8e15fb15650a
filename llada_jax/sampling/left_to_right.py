"""Greedy text from left to right: the sampler of the autoregressive control.

B rows, L columns, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.data.tokenizer import Tokenizer

_GRAIN = 8  # columns; few widths, so few programs


def continue_text(model, tokenizer: Tokenizer, prompts: Sequence[str], max_new: int) -> list[str]:
    """Greedy continuations of `prompts` by a causal model, up to the end of text."""
    return continue_ids(model, tokenizer, [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts], max_new)


def continue_ids(model, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new: int) -> list[str]:
    """The same for token ids, [B] lists; the text ends at the first end of turn or of text."""
    canvas, real = right_pad([[*ids, *[tokenizer.mask_id] * max_new] for ids in prompts], tokenizer.pad_id)
    given = np.zeros(canvas.shape, bool)
    for i, ids in enumerate(prompts):
        given[i, : len(ids)] = True
    out = np.asarray(_continue(model, jnp.asarray(canvas), jnp.asarray(given), min(map(len, prompts))))
    texts = []
    for i, ids in enumerate(prompts):
        new = [int(t) for t in out[i, len(ids) : len(ids) + max_new]]
        stops = [new.index(stop) for stop in (tokenizer.eos_id, tokenizer.eot_id) if stop in new]
        texts.append(tokenizer.decode(new[: min(stops, default=len(new))]))
    return texts


def right_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as int32 [B, L], L a multiple of 8, and which of it is real, int32 [B, L]."""
    width = -(-max(map(len, rows)) // _GRAIN) * _GRAIN
    tokens, real = np.full((len(rows), width), pad_id, np.int32), np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], real[i, : len(row)] = row, 1
    return tokens, real


@jax.jit
def _continue(model, canvas_BL: jax.Array, given_BL: jax.Array, first: jax.Array) -> jax.Array:
    """The canvas with every column that is not given filled from column `first` on; MASK is never predicted."""

    def step(i, x_BL):
        logits_BLV = model(x_BL).at[..., model.config.mask_token_id].set(-jnp.inf)
        next_B = jnp.argmax(jax.lax.dynamic_index_in_dim(logits_BLV, i - 1, axis=1, keepdims=False), axis=-1)
        put_BL = (jnp.arange(x_BL.shape[1]) == i) & ~given_BL
        return jnp.where(put_BL, next_B[:, None].astype(x_BL.dtype), x_BL)

    return jax.lax.fori_loop(first, canvas_BL.shape[1], step, canvas_BL)
