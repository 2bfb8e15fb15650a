"""Reversal: given one line of a couplet, write the other (Table 4 of arXiv 2502.09992), for both kinds of model.

N couplets, C candidates, L length of a row. A couplet is (first, second); its text is `first，second。` as in training.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.data.sources import couplet_text
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.fields import InputError
from llada_jax.files import LARGEST_JSON, read_bytes
from llada_jax.sampling.generate import infill
from llada_jax.sampling.left_to_right import continue_text, right_pad

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


_ASKED = {"forward": "的下一句是什么？", "backward": "的上一句是什么？"}  # which line is the next, the previous one?
_ONLY = " 直接输出句子即可。"  # write the sentence alone
OFFICIAL_SETTINGS = {"gen_length": 28, "block_length": 28, "logits_eos_inf": True}  # one token a pass


def read_couplets(path: str) -> list[Couplet]:
    """The couplets of a file as the authors published theirs: a JSON list of {"first", "second"}.

    Raises InputError for a file that holds something else.
    """
    try:
        rows = json.loads(read_bytes(Path(path), LARGEST_JSON))
        couplets = [(row["first"], row["second"]) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path}: must be a JSON list of {{"first": line, "second": line}}') from error
    if not couplets or not all(isinstance(line, str) and line for couplet in couplets for line in couplet):
        raise InputError(f'{path}: must hold couplets, and texts as "first" and "second" of each')
    return couplets


def official_questions(couplets: Sequence[Couplet], direction: str) -> list[tuple[str, str]]:
    """(what a user asks, the line that its reply must contain) of each couplet, as in the authors' eval_reverse.py."""
    pairs = couplets if direction == "forward" else [(second, first) for first, second in couplets]
    return [(f"{given}{_ASKED[direction]}{_ONLY}", wanted) for given, wanted in pairs]


def fill_lines(model, tokenizer: Tokenizer, couplets: Sequence[Couplet], direction: str) -> tuple[list[str], dict]:
    """What a masked-diffusion model writes in place of each hidden line, and the replay of the couplets' first.

    direction: "forward" hides the second line, "backward" the first.
    """
    rows, hidden = zip(*(_masked_row(tokenizer, couplet, direction) for couplet in couplets), strict=True)
    canvas, real = right_pad(rows, tokenizer.pad_id)
    sampled = infill(model, canvas, real)
    tokens = np.asarray(sampled.tokens)
    lines = [tokenizer.decode(tokens[i, hidden[i]]) for i in range(len(couplets))]
    return lines, {"sampled": sampled, "hidden": hidden}


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
    """Share of couplets of which a causal model finds the right line among `candidates` by likelihood.

    Found is a line whose score is a finite number above all others: ties and NaN do not count.
    """
    rng = np.random.default_rng(seed)
    count = min(candidates, len(couplets))
    texts = []
    for i, (first, second) in enumerate(couplets):
        others = rng.permutation([j for j in range(len(couplets)) if j != i])[: count - 1]
        for j in (i, *others):
            texts.append(
                couplet_text(first, couplets[j][1]) if direction == "forward" else couplet_text(couplets[j][0], second)
            )
    rows = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    tokens, real = right_pad(rows, tokenizer.pad_id)
    scores = np.concatenate(
        [
            np.asarray(_log_likelihood(model, tokens[i : i + 1024], real[i : i + 1024]))
            for i in range(0, len(rows), 1024)
        ]
    )
    return float(np.mean(_first_is_best(scores.reshape(len(couplets), count))))


def accuracy(lines: Sequence[str], couplets: Sequence[Couplet], direction: str) -> float:
    """Share of lines that are right to the last character."""
    wanted = [second if direction == "forward" else first for first, second in couplets]
    return float(np.mean([line == want for line, want in zip(lines, wanted, strict=True)]))


def _first_is_best(scores_NC: np.ndarray) -> np.ndarray:
    """Whether column 0 is finite and above every other, bool [N]; never where one of them is NaN."""
    truth_N = scores_NC[:, 0]
    return np.isfinite(truth_N) & (truth_N > np.max(scores_NC[:, 1:], axis=1, initial=-np.inf))


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


def _longest(tokenizer: Tokenizer, couplets: Sequence[Couplet]) -> int:
    return max(len(tokenizer.encode(couplet_text(*couplet))) for couplet in couplets)


def _line(text: str) -> str:
    return text.split("。")[0].split("，")[0]


def _begins_with(text: str, line: str) -> bool:
    """Whether a continuation begins with the whole line, after a mark that the prompt may have lacked."""
    return _line(text.lstrip("，。")) == line
