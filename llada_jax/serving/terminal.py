"""An answer on a terminal: drawn again and again at the same place, each token in the colour of its probability."""

import itertools
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator

from llada_jax.serving.pieces import Piece

DIM, RESET = "\33[2m", "\33[0m"
_COLOURS = ((0.3, "\33[31m"), (0.6, "\33[33m"), (0.9, "\33[36m"), (2.0, ""))  # red, yellow, cyan below; then plain


def layout(shown: list[Piece], width: int, height: int, colour: bool = True) -> list[str]:
    """The last `height` lines of that many columns; wide characters take two."""
    lines: list[list[tuple[str, str]]] = [[]]  # of each character its colour and itself
    column = 0
    for text, p, _ in shown:
        start = DIM if p is None else next(code for limit, code in _COLOURS if p < limit)
        for character in text.replace("\t", "    "):
            cells = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if character == "\n" or column + cells > width:
                lines.append([])
                column = 0
            if character.isprintable():
                lines[-1].append((start if colour else "", character))
                column += cells
    return ["".join(_coloured(line)) for line in lines[-height:]]


def _coloured(line: list[tuple[str, str]]) -> Iterator[str]:
    for start, group in itertools.groupby(line, lambda pair: pair[0]):
        text = "".join(character for _, character in group)
        yield f"{start}{text}{RESET}" if start else text


class Screen:
    """Draws an answer again and again at the same place of a terminal."""

    def __init__(self):
        self._drawn = 0

    def draw(self, shown: list[Piece]) -> None:
        columns, rows = shutil.get_terminal_size()
        lines = layout(shown, columns - 1, rows - 2, colour="NO_COLOR" not in os.environ)
        up = f"\33[{self._drawn}A" if self._drawn else ""
        sys.stdout.write(f"{up}\r\33[J" + "".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
        self._drawn = len(lines)
