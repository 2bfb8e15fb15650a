"""The reverse process as one compiled program (Algorithms 4 and 5 of arXiv 2502.09992; caches after arXiv 2505.22618).

B rows, S columns of the canvas, W columns of a block, X columns of a window around it, V vocabulary.

Blocks run from left to right; in each, every pass commits the positions that a rule of rules.py chooses. What was
committed in which pass, and with which probability, comes back in two [B, S] arrays, from which every intermediate
state can be replayed. Shapes alone make another program: where the blocks begin, how many steps, temperature, guidance
and thresholds are arguments of it, and canvases are padded on the left to a few widths.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llada_jax.model.masks import Mask
from llada_jax.parallel.mesh import BATCH, reshard
from llada_jax.sampling import cache, rules

CACHES = ("none", "prefix", "dual", "two_block", "exact")
NEVER = 2**30  # passes


@dataclasses.dataclass(frozen=True)
class Program:
    """What makes a program besides its shapes."""

    block_length: int
    cache: str = "none"
    rule: str = "quota"
    remasking: str = "low_confidence"
    guided: bool = False  # rows are doubled: with and without the prompt
    growing: bool = False  # columns right of the block are not there yet
    stops: bool = False  # a row ends with the block that holds an end of text
    left: int = 0  # columns of the window before the block
    width: int = 0  # of the window; 0: the block and `left` on both sides

    @property
    def window(self) -> int:
        return self.width or self.block_length + 2 * self.left

    @property
    def widest(self) -> int:
        """Of its windows: no canvas is narrower."""
        two = 2 * self.block_length + self.left
        return max(self.window, two) if self.cache in ("two_block", "exact") else self.window


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Settings:
    """The numbers that a program takes: int32, float32 and key scalars."""

    start: jax.Array  # first column of the first block
    steps: jax.Array  # of a block; for the rule "quota"
    refresh: jax.Array  # passes from one over the whole canvas to the next, at most
    limit: jax.Array  # of the rule: threshold, factor or bound
    temperature: jax.Array
    cfg_scale: jax.Array
    mask_id: jax.Array
    eos_id: jax.Array
    banned_id: jax.Array  # never predicted; -1: none
    last_ids: jax.Array  # [2]; committed when nothing else is left; -1: none
    key: jax.Array  # of the noise
    rows: jax.Array  # [B]; numbers of the rows, from which their noise is drawn


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """A canvas on its way, and what the next pass needs; a stream continues from it."""

    tokens: jax.Array  # int32 [B, S]
    step: jax.Array  # int32 [B, S]; the pass that committed each, -1: given
    probability: jax.Array  # float32 [B, S]; of what was committed, 1: given
    given: jax.Array  # bool [B, S]
    visible: jax.Array  # bool [B, S]; False: padding
    block: jax.Array  # int32 []; that is worked on, -1 before the first
    done_steps: jax.Array  # int32 []; passes in this block
    masks: jax.Array  # int32 [B]; open positions when the block began
    fresh: jax.Array  # int32 []; passes since the last one over the whole canvas
    full_passes: jax.Array  # int32 []
    window_passes: jax.Array  # int32 []
    keys: cache.Keys | None  # of every column, and with guidance of the rows without prompt


def start_state(w: cache.Weights, canvas_BS: jax.Array, visible_BS: jax.Array, p: Program, s: Settings) -> State:
    """The state before the first pass."""
    given_BS = canvas_BS != s.mask_id
    zero = jnp.int32(0)
    never_BS, sure_BS = (jnp.where(given_BS, x, x) for x in (jnp.int32(-1), jnp.float32(1)))  # split as the canvas is
    return State(
        canvas_BS, never_BS, sure_BS, given_BS, visible_BS, zero - 1, zero,
        jnp.sum(given_BS, axis=1, dtype=jnp.int32) * 0, jnp.int32(NEVER), zero, zero, _no_keys(w, canvas_BS, p),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="p")
def run(w: cache.Weights, canvas_BS, visible_BS, p: Program, s: Settings, draws=(None, None)) -> State:
    """Every pass, from the first to the last, in one program.

    draws: Gumbel noise [passes, B, S, V] and the confidences of random remasking [passes, B, S], each to take instead
    of drawing it from the key, so that other code can be followed draw by draw.
    """
    state = start_state(w, canvas_BS, visible_BS, p, s)
    return advance(w, state, p, s, jnp.int32(NEVER), jnp.int32(NEVER), draws)


@functools.partial(jax.jit, static_argnames="p", donate_argnames="state")
def run_on(w: cache.Weights, state: State, p: Program, s: Settings, passes: jax.Array, blocks: jax.Array) -> State:
    """At most so many passes and blocks more; the state is given up, so that keys and values stay where they are."""
    return advance(w, state, p, s, passes, blocks)


def is_open(state: State, s: Settings) -> jax.Array:
    """What is still masked, bool [B, S]."""
    return (state.tokens == s.mask_id) & state.visible


def advance(
    w: cache.Weights, state: State, p: Program, s: Settings, passes: jax.Array, blocks: jax.Array, draws=(None, None)
) -> State:
    """The state after at most so many passes and blocks more, fewer where no mask is left."""
    last_pass = state.full_passes + state.window_passes + passes
    last_block = _first_block(state, p, s) + blocks

    def more(state: State) -> jax.Array:
        goes_on = state.full_passes + state.window_passes < last_pass
        return jnp.any(is_open(state, s)) & goes_on & (_first_block(state, p, s) < last_block)

    def round_of_passes(state: State) -> State:
        """One pass that renews keys and values, if one is due, then passes over windows that read them."""
        state = _enter_block(state, p, s)
        state = _full(w, state, p, s, draws) if p.cache == "none" else cached_passes(state)
        return _end_rows(state, p, s) if p.stops else state

    def cached_passes(state: State) -> State:
        due = _refresh_is_due(state, p, s)
        if p.cache in ("two_block", "exact"):
            begins = (state.done_steps == 0) & ~due
            kind = jnp.where(due, 1, jnp.where(begins, 2, 0))
            two = lambda state: _two_blocks(w, state, p, s, draws)
            branches = [lambda state: state, lambda state: _full(w, state, p, s, draws), two]
            state = jax.lax.switch(kind, branches, state)
        else:
            state = jax.lax.cond(due, lambda state: _full(w, state, p, s, draws), lambda state: state, state)
        keys, light = state.keys, dataclasses.replace(state, keys=None)  # read only, so not carried by the loop

        def in_block(light: State) -> jax.Array:
            in_window = jnp.any(_open_in_block(light, p, s))
            return in_window & ~_refresh_is_due(light, p, s) & more(light)

        light = jax.lax.while_loop(in_block, lambda light: _window(w, light, keys, p, s, draws), light)
        return dataclasses.replace(light, keys=keys)

    return jax.lax.while_loop(more, round_of_passes, state)


def _enter_block(state: State, p: Program, s: Settings) -> State:
    """Moves to the first block with open positions, and counts them."""
    block = _first_block(state, p, s)
    is_new = block != state.block
    masks_B = jnp.sum(is_open(state, s) & (_columns(state) < _end(block, p, s)), axis=1, dtype=jnp.int32)
    return dataclasses.replace(
        state, block=block, done_steps=jnp.where(is_new, 0, state.done_steps),
        masks=jnp.where(is_new, masks_B, state.masks),
    )  # fmt: skip


def _first_block(state: State, p: Program, s: Settings) -> jax.Array:
    """Of any row; masks of the prompt are filled with the first block."""
    column = jnp.argmax(jnp.any(is_open(state, s), axis=0))
    return jnp.maximum(column - s.start, 0) // p.block_length


def _end_rows(state: State, p: Program, s: Settings) -> State:
    """When a block is finished, rows that hold an end of text in it or before are filled up with it."""
    columns_S, end = _columns(state), _end(state.block, p, s)
    open_BS = is_open(state, s)
    finished = ~jnp.any(open_BS & (columns_S < end))
    ends_BS = (state.tokens == s.eos_id) & (columns_S >= s.start) & (columns_S < end)
    fill_BS = finished & open_BS & jnp.any(ends_BS, axis=1, keepdims=True)
    return dataclasses.replace(state, tokens=jnp.where(fill_BS, s.eos_id, state.tokens))


def _refresh_is_due(state: State, p: Program, s: Settings) -> jax.Array:
    """Whether the next pass goes over the whole canvas: at a block's start, unless the cache is kept from block to
    block; after `refresh` passes; and while masks stand before the block."""
    due = state.fresh >= s.refresh
    if p.cache in ("prefix", "dual"):
        due |= state.done_steps == 0
    begin = s.start + state.block * p.block_length
    return due | jnp.any(is_open(state, s) & (_columns(state) < begin))


def _open_in_block(state: State, p: Program, s: Settings) -> jax.Array:
    """bool [B, S]"""
    columns_S, begin = _columns(state), s.start + state.block * p.block_length
    return is_open(state, s) & (columns_S >= begin) & (columns_S < begin + p.block_length)


def _columns(state: State) -> jax.Array:
    return jnp.arange(state.tokens.shape[1])


def _end(block: jax.Array, p: Program, s: Settings) -> jax.Array:
    return s.start + (block + 1) * p.block_length


# --- the three kinds of passes ---


def _full(w: cache.Weights, state: State, p: Program, s: Settings, draws) -> State:
    """A pass over every column. What is masked before the block is predicted in further windows of its width."""
    S, W = state.tokens.shape[1], p.block_length
    tokens_BS, mask = _rows(state, p, s), _full_mask(state, p, s)
    keep = p.cache != "none"
    hidden_BSD, keys = cache.full_pass(w, tokens_BS, mask, _twice(_positions(state), p), keep)
    hidden_BSD = reshard(hidden_BSD, BATCH, None, None)
    begin = s.start + state.block * W
    open_BS = is_open(state, s) & (_columns(state) < begin + W)
    first = jnp.minimum(jnp.argmax(jnp.any(open_BS, axis=0)), begin)
    windows = 1 + (begin - first + W - 1) // W

    def look(window, found):
        """Puts the predictions of one window, counted backwards from the block, into `found`."""
        at = jnp.clip(begin - window * W, 0, S - W)
        hidden_BWD = jax.lax.dynamic_slice_in_dim(hidden_BSD, at, W, axis=1)
        predicted = _predict(w, hidden_BWD, at, state, p, s, draws)
        put = lambda all_BS, new_BW: jax.lax.dynamic_update_slice_in_dim(all_BS, new_BW, at, axis=1)
        return jax.tree.map(put, found, predicted)

    nothing_BS = jnp.where(state.given, 0.0, 0.0)
    nothing = jnp.where(state.given, 0, 0), nothing_BS, nothing_BS, nothing_BS
    found = jax.lax.fori_loop(0, windows, look, nothing)
    state = _commit(state, found, open_BS, 0, p, s)
    return dataclasses.replace(state, keys=keys, full_passes=state.full_passes + 1, fresh=jnp.int32(1))


def _window(w: cache.Weights, state: State, keys: cache.Keys, p: Program, s: Settings, draws) -> State:
    """A pass over the block, and what a window has around it, beside the columns that were kept."""
    begin = s.start + state.block * p.block_length
    own = begin - p.left, begin - p.left + p.window
    hidden_BXD, _, first = _beside_kept(w, state, keys, own, p.window, p, s)
    return _predict_and_commit(w, hidden_BXD, first, begin, state, p, s, draws)


def _two_blocks(w: cache.Weights, state: State, p: Program, s: Settings, draws) -> State:
    """A pass over the block that was finished and the next one: the cache gets the final tokens of the one, and the
    other its first predictions."""
    begin = s.start + state.block * p.block_length
    width = 2 * p.block_length + p.left
    own = begin - p.block_length, begin - p.block_length + width
    hidden_BXD, new, first = _beside_kept(w, state, state.keys, own, width, p, s)
    state = dataclasses.replace(state, keys=cache.write_window(state.keys, new, first))
    return _predict_and_commit(w, hidden_BXD, first, begin, state, p, s, draws)


def _beside_kept(w: cache.Weights, state: State, keys, own, width: int, p: Program, s: Settings):
    """(hidden states [B, X, D], keys and values of them, first column) of a window over the columns own[0]..own[1].

    Where the canvas ends before the window does, it begins further left; what it computes of columns that are not its
    own serves nothing.
    """
    S = state.tokens.shape[1]
    first = jnp.clip(own[0], 0, S - width)
    cut = lambda x_BS: jax.lax.dynamic_slice_in_dim(x_BS, first, width, axis=1)
    columns_S, seen_BS = _columns(state), _seen(state, p, s)
    is_own_S = (columns_S >= own[0]) & (columns_S < own[1])
    kept_BS = seen_BS & ~is_own_S
    own_BX = cut(seen_BS & is_own_S)
    mask = Mask(segment_ids=jnp.ones_like(own_BX, jnp.int32), key_segment_ids=own_BX.astype(jnp.int32))
    if p.cache == "exact":
        block_S = (columns_S - s.start) // p.block_length
        kept_BS &= columns_S < own[0]
        block_BX = cut(jnp.broadcast_to(block_S, state.tokens.shape))
        mask = dataclasses.replace(mask, kind="block_causal", block=1, positions=block_BX)
    twice = functools.partial(_twice, p=p)
    hidden_BXD, new = cache.window_pass(
        w, cut(_rows(state, p, s)), twice(cut(_positions(state))), keys, twice(kept_BS), jax.tree.map(twice, mask)
    )
    return hidden_BXD, new, first


def _predict_and_commit(w, hidden_BXD, first, begin, state: State, p: Program, s: Settings, draws) -> State:
    """Commits what is predicted in the block's columns of a window that begins at column `first`."""
    W = p.block_length
    hidden_BWD = jax.lax.dynamic_slice_in_dim(hidden_BXD, begin - first, W, axis=1)
    found = _predict(w, hidden_BWD, begin, state, p, s, draws)
    open_BW = jax.lax.dynamic_slice_in_dim(is_open(state, s), begin, W, axis=1)
    state = _commit(state, found, open_BW, begin, p, s)
    return dataclasses.replace(state, window_passes=state.window_passes + 1, fresh=state.fresh + 1)


# --- what a pass sees ---


def _rows(state: State, p: Program, s: Settings) -> jax.Array:
    """The canvases, int32 [B, S]; with guidance [2B, S], the second half without the prompt."""
    if not p.guided:
        return state.tokens
    return jnp.concatenate([state.tokens, jnp.where(state.given, s.mask_id, state.tokens)])


def _twice(x: jax.Array, p: Program) -> jax.Array:
    return jnp.concatenate([x, x]) if p.guided else x


def _positions(state: State) -> jax.Array:
    """Counted from each row's first token, whatever the padding before it; int32 [B, S]."""
    first_B = jnp.argmax(state.visible, axis=1)
    return jnp.maximum(_columns(state) - first_B[:, None], 0)


def _seen(state: State, p: Program, s: Settings) -> jax.Array:
    """Columns that a query may see, bool [B, S]."""
    if not p.growing:
        return state.visible
    return state.visible & (_columns(state) < _end(state.block, p, s))


def _full_mask(state: State, p: Program, s: Settings) -> Mask:
    segments_BS = _twice(_seen(state, p, s).astype(jnp.int32), p)
    if p.cache != "exact":
        return Mask(segment_ids=segments_BS)
    block_BS = jnp.broadcast_to((_columns(state) - s.start) // p.block_length, state.tokens.shape)
    return Mask("block_causal", segments_BS, _twice(block_BS, p), block=1)


# --- predictions and commits ---


def _predict(w: cache.Weights, hidden_BWD, first: jax.Array, state: State, p: Program, s: Settings, draws):
    """(token, score, value, log odds) of each of the W columns from `first` on; see rules.Candidates."""
    S, W = state.tokens.shape[1], p.block_length
    t = state.full_passes + state.window_passes
    noise_key, order_key = jax.random.split(jax.random.fold_in(s.key, t))
    from_end_W = S - 1 - first - jnp.arange(W)  # by what draws are keyed: the same for any padding on the left
    out_BWV = cache.logits(w, hidden_BWD)
    if p.guided:
        conditional, unconditional = jnp.split(out_BWV, 2)
        out_BWV = unconditional + (s.cfg_scale + 1) * (conditional - unconditional)
    out_BWV = rules.without(out_BWV, s.banned_id)
    noise, order = (
        None if x is None else jax.lax.dynamic_slice_in_dim(x[t], first, W, axis=1) for x in draws
    )  # fmt: skip
    no_mask_BWV = rules.without(out_BWV, s.mask_id)
    tokens_BW = rules.sample_tokens(noise_key, no_mask_BWV, s.temperature, s.rows, from_end_W, noise)
    ranked_BWV = rules.without(out_BWV, s.last_ids[0], s.last_ids[1])
    log_odds_BW = rules.confidence(ranked_BWV, tokens_BW)
    if p.remasking == "low_confidence":
        score_BW, value_BW = log_odds_BW, jax.nn.sigmoid(log_odds_BW)
    elif p.remasking == "margin":
        score_BW = value_BW = rules.margin(ranked_BWV)
    elif p.remasking == "entropy":
        score_BW = -rules.entropy(ranked_BWV)
        value_BW = jnp.exp(score_BW)
    else:
        score_BW = value_BW = rules.random_score(order_key, s.rows, from_end_W) if order is None else order
    if p.rule == "entropy_bound":
        value_BW = rules.entropy(ranked_BWV)
    return tokens_BW, score_BW, value_BW, log_odds_BW


def _commit(state: State, found, open_BX: jax.Array, first, p: Program, s: Settings) -> State:
    """Puts what the rule chooses of `found`, for the columns from `first` on, on the canvas."""
    tokens_BX, score_BX, value_BX, log_odds_BX = found
    count_B = rules.tokens_per_step(state.masks, s.steps, state.done_steps)
    chosen_BX = rules.commit(p.rule, rules.Candidates(score_BX, value_BX, open_BX, count_B, s.limit))
    t = state.full_passes + state.window_passes

    def put(all_BS, new_BX):
        old_BX = jax.lax.dynamic_slice_in_dim(all_BS, first, chosen_BX.shape[1], axis=1)
        new_BX = jnp.where(chosen_BX, new_BX, old_BX).astype(all_BS.dtype)
        return jax.lax.dynamic_update_slice_in_dim(all_BS, new_BX, first, axis=1)

    return dataclasses.replace(
        state, tokens=put(state.tokens, tokens_BX), step=put(state.step, t),
        probability=put(state.probability, jax.nn.sigmoid(log_odds_BX)), done_steps=state.done_steps + 1,
    )  # fmt: skip


def _no_keys(w: cache.Weights, canvas_BS: jax.Array, p: Program) -> cache.Keys | None:
    """Room for the keys and values of every column."""
    if p.cache == "none":
        return None
    shapes = jax.eval_shape(
        lambda: cache.full_pass(
            w, jnp.concatenate([canvas_BS] * (2 if p.guided else 1)), Mask(), jnp.arange(canvas_BS.shape[1])[None], True
        )[1]
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), shapes)
