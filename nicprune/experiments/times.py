"""The times that budgets of a recipe limit: measured once, and kept with the run."""

from __future__ import annotations

from torch import nn

from nicprune.experiments.plan import Run, runtime_of
from nicprune.experiments.recipe import Recipe
from nicprune.pruning.latency_table import LatencyTable
from nicprune.runtime.latency import measure_latency

FILE = "latency.json"
"""The table in the folder of a run: a run that is resumed goes on with it."""


def latency_of(
    recipe: Recipe, job: Run, codec: nn.Module, *, keep: bool = False
) -> LatencyTable | None:
    """Return the times of the codec that a run starts from; None if its budgets limit none.

    Args:
        keep: write them into the folder of the run.

    Raises:
        NicpruneError: they cannot be measured.
    """
    if not job.arm.timed:
        return None
    path = job.folder / FILE
    if path.exists():
        return LatencyTable.read(path)
    table = measure_latency(codec, **dict(runtime_of(recipe)))
    if keep:
        table.write(path)
    return table
