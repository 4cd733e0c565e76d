"""The budget of MACs that leaves a codec as fast as a budget of time does: what the better codec
for the same milliseconds is compared with.
"""

from __future__ import annotations

from typing import Any

from nicprune.common.errors import BudgetError
from nicprune.methods.composition import Attached
from nicprune.pruning.budget import Budget
from nicprune.pruning.target import Target
from nicprune.pruning.totals import Totals

MACS = {("encode_s",): "encoder", ("decode_s",): "decoder", ("encode_s", "decode_s"): "macs"}
"""The MACs that stand for times."""

HALVINGS = 10


def macs_of_equal_time(attached: Attached) -> tuple[Budget, Totals] | None:
    """Return the largest budget of MACs that meets the times of the budget that was given, by the
    same importance of channels, and the cost of what it leaves; None where there is no budget of
    times, or no one-shot pruner.
    """
    pruners = [m for m in attached.roles.pruners if isinstance(m.config, Target)]
    pruner: Any = pruners[0] if len(pruners) == 1 else None
    if pruner is None or not pruner.one_shot() or pruner.config.budget is None:
        return None
    given: Target = pruner.config
    assert given.budget is not None
    if not given.budget.times:
        return None
    limits = given.budget.limits(attached.cost.original)
    what, low, high = MACS[tuple(given.budget.times)], 0.0, 1.0
    found = None
    try:
        for _ in range(HALVINGS):
            budget = Budget(**{what: (low + high) / 2})
            pruner.config = given.model_copy(update={"budget": budget})
            try:
                totals = attached.cost.totals(pruner.select())
            except BudgetError:  # even the narrowest codec has more
                low = (low + high) / 2
                continue
            if all(getattr(totals, name) <= limits[name] for name in given.budget.times):
                low, found = (low + high) / 2, (budget, totals)
            else:
                high = (low + high) / 2
    finally:
        pruner.config = given
    return found
