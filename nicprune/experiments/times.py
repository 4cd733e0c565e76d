"""The times that budgets of a recipe limit: measured once, and kept with the run."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from nicprune.codecs.copying import copy_codec
from nicprune.experiments.plan import Run, runtime_of
from nicprune.experiments.recipe import Recipe
from nicprune.methods.attaching import attach
from nicprune.pruning.budget import TIMES
from nicprune.pruning.latency_table import LatencyTable
from nicprune.pruning.target import Target
from nicprune.runtime.latency import measure_latency
from nicprune.runtime.latency_refinement import refine_latency

FILE = "latency.json"
"""The table in the folder of a run: a run that is resumed goes on with it."""


def latency_of(
    recipe: Recipe, job: Run, codec: nn.Module, *, keep: bool = False
) -> LatencyTable | None:
    """Return the times of the codec that a run starts from; None if its budgets limit none.

    Args:
        keep: refine them near the budgets, and write them into the folder of the run.

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
        for _, settings in job.settings:
            if set(TIMES) & set(settings.get("budget") or ()):
                choose = partial(_by_magnitude, codec, settings)
                norms = settings.get("norms", "pinned")
                table = refine_latency(codec, table, choose, norms=norms)
        table.write(path)
    return table


def _by_magnitude(
    codec: nn.Module, settings: dict[str, Any], table: LatencyTable
) -> dict[str, list[int]]:
    """Return the keep-lists that magnitude pruning chooses for a method's target: near those of the
    method.
    """
    target = {name: value for name, value in settings.items() if name in Target.model_fields}
    return attach(copy_codec(codec), "magnitude", latency=table, **target).keep()
