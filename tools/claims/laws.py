"""Laws of loss against compute, and how much more of it one kind of model needs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llada_jax.fields import InputError

Line = dict[str, Any]  # a cell: kind, size, budget (FLOPs), seed, loss, score, tokens


class Law(NamedTuple):
    """loss = scale · FLOPs^-power."""

    scale: float
    power: float

    def loss(self, flops: Any) -> Any:
        return self.scale * np.power(flops, -self.power)

    def flops(self, loss: float) -> float:
        return (self.scale / loss) ** (1 / self.power)


def fit(flops: Sequence[float], losses: Sequence[float]) -> Law:
    """By least squares between the logarithms. Raises InputError where the loss does not fall."""
    slope, offset = np.polyfit(np.log(flops), np.log(losses), 1)
    if slope >= 0:
        raise InputError(f"the loss does not fall with compute ({losses[0]:.3f} … {losses[-1]:.3f}); raise --budgets")
    return Law(float(np.exp(offset)), float(-slope))


def frontier(lines: Sequence[Line], kind: str) -> list[Line]:
    """The best size at each budget: its loss and score, means over seeds."""
    best: dict[float, Line] = {}
    own = [line for line in lines if line["kind"] == kind]
    for size, budget in sorted({(line["size"], line["budget"]) for line in own}):
        cell = [line for line in own if (line["size"], line["budget"]) == (size, budget)]
        mean = {name: float(np.mean([line[name] for line in cell])) for name in ("loss", "score", "tokens")}
        if budget not in best or mean["loss"] < best[budget]["loss"]:
            best[budget] = {"budget": budget, "size": size, **mean}
    return [best[budget] for budget in sorted(best)]


def flops_at(loss: float, best: Sequence[Line]) -> float:
    """Compute at which a frontier comes to a loss, by straight lines between its points in a log-log plot."""
    falling = np.minimum.accumulate([x["loss"] for x in best])[::-1]
    return float(np.exp(np.interp(np.log(loss), np.log(falling), np.log([x["budget"] for x in best])[::-1])))


def ratio_at_equal_loss(llada: Sequence[Line], control: Sequence[Line]) -> tuple[float, float]:
    """(compute of LLaDA over the control's, at which loss): at the lowest loss that both reach.

    Raises InputError where there is none.
    """
    reached = [(min(x["loss"] for x in best), max(x["loss"] for x in best)) for best in (llada, control)]
    loss = max(low for low, _ in reached)
    if loss > min(high for _, high in reached):
        raise InputError(f"no loss is reached by both ({reached[0]} and {reached[1]} nats); add --budgets between them")
    return flops_at(loss, llada) / flops_at(loss, control), loss
