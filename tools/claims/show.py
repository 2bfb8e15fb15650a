"""Tables and pictures of results."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLORS = {"llada": "#1f6fb4", "arm": "#d1662a"}


def spread(shares: np.ndarray) -> str:
    """Mean and extremes over seeds, in percent."""
    return f"{shares.mean():.0%} ({shares.min():.0%} to {shares.max():.0%})"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [" | ".join(map(str, head)), "|".join(["---"] * len(head)), *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def figure(width: float = 6.0, height: float = 3.6, columns: int = 1):
    """(figure, axes) of matplotlib, drawn without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "llada_jax",
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")


def plain_ticks(axis) -> None:
    """Numbers such as 2 and 2.5 on a logarithmic axis, instead of powers of ten."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.MaxNLocator(6))
    axis.set_major_formatter(ticker.ScalarFormatter())
    axis.set_minor_locator(ticker.NullLocator())


def save(drawn, path: Path) -> None:
    """An SVG; the same figure makes the same file."""
    from matplotlib import pyplot

    drawn.savefig(path, metadata={"Date": None})
    pyplot.close(drawn)
    print(f"picture: {path}")
