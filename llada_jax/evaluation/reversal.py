"""Reversal: given one line of a couplet, write the other (Table 4 of arXiv 2502.09992), for both kinds of model.

N couplets, C candidates, L length of a row. A couplet is (first, second); its text is `first，second。` as in training.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.data.sources import couplet_text
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.sampling.generate import infill

Couplet = tuple[str, str]

PROTOCOLS = {
    "llada": "The hidden line is replaced by as many masks as it has tokens, in place: `▒▒▒▒▒，疑是地上霜。` backward, "
    "`床前明月光，▒▒▒▒▒。` forward, with the same text around it as in training. One token is committed a step, the "
    "one of which the model is surest. Right means every character right.",
    "arm_forward": "The control continues `first，` greedily up to the full stop.",
    "arm_backward": "A left-to-right model can only continue, so the control is asked in every way that we could think "
    "of: it continues `second，`, `second。` (as if the first line came next) and `second` greedily, and a couplet "
    "counts as right if any of the three continuations begins with the first line.",
    "arm_ranking": "Not writing: the control is shown {candidates} lines, the right one among them, each put into the "
    "text `first，second。`, and picks the one that makes the whole most likely. That it can do so shows that it knows "
    "the couplet; what it lacks is a way to write it backward.",
}


def fill_lines(model, tokenizer: Tokenizer, couplets: Sequence[Couplet], direction: str) -> tuple[list[str], dict]:
    """What a masked-diffusion model writes in place of each hidden line, and the replay of the couplets' first.

    direction: "forward" hides the second line, "backward" the first.
    """
    rows, hidden = zip(*(_masked_row(tokenizer, couplet, direction) for couplet in couplets), strict=True)
    canvas, real = _right_pad(rows, tokenizer.pad_id)
    sampled = infill(model, canvas, real)
    tokens = np.asarray(sampled.tokens)
    lines = [tokenizer.decode(tokens[i, hidden[i]]) for i in range(len(couplets))]
    return lines, {"sampled": sampled, "hidden": hidden}


def continue_text(model, tokenizer: Tokenizer, prompts: Sequence[str], max_new: int) -> list[str]:
    """Greedy left-to-right continuations of `prompts` by a causal model, up to the end of text."""
    return continue_ids(model, tokenizer, [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts], max_new)


def continue_ids(model, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new: int) -> list[str]:
    """The same for token ids, [B] lists; the text ends at the first end of turn or of text."""
    canvas, real = _right_pad([[*ids, *[tokenizer.mask_id] * max_new] for ids in prompts], tokenizer.pad_id)
    given = np.zeros(canvas.shape, bool)
    for i, ids in enumerate(prompts):
        given[i, : len(ids)] = True
    out = np.asarray(_left_to_right(model, jnp.asarray(canvas), jnp.asarray(given), min(map(len, prompts))))
    texts = []
    for i, ids in enumerate(prompts):
        new = [int(t) for t in out[i, len(ids) : len(ids) + max_new]]
        stops = [new.index(stop) for stop in (tokenizer.eos_id, tokenizer.eot_id) if stop in new]
        texts.append(tokenizer.decode(new[: min(stops, default=len(new))]))
    return texts


def write_forward(model, tokenizer: Tokenizer, couplets: Sequence[Couplet]) -> list[str]:
    """The control's second lines."""
    room = _longest(tokenizer, couplets)
    return [_line(text) for text in continue_text(model, tokenizer, [f"{first}，" for first, _ in couplets], room)]


def write_backward(model, tokenizer: Tokenizer, couplets: Sequence[Couplet]) -> list[str]:
    """The control's first lines, by the protocol above: the right one if any continuation begins with it."""
    room = _longest(tokenizer, couplets)
    tries = [
        continue_text(model, tokenizer, [f"{second}{mark}" for _, second in couplets], room)
        for mark in ("，", "。", "")
    ]
    best = []
    for (first, _), *texts in zip(couplets, *tries, strict=True):
        right = [text for text in texts if _begins_with(text, first)]
        best.append(first if right else _line(texts[0]))
    return best


def rank(
    model, tokenizer: Tokenizer, couplets: Sequence[Couplet], direction: str, *, candidates: int = 32, seed: int = 0
) -> float:
    """Share of couplets of which a causal model finds the right line among `candidates` by likelihood."""
    rng = np.random.default_rng(seed)
    count = min(candidates, len(couplets))
    texts, truth = [], []
    for i, (first, second) in enumerate(couplets):
        others = rng.permutation([j for j in range(len(couplets)) if j != i])[: count - 1]
        for j in (i, *others):
            texts.append(
                couplet_text(first, couplets[j][1]) if direction == "forward" else couplet_text(couplets[j][0], second)
            )
        truth.append(0)
    rows = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    tokens, real = _right_pad(rows, tokenizer.pad_id)
    scores = np.concatenate(
        [
            np.asarray(_log_likelihood(model, tokens[i : i + 1024], real[i : i + 1024]))
            for i in range(0, len(rows), 1024)
        ]
    )
    return float(np.mean(scores.reshape(len(couplets), count).argmax(1) == np.asarray(truth)))


def accuracy(lines: Sequence[str], couplets: Sequence[Couplet], direction: str) -> float:
    """Share of lines that are right to the last character."""
    wanted = [second if direction == "forward" else first for first, second in couplets]
    return float(np.mean([line == want for line, want in zip(lines, wanted, strict=True)]))


@jax.jit
def _left_to_right(model, canvas_BL: jax.Array, given_BL: jax.Array, first: jax.Array) -> jax.Array:
    def step(i, x_BL):
        logits_BLV = model(x_BL).at[..., model.config.mask_token_id].set(-jnp.inf)
        next_B = jnp.argmax(jax.lax.dynamic_index_in_dim(logits_BLV, i - 1, axis=1, keepdims=False), axis=-1)
        put_BL = (jnp.arange(x_BL.shape[1]) == i) & ~given_BL
        return jnp.where(put_BL, next_B[:, None].astype(x_BL.dtype), x_BL)

    return jax.lax.fori_loop(first, canvas_BL.shape[1], step, canvas_BL)


@jax.jit
def _log_likelihood(model, tokens_BL: jax.Array, real_BL: jax.Array) -> jax.Array:
    log_p_BLV = jax.nn.log_softmax(model(tokens_BL)[:, :-1].astype(jnp.float32), axis=-1)
    own_BL = jnp.take_along_axis(log_p_BLV, tokens_BL[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(own_BL * real_BL[:, 1:], axis=1)


def _masked_row(tokenizer: Tokenizer, couplet: Couplet, direction: str) -> tuple[list[int], slice]:
    """The couplet's row with one line masked, and where that line is."""
    first, second = couplet
    before, line, after = ("", first, f"，{second}。") if direction == "backward" else (f"{first}，", second, "。")
    head, masked = [tokenizer.bos_id, *tokenizer.encode(before)], len(tokenizer.encode(line))
    row = [*head, *[tokenizer.mask_id] * masked, *tokenizer.encode(after), tokenizer.eos_id]
    return row, slice(len(head), len(head) + masked)


def _right_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    width = -(-max(map(len, rows)) // 8) * 8  # few widths, so few programs
    tokens, real = np.full((len(rows), width), pad_id, np.int32), np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], real[i, : len(row)] = row, 1
    return tokens, real


def _longest(tokenizer: Tokenizer, couplets: Sequence[Couplet]) -> int:
    return max(len(tokenizer.encode(couplet_text(*couplet))) for couplet in couplets)


def _line(text: str) -> str:
    return text.split("。")[0].split("，")[0]


def _begins_with(text: str, line: str) -> bool:
    """Whether a continuation begins with the whole line, after a mark that the prompt may have lacked."""
    return _line(text.lstrip("，。")) == line
