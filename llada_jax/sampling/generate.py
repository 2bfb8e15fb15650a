"""The reverse process as one compiled program (Algorithm 4 and 5 of arXiv 2502.09992).

B rows, P prompt length, G generated length, S = P + G columns of the canvas, W columns of a block, V vocabulary.

Blocks run from left to right; in each, steps // blocks forward passes commit the positions of which the model is
surest. What was committed when, and with which probability, comes back in two [B, S] arrays, from which every
intermediate state can be replayed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from llada_jax import inputs
from llada_jax.fields import InputError
from llada_jax.inputs import require
from llada_jax.parallel.mesh import BATCH, current_mesh, gather_fsdp, reshard, spec
from llada_jax.sampling import rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sampled:
    """tokens int32 [B, S]; step int32 [B, S] at which each was committed (-1: given); probability float32 [B, S]."""

    tokens: jax.Array
    step: jax.Array
    probability: jax.Array

    def trajectory(self, steps: int, mask_id: int) -> np.ndarray:
        """The canvas after every step, int32 [steps, B, S]."""
        tokens, step = np.asarray(self.tokens), np.asarray(self.step)
        return np.stack([np.where(step <= i, tokens, mask_id) for i in range(steps)])


def generate(
    model, prompt, attention_mask=None, *, gen_length: int = 128, steps: int = 128, block_length: int = 128,
    return_trajectory: bool = False, **options,
):  # fmt: skip
    """Token ids int32 [B, P + gen_length]; with `return_trajectory` also the canvas after every step [steps, B, S].

    The arguments are those of `sample`.
    """
    lengths = dict(gen_length=gen_length, steps=steps, block_length=block_length)
    sampled = sample(model, prompt, attention_mask, **lengths, **options)
    if not return_trajectory:
        return sampled.tokens
    mask_id = options.get("mask_id")
    return sampled.tokens, sampled.trajectory(steps, model.config.mask_token_id if mask_id is None else mask_id)


def sample(
    model, prompt, attention_mask=None, *, gen_length: int = 128, steps: int = 128, block_length: int = 128,
    temperature: float = 0.0, cfg_scale: float = 0.0, remasking: str = "low_confidence", logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False, mask_id: int | None = None, eos_id: int | None = None,
    eot_id: int | None = None, key: jax.Array | None = None,
) -> Sampled:  # fmt: skip
    """Appends gen_length masks to the prompt and fills every mask, in blocks from left to right.

    prompt: int32 [B, P], left-padded where attention_mask (bool or int [B, P]) is 0; masks in it are infilled with the
    first block. remasking: "low_confidence" or "random". cfg_scale: classifier-free guidance, Eq. 16 of the paper.
    The ids default to those of the model's config. Raises InputError when lengths do not divide or do not fit.
    """
    c, ids = model.config, _ids(model.config, mask_id, eos_id, eot_id)
    prompt = inputs.token_ids("prompt", prompt, c.embedding_size, "[rows, tokens]")
    B, P = prompt.shape
    gen_length, steps, block_length = _lengths(c, P, gen_length, steps, block_length)
    temperature, cfg_scale = _scales(temperature, cfg_scale)
    require(remasking in ("low_confidence", "random"), f"remasking {remasking!r} is not one of low_confidence, random")
    canvas = np.concatenate([prompt, np.full((B, gen_length), ids[0], np.int32)], axis=1)
    visible = _visible(attention_mask, prompt)
    if visible is not None:
        visible = np.pad(visible, ((0, 0), (0, gen_length)), constant_values=1)
    options = Options(
        P, block_length, steps, temperature, cfg_scale, remasking, logits_eos_inf, confidence_eos_eot_inf, *ids
    )
    return _reverse_rows(model, canvas, visible, inputs.random_key(key), options)


@dataclasses.dataclass(frozen=True)
class Options:
    """The static half of a sampling program."""

    start: int  # first column of the first block
    block_length: int
    steps: int
    temperature: float
    cfg_scale: float
    remasking: str
    logits_eos_inf: bool
    confidence_eos_eot_inf: bool
    mask_id: int
    eos_id: int
    eot_id: int


@functools.partial(jax.jit, static_argnames="options")
def denoise(
    model, canvas_BS: jax.Array, visible_BS: jax.Array | None, key: jax.Array, options: Options,
    draws: tuple[jax.Array | None, jax.Array | None] = (None, None),
) -> Sampled:  # fmt: skip
    """Fills every mask of the canvas; `visible` int32 [B, S] hides keys where it is 0.

    The vocabulary is read in windows as wide as a block: the block itself and, while the prompt still holds masks,
    those before it. So memory does not grow with the prompt, and a prompt with masks needs no program of its own.

    draws: Gumbel noise [steps, B, S, V] and the confidences of random remasking [steps, B, S], each to take instead of
    drawing it from the key, so that other code can be followed draw by draw.
    """
    o = options
    B, S = canvas_BS.shape
    W = o.block_length
    blocks = (S - o.start) // W
    steps = o.steps // blocks
    given_BS = canvas_BS != o.mask_id
    columns_S = jnp.arange(S)
    noise_TBSV, order_TBS = draws

    def hidden(x_BS):
        """[B, S, D]; with guidance [2B, S, D], the second half without the prompt."""
        rows, visible = x_BS, visible_BS
        if o.cfg_scale > 0:
            rows = jnp.concatenate([x_BS, jnp.where(given_BS, o.mask_id, x_BS)])
            visible = None if visible_BS is None else jnp.concatenate([visible_BS, visible_BS])
        return reshard(model.hidden(rows, visible), BATCH, None, None)

    def logits(hidden_BSD, first):
        """[B, W, V] float32 at the window that starts at column `first`."""
        hidden_BWD = jax.lax.dynamic_slice_in_dim(hidden_BSD, first, W, axis=1)
        head = gather_fsdp(model.head, hidden_BWD.dtype)
        out = jnp.einsum("BWD,VD->BWV", hidden_BWD, head, preferred_element_type=jnp.float32, out_sharding=spec(BATCH))
        if o.cfg_scale > 0:
            conditional, unconditional = jnp.split(out, 2)
            out = unconditional + (o.cfg_scale + 1) * (conditional - unconditional)
        return rules._without(out, (o.eos_id,)) if o.logits_eos_inf else out

    def block(b, state):
        begin, end = o.start + b * W, o.start + (b + 1) * W
        open_BS = (state[0] == o.mask_id) & (columns_S < end)
        masks_B = jnp.sum(open_BS, axis=1)
        windows = 1 + (jnp.maximum(begin - jnp.argmax(jnp.any(open_BS, axis=0)), 0) + W - 1) // W

        def step(carry):
            i, (x_BS, step_BS, probability_BS) = carry
            t = b * steps + i
            noise_key, order_key = jax.random.split(jax.random.fold_in(key, t))
            hidden_BSD = hidden(x_BS)

            def look(window, found):
                """Puts the predictions of one window, counted backwards from the block, into `found`."""
                first = jnp.maximum(begin - window * W, 0)
                from_end_W = S - 1 - first - jnp.arange(W)  # by what draws are keyed: the same for any left padding
                noise_BWV = (
                    None if noise_TBSV is None else jax.lax.dynamic_slice_in_dim(noise_TBSV[t], first, W, axis=1)
                )
                out_BWV = logits(hidden_BSD, first)
                chosen_BW = rules.sample_tokens(noise_key, out_BWV, o.temperature, o.mask_id, from_end_W, noise_BWV)
                last = (o.eos_id, o.eot_id) if o.confidence_eos_eot_inf else ()
                predicted = chosen_BW, rules.confidence(out_BWV, chosen_BW, last)
                return tuple(
                    jax.lax.dynamic_update_slice_in_dim(all_BS, new_BW, first, axis=1)
                    for all_BS, new_BW in zip(found, predicted, strict=True)
                )

            nothing = jnp.zeros_like(x_BS), jnp.zeros_like(probability_BS)
            chosen_BS, log_odds_BS = jax.lax.fori_loop(0, windows, look, nothing)
            score_BS = log_odds_BS
            if o.remasking == "random":
                score_BS = rules.random_score(order_key, B, S - 1 - columns_S) if order_TBS is None else order_TBS[t]
            open_BS = (x_BS == o.mask_id) & (columns_S < end)
            commit_BS = rules.commit_top_k(score_BS, open_BS, rules.tokens_per_step(masks_B, steps, i))
            found = chosen_BS, t, jax.nn.sigmoid(log_odds_BS)
            old = x_BS, step_BS, probability_BS
            return i + 1, tuple(jnp.where(commit_BS, new, was) for new, was in zip(found, old, strict=True))

        def unfinished(carry):
            i, (x_BS, _, _) = carry
            return (i < steps) & jnp.any((x_BS == o.mask_id) & (columns_S < end))

        return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]

    state = canvas_BS, jnp.where(given_BS, -1, -1), jnp.where(given_BS, 1.0, 1.0)  # sharded as the canvas is
    return Sampled(*jax.lax.fori_loop(0, blocks, block, state))


def infill(
    model, canvas, attention_mask=None, *, steps: int | None = None, temperature: float = 0.0, key=None
) -> Sampled:
    """Fills the masks of `canvas` (int32 [B, S]) as one block; by default one token a step in the row with most masks.

    attention_mask: int [B, S], 0 for padding.
    """
    c = model.config
    canvas = inputs.token_ids("text", canvas, c.embedding_size, "[rows, tokens]")
    S = canvas.shape[1]
    require(S <= c.max_sequence_length, f"{S} tokens exceed the model's context of {c.max_sequence_length} tokens")
    masks = (canvas == c.mask_token_id).sum(axis=1)
    require(masks.max() > 0, "nothing to fill: the text holds no mask")
    steps = int(masks.max()) if steps is None else inputs.whole("steps", steps)
    require(steps > 0, "steps must be positive")
    temperature, _ = _scales(temperature, 0.0)
    options = Options(
        0, S, steps, temperature, 0.0, "low_confidence", False, False, *_ids(c, None, None, None)
    )  # fmt: skip
    return _reverse_rows(model, canvas, _visible(attention_mask, canvas), inputs.random_key(key), options)


def _reverse_rows(model, canvas: np.ndarray, visible: np.ndarray | None, key, options: Options) -> Sampled:
    """`denoise` for any number of rows: on a mesh they are filled up with copies to what its axes divide."""
    mesh = current_mesh()
    if mesh is None:
        return denoise(model, jnp.asarray(canvas), None if visible is None else jnp.asarray(visible), key, options)
    if canvas.shape[1] % mesh.shape["context"]:
        raise InputError(
            f"{canvas.shape[1]} tokens do not split over {mesh.shape['context']} devices of config.mesh.context"
        )
    rows = len(canvas)
    filled = np.resize(np.arange(rows), -(-rows // _rows_divisor(mesh)) * _rows_divisor(mesh))
    place = lambda x: None if x is None else jax.device_put(x[filled], P(BATCH, None))  # noqa: E731
    sampled = denoise(model, place(canvas), place(visible), key, options)
    return jax.tree.map(lambda x: jnp.asarray(multihost_utils.process_allgather(x, tiled=True))[:rows], sampled)


def _rows_divisor(mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _ids(c, mask_id, eos_id, eot_id) -> tuple[int, int, int]:
    """The special tokens: those given, else those of the model's config."""

    def one(name: str, given: int | None, default: int) -> int:
        if given is None:
            return default
        inputs.token_id(name, given, c.embedding_size)
        return int(given)

    return (
        one("mask_id", mask_id, c.mask_token_id),
        one("eos_id", eos_id, c.eos_token_id),
        one("eot_id", eot_id, c.eot_token_id),
    )


def _visible(attention_mask, prompt: np.ndarray) -> np.ndarray | None:
    """attention_mask as int32 [B, P]; None where it hides nothing."""
    if attention_mask is None:
        return None
    mask = inputs.zeros_and_ones("attention_mask", attention_mask)
    require(mask.shape == prompt.shape, f"attention_mask has shape {mask.shape}, the prompt {prompt.shape}")
    for row in np.flatnonzero(~mask.any(axis=1)):
        raise InputError(f"attention_mask hides all of row {row}; leave it a token, such as BOS")
    return None if mask.all() else mask.astype(np.int32)


def _lengths(c, P: int, *lengths) -> tuple[int, ...]:
    gen_length, steps, block_length = lengths = tuple(
        inputs.whole(name, n) for name, n in zip(("gen_length", "steps", "block_length"), lengths, strict=True)
    )
    require(min(lengths) > 0, "gen_length, steps and block_length must be positive")
    require(gen_length % block_length == 0, f"gen_length {gen_length} is not a multiple of block_length {block_length}")
    blocks = gen_length // block_length
    require(steps % blocks == 0, f"steps {steps} is not a multiple of the number of blocks, {blocks}")
    require(
        P + gen_length <= c.max_sequence_length,
        f"prompt ({P}) and gen_length ({gen_length}) exceed the model's context of {c.max_sequence_length} tokens",
    )
    return lengths


def _scales(temperature, cfg_scale) -> tuple[float, float]:
    return inputs.not_negative("temperature", temperature), inputs.not_negative("cfg_scale", cfg_scale)
