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

from llada_jax.config import InputError

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

_UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "K": 1e3, "": 1.0}


def make_schedule(phases, *, total_steps: int, tokens_per_step: int) -> optax.Schedule:
    """step -> learning rate (float32), for phases as described above. For a step on the host it touches no device.

    A phase that would end before it begins is left out, so a short run may see only the warm-up. Raises InputError for
    an unknown kind, an unreadable `until`, or no phase at all.
    """
    if not phases:
        raise InputError("config.optimizer.schedule: is empty; give at least (('constant', 1e-4, '100%'),)")
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


def _until(phase, total_steps: int, tokens_per_step: int) -> int:
    kind, _, until = phase
    if kind not in ("linear", "constant", "cosine"):
        raise InputError(f"config.optimizer.schedule: {kind!r} is not one of linear, constant, cosine")
    match = re.fullmatch(r"\s*([\d.]+)\s*(?:(%)|(steps)|([TBMK]?)\s*tokens)\s*", str(until))
    if not match:
        raise InputError(f"config.optimizer.schedule: can't read {until!r}; write '2000 steps', '1.2T tokens' or '90%'")
    number, percent, steps, unit = match.groups()
    if percent:
        return round(float(number) / 100 * total_steps)
    return round(float(number)) if steps else round(float(number) * _UNITS[unit] / tokens_per_step)


def make_optimizer(config, *, total_steps: int, tokens_per_step: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, from `config.optimizer`.

    decay "matrices" spares norm weights, as is usual; "all" is what the official PyTorch loop would do.
    """
    if config.decay not in ("matrices", "all"):
        raise InputError(f"config.optimizer.decay {config.decay!r} is not one of matrices, all")
    adamw = optax.adamw(
        make_schedule(config.schedule, total_steps=total_steps, tokens_per_step=tokens_per_step),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=is_matrix if config.decay == "matrices" else None,
        mu_dtype=config.mu_dtype,
    )
    return optax.chain(_clip(config.clip_norm) if config.clip_norm else optax.identity(), adamw)


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
