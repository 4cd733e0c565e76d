"""Times of the transforms of several codecs, from `nicprune time`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from nicprune.evaluation.times import REST, Times
from nicprune.report.plots.figure import new_figure, plain, to_png
from nicprune.report.plots.theme import LIGHT, themed

SIDES = ("encode", "decode")
HATCHES = ("", "///", "...")
PROPORTIONAL = "if proportional to MACs"
LEGEND_COLUMNS = 8
VISIBLE = 0.005
"""Fraction of the longest bar below which a part is left out of the legend."""


def transform_times(times: Sequence[Times]) -> bytes:
    """Draw seconds of encoding and decoding by part; a bar for each codec.

    A mark shows where each bar would end if its time were proportional to its MACs.

    Args:
        times: the first is the reference of the marks.

    Returns the PNG file.
    """
    found = dict.fromkeys(part for one in times for side in SIDES for part in getattr(one, side))
    parts = [part for part in found if part != REST] + [REST]
    with themed(LIGHT):
        height = 1.3 + 0.34 * len(times) + 0.2 * ((len(parts) + 1) // LEGEND_COLUMNS)
        figure = new_figure(10.4, height)
        for axes, side in zip(figure.subplots(1, 2, sharey=True), SIDES, strict=True):
            _draw_side(axes, times, side, parts)
        axes.set_yticks(range(len(times)), [plain(one.name) for one in times])
        axes.invert_yaxis()
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        longest = max(getattr(one, f"{side}_s") for one in times for side in SIDES)
        most = {
            part: max(getattr(one, side).get(part, 0.0) for one in times for side in SIDES)
            for part in parts
        }
        named = [part for part in parts if most[part] > VISIBLE * longest] + [PROPORTIONAL]
        figure.legend(
            [handles[label] for label in named],
            named,
            loc="outside lower center",
            ncols=min(len(named), LEGEND_COLUMNS),
        )
        return to_png(figure)


def _draw_side(axes: Axes, times: Sequence[Times], side: str, parts: Sequence[str]) -> None:
    places = list(range(len(times)))
    left = [0.0] * len(times)
    for number, part in enumerate(parts):
        seconds = [getattr(one, side).get(part, 0.0) for one in times]
        if any(seconds):
            axes.barh(
                places,
                seconds,
                left=left,
                height=0.66,
                edgecolor=LIGHT.background,
                linewidth=0,
                label=part,
                color=LIGHT.muted if part == REST else LIGHT.hues[number % len(LIGHT.hues)],
                hatch="" if part == REST else HATCHES[number // len(LIGHT.hues) % len(HATCHES)],
            )
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    first, macs = times[0], f"{side}r"
    proportional = [
        getattr(first, f"{side}_s") * getattr(one.cost, macs) / getattr(first.cost, macs)
        for one in times
    ]
    axes.plot(
        proportional,
        places,
        linestyle="",
        marker="|",
        markersize=17,
        markeredgewidth=2,
        color=LIGHT.ink,
        label=PROPORTIONAL,
    )
    axes.set_title(f"{side}, seconds")
    axes.set_xlim(left=0)
