"""Text from masks: completion and infilling, as one program or as a stream.

B rows, P prompt length, G generated length, S = P + G columns of the canvas, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from llada_jax import inputs
from llada_jax.fields import InputError
from llada_jax.inputs import require
from llada_jax.parallel.mesh import BATCH, current_mesh
from llada_jax.sampling import cache as passes
from llada_jax.sampling import denoise
from llada_jax.sampling.denoise import NEVER, Program, Settings, State
from llada_jax.sampling.options import Options, read_options


@dataclasses.dataclass(frozen=True)
class Stats:
    """How a canvas was filled.

    tokens: int32 [B, S]. step: int32 [B, S], the pass (from 0) that committed each token; -1: given, or filled up after
    an end of text. probability: float32 [B, S], that of each token when it was committed; 1 where it was given.
    full_passes, window_passes: how often the model ran over the whole canvas, and over a window of it.
    """

    tokens: np.ndarray | jax.Array
    step: np.ndarray | jax.Array
    probability: np.ndarray | jax.Array
    full_passes: int
    window_passes: int
    mask_id: int

    def trajectory(self, steps: int | None = None, mask_id: int | None = None) -> np.ndarray:
        """The canvas after every pass, int32 [steps, B, S]; by default of all passes."""
        tokens, step = np.asarray(self.tokens), np.asarray(self.step)
        steps = self.full_passes + self.window_passes if steps is None else steps
        mask_id = self.mask_id if mask_id is None else mask_id
        return np.stack([np.where(step <= i, tokens, mask_id) for i in range(steps)]) if steps else tokens[None][:0]

    @property
    def tokens_per_pass(self) -> float:
        """Committed tokens a row and pass."""
        count = int((np.asarray(self.step) >= 0).sum())
        return count / max(len(np.asarray(self.step)) * (self.full_passes + self.window_passes), 1)


def generate(
    model, prompt, attention_mask=None, *, gen_length: int = 128, return_stats: bool = False,
    return_trajectory: bool = False, **options,
) -> Any:  # fmt: skip
    """Appends gen_length masks to the prompt and fills every mask, in blocks from left to right.

    prompt: int [B, P], left-padded where attention_mask (bool or int [B, P]) is 0, or a list of B prompts of any
        lengths; masks in it are infilled with the first block.
    gen_length: tokens to append; with variable_length, at most.

    options (sampling/options.py has their ranges):
    steps: passes in all, for the quota rule; one token a step by default. Excludes threshold, factor, entropy_bound:
        commit all that are sure enough, at least one a pass; see rules.py.
    block_length: of semi-autoregressive blocks; gen_length by default.
    cache: what keys and values are kept. "none": every pass goes over the canvas. "prefix": those of the columns before
        the block, "dual": and after it, renewed when a block begins (Fast-dLLM, arXiv 2505.22618). "two_block": as
        dual, but a finished block is computed again together with the next one instead of the whole canvas. "exact":
        for models that attend block-causally in blocks of block_length, counted from the prompt's end.
    refresh_every: besides, renewed after so many passes. look_around: columns on both sides of the block that are
        computed with it in every pass.
    temperature; cfg_scale: classifier-free guidance, Eq. 16 of arXiv 2502.09992. remasking: "low_confidence", "margin",
        "entropy" or "random": what ranks the positions.
    variable_length: blocks are appended until one holds EOS (iLLaDA, arXiv 2606.25331); a row that has ended is
        filled up with EOS. stop_at_eos: the same on a canvas of full length.
    logits_eos_inf: EOS is never predicted. confidence_eos_eot_inf: EOS and EOT are committed last.
    mask_id, eos_id, eot_id: by default those of the model's config. key: of the noise, jax.random.key(0) by default.

    Returns tokens int32 [B, P + gen_length], P being the longest prompt; with return_stats (tokens, Stats); with
    return_trajectory (tokens, the canvas after every step [steps, B, S]). Raises InputError when lengths do not divide
    or do not fit, for numbers that no sampler can use, and when the model's logits are not finite.
    """
    job = _completion(model, prompt, attention_mask, gen_length, options)
    stats = job.run()
    if return_stats:
        return stats.tokens, stats
    if return_trajectory:
        return stats.tokens, _every_step(stats, gen_length, options.get("block_length"), options.get("steps"))
    return stats.tokens


def _every_step(stats: Stats, gen_length: int, block_length: int | None, steps: int | None) -> np.ndarray:
    """The canvas after every step [steps, B, S], also after those for which a block had no mask left; no pass was made
    for them."""
    states, step = stats.trajectory(), np.asarray(stats.step)
    if steps is None:
        return states
    block_length = block_length or gen_length
    begins = range(step.shape[1] - gen_length, step.shape[1], block_length)
    last = [
        step[:, : begin + block_length].max() for begin in begins
    ]  # pass of each block, masks of the prompt included
    slots = steps // len(begins)
    shown = [min(before + 1 + i, now) for before, now in zip([-1, *last], last, strict=False) for i in range(slots)]
    return states[shown]


def infill(model, canvas, attention_mask=None, **options) -> Stats:
    """Fills the masks of `canvas`, int [B, S], as one block or in blocks that are counted from its end.

    attention_mask: int [B, S], 0 for padding. options: those of `generate`.
    """
    return _infilling(model, canvas, attention_mask, options).run()


@dataclasses.dataclass(frozen=True)
class Update:
    """What a stream has come to: canvases as in Stats, and whether they are final."""

    tokens: np.ndarray
    step: np.ndarray
    probability: np.ndarray
    full_passes: int
    window_passes: int
    done: bool


def stream(
    model, prompt, attention_mask=None, *, every: str = "step", gen_length: int = 128, **options
) -> Iterator[Update]:
    """Yields an Update after every "step" or "block" of what `generate` with the same arguments does.

    The same program runs a part at a time; a caller that stops reading ends it. The last Update is what `generate`
    returns. For one process. gen_length=0 fills the masks of the prompt alone.
    """
    require(every in ("step", "block"), f"every {every!r} is not one of step, block")
    if gen_length == 0:
        return _infilling(model, prompt, attention_mask, options).stream(by_block=every == "block")
    return _completion(model, prompt, attention_mask, gen_length, options).stream(by_block=every == "block")


@dataclasses.dataclass
class _Job:
    """A canvas and how it is to be filled: checked, padded to the width of a program."""

    weights: passes.Weights
    canvas: np.ndarray  # int32 [B, S]
    visible: np.ndarray  # bool [B, S]
    program: Program
    settings: Settings
    length: int  # of the canvas without what it was padded with on the left

    def run(self) -> Stats:
        """On a mesh rows are filled up with copies to what its axes divide."""
        w, p, s = self.weights, self.program, self.settings
        mesh = current_mesh()
        if mesh is None:
            return self._stats(denoise.run(w, jnp.asarray(self.canvas), jnp.asarray(self.visible), p, s))
        rows, parts = len(self.canvas), mesh.shape["data"] * mesh.shape["fsdp"]
        filled = np.resize(np.arange(rows), -(-rows // parts) * parts)
        place = lambda x: jax.device_put(x[filled], P(BATCH, None))
        s = dataclasses.replace(s, rows=jnp.asarray(np.asarray(s.rows)[filled]))
        state = denoise.run(w, place(self.canvas), place(self.visible), p, s)
        whole = {
            name: jnp.asarray(multihost_utils.process_allgather(getattr(state, name), tiled=True))[:rows]
            for name in ("tokens", "step", "probability")
        }
        return self._stats(dataclasses.replace(state, **whole))

    def stream(self, by_block: bool) -> Iterator[Update]:
        w, p, s = self.weights, self.program, self.settings
        canvas, visible = jnp.asarray(self.canvas), jnp.asarray(self.visible)
        state = jax.jit(denoise.start_state, static_argnums=3)(w, canvas, visible, p, s)
        part = (jnp.int32(NEVER), jnp.int32(1)) if by_block else (jnp.int32(1), jnp.int32(NEVER))
        done = False
        while not done:
            state = denoise.run_on(w, state, p, s, *part)
            stats = self._stats(state)
            done = not bool(jnp.any(denoise.is_open(state, s)))
            yield Update(
                np.asarray(stats.tokens), np.asarray(stats.step), np.asarray(stats.probability),
                stats.full_passes, stats.window_passes, done,
            )  # fmt: skip

    def _stats(self, state: State) -> Stats:
        if bool(jnp.isnan(state.probability).any()):
            raise InputError("the model's logits are not finite: its weights are damaged or its training diverged")
        cut = lambda x: x[:, x.shape[1] - self.length :]
        return Stats(
            cut(state.tokens), cut(state.step), cut(state.probability), int(state.full_passes),
            int(state.window_passes), int(self.settings.mask_id),
        )  # fmt: skip


def _completion(model, prompt, attention_mask, gen_length, given: dict[str, Any], rows=None) -> _Job:
    c = model.config
    o, key = read_options(c, given)
    if _is_ragged(prompt):
        require(attention_mask is None, "attention_mask: a list of prompts of different lengths brings its own")
        ragged = [inputs.token_ids("prompt", row, c.embedding_size, "[tokens]").tolist() for row in prompt]
        prompt, attention_mask = inputs.left_pad(ragged, c.pad_token_id)
    prompt = inputs.token_ids("prompt", prompt, c.embedding_size, "[rows, tokens]")
    gen_length = inputs.whole("gen_length", gen_length)
    require(gen_length > 0, f"gen_length {gen_length} must be positive")
    block_length = o.block_length or gen_length
    require(gen_length % block_length == 0, f"gen_length {gen_length} is not a multiple of block_length {block_length}")
    blocks = gen_length // block_length
    steps = NEVER if o.steps is None else o.steps // blocks  # of a block; beyond its masks they are one token each
    if o.steps is not None and o.steps % blocks:
        raise InputError(f"steps {o.steps} is not a multiple of the number of blocks, {blocks}")
    canvas = np.pad(prompt, ((0, 0), (0, gen_length)), constant_values=o.mask_id)
    visible = np.pad(_visible(attention_mask, prompt), ((0, 0), (0, gen_length)), constant_values=True)
    return _job(
        model, canvas, visible, o, key, start=prompt.shape[1], block_length=block_length, steps=steps, rows=rows
    )


def _infilling(model, canvas, attention_mask, given: dict[str, Any], rows=None) -> _Job:
    c = model.config
    o, key = read_options(c, given)
    require(not o.variable_length, "variable_length: a text with masks to fill has its length")
    canvas = inputs.token_ids("text", canvas, c.embedding_size, "[rows, tokens]")
    S, masked_BS = canvas.shape[1], canvas == o.mask_id
    require(masked_BS.any(), "nothing to fill: the text holds no mask")
    block_length = o.block_length or S
    require(block_length <= S, f"block_length {block_length} is above {S}, the length of the text")
    first = int(np.argmax(masked_BS.any(axis=0)))
    blocks = min(-(-(S - first) // block_length), S // block_length)  # masks before them go with the first
    steps = NEVER if o.steps is None else max(o.steps // blocks, 1)
    start = S - blocks * block_length
    return _job(
        model, canvas, _visible(attention_mask, canvas), o, key, start=start, block_length=block_length, steps=steps,
        rows=rows,
    )  # fmt: skip


def _job(
    model, canvas: np.ndarray, visible: np.ndarray, o: Options, key, *, start: int, block_length: int, steps: int, rows
) -> _Job:
    """steps: of a block. rows: their numbers, by which noise is drawn. One block as wide as the canvas is widened with
    it."""
    c, S = model.config, canvas.shape[1]
    require(S <= c.max_sequence_length, f"{S} tokens exceed the model's context of {c.max_sequence_length} tokens")
    require(not c.causal, "the model is causal (config.model.causal); the diffusion sampler can't use it")
    mesh = current_mesh()
    context = 1 if mesh is None else mesh.shape["context"]
    require(o.cache == "none" or context == 1, f"cache {o.cache!r} needs config.mesh.context=1, it is {context}")
    width = _program_width(S, context)
    if block_length == S:
        start, block_length = S - width, width
    rule, limit = o.rule
    program = Program(
        block_length, o.cache, rule, o.remasking, guided=o.cfg_scale > 0, growing=o.variable_length,
        stops=o.variable_length or o.stop_at_eos, left=o.look_around,
        width=_program_width(S - start, 1) if o.cache == "prefix" else 0,
    )  # fmt: skip
    width = max(width, _program_width(program.widest, context))
    settings = Settings(
        start=jnp.int32(start + width - S), steps=jnp.int32(steps), refresh=jnp.int32(o.refresh_every or NEVER),
        limit=jnp.float32(limit), temperature=jnp.float32(o.temperature), cfg_scale=jnp.float32(o.cfg_scale),
        mask_id=jnp.int32(o.mask_id), eos_id=jnp.int32(o.eos_id),
        banned_id=jnp.int32(o.eos_id if o.logits_eos_inf else -1),
        last_ids=jnp.array((o.eos_id, o.eot_id) if o.confidence_eos_eot_inf else (-1, -1), jnp.int32), key=key,
        rows=jnp.arange(len(canvas)) if rows is None else jnp.asarray(rows, jnp.int32),
    )  # fmt: skip
    canvas = np.pad(canvas, ((0, 0), (width - S, 0)), constant_values=c.pad_token_id)
    visible = np.pad(visible, ((0, 0), (width - S, 0)), constant_values=False)
    return _Job(passes.prepare(model), canvas, visible, program, settings, S)


def _program_width(columns: int, context: int) -> int:
    """A canvas of so many columns is padded to this one: few widths, at most an eighth more, so few programs."""
    grains = ((256, 32), (512, 64), (1024, 128), (2048, 256), (4096, 512))
    grain = int(np.lcm(next((grain for limit, grain in grains if columns <= limit), 1024), context))
    return -(-columns // grain) * grain


def _is_ragged(prompt: Any) -> bool:
    """Whether it is a list of rows of token ids that are not all of one length."""
    if not isinstance(prompt, list | tuple) or not prompt:
        return False
    lengths = {len(row) for row in prompt if isinstance(row, Sequence | np.ndarray) and not isinstance(row, str)}
    return len(lengths) > 1


def _visible(attention_mask, prompt: np.ndarray) -> np.ndarray:
    """attention_mask as bool [B, P]."""
    if attention_mask is None:
        return np.ones(prompt.shape, bool)
    mask = inputs.zeros_and_ones("attention_mask", attention_mask)
    require(mask.shape == prompt.shape, f"attention_mask has shape {mask.shape}, the prompt {prompt.shape}")
    for row in np.flatnonzero(~mask.any(axis=1)):
        raise InputError(f"attention_mask hides all of row {row}; leave it a token, such as BOS")
    return mask
