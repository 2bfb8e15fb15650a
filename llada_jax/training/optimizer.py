"""AdamW, clipping, and learning-rate schedules written as phases.

A schedule is a tuple of phases (kind, value, until): from where the last phase ended (rate 0 at the start), the rate
goes to `value` and is there at `until`. kind: "linear", "cosine", or "constant", which jumps to `value` at once.
until: "2000 steps", "1.2T tokens" (T, B, M) or "90%" of config.train.steps, always counted from the start of the run.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llada_jax.fields import InputError

# Section 2 of FACTS' sources: arXiv 2502.09992 section 2.2 and appendix B; arXiv 2606.25331 for iLLaDA.
LLADA_PRETRAIN = (
    ("linear", 4e-4, "2000 steps"),
    ("constant", 4e-4, "1.2T tokens"),
    ("constant", 1e-4, "2.0T tokens"),
    ("linear", 1e-5, "2.3T tokens"),
)
LLADA_SFT = (("linear", 2.5e-5, "50 steps"), ("constant", 2.5e-5, "90%"), ("linear", 2.5e-6, "100%"))
ILLADA_PRETRAIN = (("linear", 2e-4, "2000 steps"), ("constant", 2e-4, "90%"), ("cosine", 5e-6, "100%"))
ILLADA_SFT = (("linear", 5e-6, "50 steps"), ("constant", 5e-6, "90%"), ("linear", 5e-7, "100%"))

_UNTIL = re.compile(r"\s*(\d{1,18}(?:\.\d{0,18})?)\s*(?:(%)|(steps)|([TBMK]?)\s*tokens)\s*")
_LARGEST_RATE = 10.0
_UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "K": 1e3, "": 1.0}


def make_schedule(phases, *, total_steps: int, tokens_per_step: int) -> optax.Schedule:
    """step -> learning rate (float32), for phases as described above. For a step on the host it touches no device.

    A phase that would end before it begins is left out, so a short run may see only the warm-up. Raises InputError for
    an unknown kind, an unreadable `until`, or no phase at all.
    """
    _check(phases)
    ends = list(itertools.accumulate((_until(phase, total_steps, tokens_per_step) for phase in phases), max))

    def rate(step):
        np_ = jnp if isinstance(step, jax.Array) else np
        step = np_.asarray(step, np_.float32)
        value, start, current = np_.float32(0.0), 0, 0.0
        for i, ((kind, target, _), end) in enumerate(zip(phases, ends, strict=True)):
            fraction = np_.clip((step - start) / max(end - start, 1), 0.0, 1.0)
            if kind == "cosine":
                fraction = (1 - np_.cos(np_.pi * fraction)) / 2
            inside = np_.float32(target) if kind == "constant" else current + (target - current) * fraction
            last = i == len(phases) - 1
            value = np_.where((step >= start) if last else (step >= start) & (step < end), inside, value)
            start, current = end, target
        return value

    return rate


def _check(phases) -> None:
    """Raises InputError for what is no schedule."""
    name, example = "config.optimizer.schedule", "(('constant', 1e-4, '100%'),)"
    if not isinstance(phases, tuple | list) or not phases:
        raise InputError(f"{name}: needs at least one phase, such as {example}")
    for phase in phases:
        if not isinstance(phase, tuple | list) or len(phase) != 3:
            raise InputError(f"{name}: {str(phase)[:60]!r} is no (kind, rate, until); write it as in {example}")
        kind, rate, until = phase
        if kind not in ("linear", "constant", "cosine"):
            raise InputError(f"{name}: {kind!r} is not one of linear, constant, cosine")
        if type(rate) not in (int, float) or not 0 <= rate <= _LARGEST_RATE:
            raise InputError(f"{name}: the rate {rate!r} is no number from 0 to {_LARGEST_RATE:g}")
        if not _UNTIL.fullmatch(str(until)):
            raise InputError(f"{name}: can't read {until!r}; write '2000 steps', '1.2T tokens' or '90%'")


def _until(phase, total_steps: int, tokens_per_step: int) -> int:
    match = _UNTIL.fullmatch(str(phase[2]))
    assert match is not None  # _check has seen it
    number, percent, steps, unit = match.groups()
    if percent:
        return round(float(number) / 100 * total_steps)
    return round(float(number)) if steps else round(float(number) * _UNITS[unit] / tokens_per_step)


def make_optimizer(config, *, total_steps: int, tokens_per_step: int) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW, from `config.optimizer`.

    Its `update` takes ok=, bool []: if false, its state stays as it is, and the updates are not to be used. decay
    "matrices" spares norm weights, as is usual; "all" is what the official PyTorch loop would do.
    """
    if config.decay not in ("matrices", "all"):
        raise InputError(f"config.optimizer.decay {config.decay!r} is not one of matrices, all")
    schedule = make_schedule(config.schedule, total_steps=total_steps, tokens_per_step=tokens_per_step)
    adamw = optax.chain(
        _adam(config.b1, config.b2, config.eps, config.mu_dtype),
        optax.add_decayed_weights(config.weight_decay, is_matrix if config.decay == "matrices" else None),
        _scale(schedule),
    )
    return optax.chain(_clip(config.clip_norm) if config.clip_norm else optax.identity(), adamw)


def keep(ok, new, old):
    """`new`, or `old` to the bit where not `ok`, bool []: trees of arrays of the same shapes and types."""
    return jax.tree.map(lambda x, y: jax.lax.select(jnp.asarray(ok), x, y), new, old)


def _adam(b1: float, b2: float, eps: float, mu_dtype: str) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, but where not `ok` all stays as it is.

    The moments are selected before anything is computed from them: if that were done to the result, XLA would compute
    the update from the old moments and the gradients once more, and keep a copy of the old ones for that. Nor does
    optax.conditionally_mask do it: in the vocabulary step on a CPU it takes 27% more temporaries (tools/README.md).
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)

    def update(updates, state, params=None, *, ok=True, **_):
        del params
        old = jax.tree.map(lambda m, g: m.astype(g.dtype), state.mu, updates)
        mu = keep(ok, optax.tree.update_moment(updates, state.mu, b1, 1), old)
        nu = keep(ok, optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2), state.nu)
        count = state.count + ok
        updates = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps),
            optax.tree.bias_correction(mu, b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        return updates, optax.ScaleByAdamState(count, optax.tree.cast(mu, mu_dtype), nu)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _scale(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_learning_rate, counting only what is `ok`."""
    scale = optax.scale_by_learning_rate(schedule)

    def update(updates, state, params=None, *, ok=True, **_):
        updates, after = scale.update(updates, state, params)
        return updates, keep(ok, after, state)

    return optax.GradientTransformationExtraArgs(scale.init, update)


def _clip(limit: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm, but one factor for all: its division of every gradient is what XLA will not repeat in
    each of Adam's moments, so that it would keep a second copy of all gradients."""

    def clip(updates, params=None):
        del params
        factor = jnp.minimum(1.0, limit / jnp.maximum(optax.tree.norm(updates), 1e-30))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clip)


def is_matrix(params):
    """True for weights, False for norm scales: by name, since layers are stacked."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _is_norm(path), params)


def _is_norm(path) -> bool:
    names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
    return any(name in ("attn_norm", "ff_norm", "ln_f") for name in names)
