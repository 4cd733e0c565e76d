"""Channels of each channel group before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from nicprune.report.aggregate import Row
from nicprune.report.plots.figure import MAX_PANELS, new_figure, plain, to_png
from nicprune.report.plots.look import compared_arms, look_of, quality_name
from nicprune.report.plots.plot import PLOTS, Plot
from nicprune.report.plots.theme import LIGHT, Theme, themed

MANY_GROUPS = 40
"""Channel groups beyond which letters and bars become smaller."""


def widths(rows: Sequence[Row], theme: Theme = LIGHT) -> bytes | None:
    """Draw the channels of each group before and after, as bars; a panel for each codec.

    Where there are too many codecs, each arm is shown at its highest quality.
    """
    shown = rows_with_widths(rows)
    if not shown:
        return None
    groups = _groups(shown)
    several = len({row.setup for row in shown}) > 1
    small = len(groups) > MANY_GROUPS
    with themed(theme):
        figure = new_figure(
            1.6 + 2.9 * len(shown) if len(shown) > 1 else 6.0,
            1.0 + (0.17 if small else 0.27) * len(groups),
        )
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        arms = compared_arms(rows)
        for row, axes in zip(shown, panels, strict=True):
            found = _unpruned(row, shown) | row.members[0].widths
            pairs = [found.get(name, (0, 0)) for name in groups]
            _draw_bars(axes, pairs, look_of(row, arms, theme)["color"], small, theme)
            name = " ".join((row.arm, quality_name(row))) if row.role == "pruned" else row.arm
            title = "\n".join(filter(None, (row.setup.codec if several else "", name)))
            axes.set_title(plain(title))
        figure.supxlabel(
            "channels per group (wide bar: before, narrow bar: after)", fontsize=10, color=theme.ink
        )
        panels[0].set_yticks(range(len(groups)), [plain(name) for name in groups])
        panels[0].set_ylim(len(groups) - 0.4, -0.6)
        return to_png(figure)


def rows_with_widths(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that are drawn; one codec for all rates is drawn once."""
    having = [row for row in rows if row.role == "pruned" and row.members[0].widths]
    having += {
        (row.setup, row.arm): row
        for row in rows
        if row.role == "modulated" and row.members[0].widths and not row.between()
    }.values()
    if len(having) <= MAX_PANELS:
        return having
    highest: dict[Any, Row] = {}
    for row in having:  # in the order of their qualities
        highest[(row.setup, row.arm)] = row
    return list(highest.values())[:MAX_PANELS]


def _groups(shown: Sequence[Row]) -> list[str]:
    """Return the channel groups of all rows; one that a row lacks keeps its place among others."""
    groups: list[str] = []
    for row in shown:
        names = row.members[0].widths
        at = 0 if any(name in groups for name in names) else len(groups)
        for name in names:
            if name not in groups:
                groups.insert(at, name)
            at = groups.index(name) + 1
    return groups


def _unpruned(row: Row, shown: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Return the groups of the row's architecture at full width: those it lacks were not pruned."""
    cost = row.members[0].original_cost
    return {
        name: (before, before)
        for other in shown
        if other.setup == row.setup and other.members[0].original_cost == cost
        for name, (before, _) in other.members[0].widths.items()
    }


def _draw_bars(
    axes: Axes,
    pairs: Sequence[tuple[float, float]],
    colour: str,
    small: bool,
    theme: Theme,
) -> None:
    places = list(range(len(pairs)))
    axes.barh(places, [before for before, _ in pairs], height=0.78, color=theme.grid)
    axes.barh(places, [after for _, after in pairs], height=0.44, color=colour)
    most = max(before for before, _ in pairs)
    for place, (before, after) in zip(places, pairs, strict=True):
        if before:
            axes.text(
                before + 0.02 * most,
                place,
                f"{after:g} of {before:g}",
                va="center",
                fontsize=6 if small else 8,
                color=theme.muted if after == before else theme.ink,
            )
    axes.set_xlim(0, 1.32 * most)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.tick_params(axis="y", length=0, labelsize=6 if small else 9)
    axes.spines["left"].set_visible(False)


def _caption(rows: Sequence[Row]) -> str:
    # One codec for all rates has the same widths at each.
    made = {
        (row.setup, row.role, row.arm, row.quality if row.role == "pruned" else None)
        for row in rows
        if row.role == "pruned" or (row.role == "modulated" and row.members[0].widths)
    }
    shown = len(rows_with_widths(rows))
    caption = "Channels of each channel group before and after."
    if shown < len(made):
        caption += f" Shown: {shown} of {len(made)} pruned codecs, each arm at its highest quality."
    return caption


PLOTS.register("widths")(
    Plot(
        file="widths.png",
        draw=widths,
        heading="Widths",
        alt="Channels per group before and after",
        caption=_caption,
        place=4,
    )
)
