"""Steer the pace at which channels are driven out, so that the cost follows a straight line to a
budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from nicprune.pruning.totals import Totals

STEER = 0.05
"""Largest relative change of the rate in one step."""

GAIN = 10.0
"""The change is the largest from a tenth of the whole way off the line."""

SPREAD = 30.0
"""Relative rates of single channels lie within this factor of their median."""

FASTEST = 0.5
"""Largest rate per step."""


def deviations(
    cost: Callable[[str], float],
    whole: Totals,
    limits: Mapping[str, float],
    planned: float,
    least_way: float = 0.0,
) -> list[float]:
    """Return the distance from the line for each limited quantity, as a fraction of the way from
    the whole codec to the limit; positive where the cost is too high.

    Args:
        cost: the present cost, by quantity ("macs", "encoder", ...).
        whole: the cost of the whole codec.
        limits: the budget, in absolute numbers.
        planned: the fraction of the way that should be done by now, 0 to 1.
        least_way: the way is taken to be at least this fraction of the whole.
    """
    found = []
    for name, limit in limits.items():
        full = getattr(whole, name)
        way = max(full - limit, least_way * full)
        found.append((cost(name) - (full - planned * way)) / way)
    return found


def steer(rate: Tensor, deviation: float | np.ndarray, slowest: float) -> None:
    """Raise a rate, shape () or (n,), where the cost is too high, lower it where it is too low, in
    place.
    """
    change = np.exp(STEER * np.clip(GAIN * np.asarray(deviation), -1, 1))
    rate.mul_(rate.new_tensor(change.tolist())).clamp_(slowest, FASTEST)


def relative_rates(price: Tensor, importance: Tensor) -> Tensor:
    """Return the rate of each channel relative to the median: MACs freed over importance, both of
    shape (channels,).
    """
    rates = price / importance.clamp_min(1e-20)
    return (rates / rates.median().clamp_min(1e-20)).clamp(1 / SPREAD, SPREAD)
