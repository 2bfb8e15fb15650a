"""The Transformer written plainly, in float64: NumPy for its values, or jax.numpy under x64 for its gradients."""

import jax
import numpy as np

WEIGHTS = "attn_norm ff_norm q_proj k_proj v_proj attn_out ff_proj up_proj ff_out".split()


def parameters(model) -> dict:
    """{name: float64 array}, such as "blocks.q_proj"; a tied head is not there."""
    found = {f"blocks.{name}": getattr(model.blocks, name) for name in WEIGHTS} | {"wte": model.wte, "ln_f": model.ln_f}
    if model.ff_out is not None:
        found["ff_out"] = model.ff_out
    return {name: np.asarray(x[...], np.float64) for name, x in found.items()}


def of_segments(segments) -> np.ndarray:
    """What each query sees, bool [B, L, L]; padding (segment 0) sees all that is none."""
    query, key = segments[:, :, None], segments[:, None, :]
    return ((query == key) | (query == 0)) & (key > 0)


def forward(weights: dict, c, tokens, visible=None, positions=None, xp=np):
    """Logits [B, L, V]. visible: bool [B or 1, L, L]. positions: [L] or [B, L]."""
    norm = lambda x, w: w * x / xp.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps)
    x = weights["wte"][tokens]
    half = c.head_dim // 2
    positions = np.arange(tokens.shape[1]) if positions is None else positions
    angle = positions[..., None] / c.rope_theta ** (np.arange(half) / half)
    angle = angle[:, None] if angle.ndim == 3 else angle

    def rotate(q):
        a, b = q[..., :half], q[..., half:]
        return xp.concatenate([a * xp.cos(angle) - b * xp.sin(angle), b * xp.cos(angle) + a * xp.sin(angle)], -1)

    for i in range(c.n_layers):
        w = {name: weights[f"blocks.{name}"][i] for name in WEIGHTS}
        h = norm(x, w["attn_norm"])
        q, k, v = (xp.einsum("bld,nhd->bnlh", h, w[name]) for name in ("q_proj", "k_proj", "v_proj"))
        k, v = (xp.repeat(y, c.n_heads // c.n_kv_heads, axis=1) for y in (rotate(k), v))
        scores = xp.einsum("bnlh,bnsh->bnls", rotate(q), k) / np.sqrt(c.head_dim)
        scores = scores if visible is None else xp.where(visible[:, None], scores, -1e30)
        p = xp.exp(scores - scores.max(-1, keepdims=True))
        a = xp.einsum("bnls,bnsh->bnlh", p / p.sum(-1, keepdims=True), v)
        x = x + xp.einsum("bnlh,dnh->bld", a, w["attn_out"])
        h = norm(x, w["ff_norm"])
        gate = h @ w["ff_proj"].T
        x = x + (gate / (1 + xp.exp(-gate)) * (h @ w["up_proj"].T)) @ w["ff_out"].T
    return norm(x, weights["ln_f"]) @ weights["wte" if "ff_out" not in weights else "ff_out"].T


def forward_columns(weights: dict, c, tokens, columns, kept=None):
    """(logits of some columns [B, C, V], keys and values of all layers): the other columns are seen as they were kept.

    kept: what the last call returned; without it all columns must be computed.
    """
    norm = lambda x, w: w * x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps)
    x, half = weights["wte"][tokens[:, columns]], c.head_dim // 2
    angle = columns[:, None] / c.rope_theta ** (np.arange(half) / half)

    def rotate(q):
        a, b = q[..., :half], q[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    layers = []
    for i in range(c.n_layers):
        w = {name: weights[f"blocks.{name}"][i] for name in WEIGHTS}
        h = norm(x, w["attn_norm"])
        q, k, v = (np.einsum("bld,nhd->bnlh", h, w[name]) for name in ("q_proj", "k_proj", "v_proj"))
        keys, values = (np.zeros((len(tokens), c.n_kv_heads, tokens.shape[1], c.head_dim)) for _ in range(2))
        if kept is not None:
            keys, values = kept[i][0].copy(), kept[i][1].copy()
        keys[:, :, columns], values[:, :, columns] = rotate(k), v
        layers.append((keys, values))
        all_k, all_v = (np.repeat(y, c.n_heads // c.n_kv_heads, axis=1) for y in (keys, values))
        scores = np.einsum("bnlh,bnsh->bnls", rotate(q), all_k) / np.sqrt(c.head_dim)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        x = x + np.einsum(
            "bnlh,dnh->bld", np.einsum("bnls,bnsh->bnlh", p / p.sum(-1, keepdims=True), all_v), w["attn_out"]
        )
        h = norm(x, w["ff_norm"])
        gate = h @ w["ff_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up_proj"].T)) @ w["ff_out"].T
    return norm(x, weights["ln_f"]) @ weights["wte" if "ff_out" not in weights else "ff_out"].T, layers


def log_softmax(logits, xp=np):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - xp.log(xp.exp(logits).sum(-1, keepdims=True))


def in_float64(function, *arguments):
    """The result of `function` on float64 arrays, as NumPy arrays; JAX computes in 64 bits meanwhile."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*arguments))
