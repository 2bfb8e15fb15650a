"""The tokens of an answer as people see them. G tokens."""

from typing import NamedTuple

import numpy as np

from llada_jax.data.tokenizer import Tokenizer

MASK, END = "▒", "∙"


class Piece(NamedTuple):
    """A token, or several that make one character.

    probability: the least one that they were committed with; None: a mask. step: the pass that committed the last of
    them; -1: given.
    """

    text: str
    probability: float | None
    step: int = -1


def pieces(
    tokenizer: Tokenizer, tokens: np.ndarray, probability: np.ndarray, step: np.ndarray, whole: bool = False
) -> list[Piece]:
    """What tokens, probability, step [G] of an answer show. The first end of turn or text ends it, unless `whole`."""
    shown: list[Piece] = []
    waiting: list[tuple[int, float, int]] = []  # bytes of a character that is not complete

    def flush():
        if waiting:
            ids, probabilities, steps = zip(*waiting, strict=True)
            shown.append(Piece(tokenizer.decode(ids), min(probabilities), max(steps)))
            waiting.clear()

    for id, p, s in zip(tokens.tolist(), probability.tolist(), step.tolist(), strict=True):
        if id in (tokenizer.eot_id, tokenizer.eos_id):
            if not whole:
                break
            flush()
            shown.append(Piece(END, p, s))
            continue
        if id == tokenizer.mask_id:
            flush()
            shown.append(Piece(MASK, None))
            continue
        waiting.append((id, p, s))
        if "\ufffd" not in tokenizer.decode([id for id, _, _ in waiting]) or len(waiting) == 4:
            flush()
    flush()
    return [piece for piece in shown if piece.text]
