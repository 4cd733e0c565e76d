"""Refine a table of times where a budget leads: a codec pruned to it is timed as a whole.

The table's lines from layers to parts go through codecs whose widths all shrink alike. What a
budget of time leaves is narrow in other layers, and was up to 12 % slower than predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from nicprune.channels.groups import Norms
from nicprune.codecs.anatomy import check_codec
from nicprune.codecs.copying import copy_codec
from nicprune.pruning.latency_table import LatencyTable
from nicprune.pruning.surgery import analyse, prune
from nicprune.runtime.latency import counted_widths, seconds_of_parts

ROUNDS = 2
"""Codecs that are timed: the second is near the budget already."""

Keep = Mapping[str, Sequence[int]]


def refine_latency(
    codec: nn.Module,
    table: LatencyTable,
    choose: Callable[[LatencyTable], Keep],
    *,
    norms: Norms = "pinned",
    say: Callable[[str], None] = lambda line: None,
) -> LatencyTable:
    """Return a table that also holds the times of what a budget leaves of a codec.

    Args:
        codec: the codec that the table is of, unchanged.
        table: as `measure_latency` returned it.
        choose: returns the keep-lists that meet the budget by a table's times.
        norms: as for `analyse`, as the keep-lists take it.
        say: called with a line before something is measured.

    Raises:
        NicpruneError: the budget cannot be met, or the codec cannot be timed.
    """
    check_codec(codec)
    whole = copy_codec(codec).cpu().float().eval()
    seen: list[Keep] = []
    for _ in range(ROUNDS):
        keep = choose(table)
        if keep in seen:
            break
        seen.append(keep)
        say("timing what the budget leaves")
        small = prune(whole, keep, analyse(whole, norms), verify=False)
        table = _with(table, small, seconds_of_parts([whole, small], table))
    return table


def _with(
    table: LatencyTable, small: nn.Module, seconds: Sequence[Mapping[str, float]]
) -> LatencyTable:
    """Return the table with one more measurement of each part, relative to that of the whole codec
    beside it: the machine may be slower or faster than it was.
    """
    parts = {}
    for name, part in table.parts.items():
        widths = {layer: counted_widths(small.get_submodule(layer)) for layer in part.widths[0]}
        if widths in part.widths:  # as measured before; twice would be noise
            parts[name] = part
            continue
        now = part.seconds[0] * seconds[1][name] / seconds[0][name]
        parts[name] = part.model_copy(
            update={"widths": [*part.widths, widths], "seconds": [*part.seconds, now]}
        )
    return table.model_copy(update={"parts": parts})
