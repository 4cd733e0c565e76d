"""PSNR drop against FLOP reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from nicprune.report.aggregate import Row, by_setup
from nicprune.report.columns import column_of
from nicprune.report.plots.figure import (
    draw_error_bars,
    draw_grid,
    draw_legend,
    new_figure,
    plain,
    to_png,
)
from nicprune.report.plots.labels import Label, place_labels
from nicprune.report.plots.look import compared_arms, curves_of, look_of, quality_name
from nicprune.report.plots.plot import PLOTS, Plot
from nicprune.report.plots.theme import LIGHT, Theme, themed

MAX_RATE_LABELS = 14
"""Most points of a panel that can all have the change of bpp beside them."""

FAR = 5
"""A drop so many times that of most others gets a scale on which these can still be told apart."""

RIGHT = 0
"""Preferred direction of a label, in degrees."""


def drop_against_reduction(rows: Sequence[Row], theme: Theme = LIGHT) -> bytes | None:
    """Draw PSNR drop over FLOP reduction of pruned codecs and controls; a panel for each setup.

    The change of bpp stands beside each point where there is room. With gates, a bar goes from
    the image with the smallest reduction to the image with the largest.
    """
    shown = _shown(rows)
    if not any(
        row.role == "pruned" or (row.role == "modulated" and row.mean["flop_reduction"] > 1.005)
        for row in shown
    ):
        return None
    groups = by_setup(shown)
    with themed(theme):
        figure = new_figure(7.6, 0.6 + 3.9 * len(groups))
        panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
        handles: dict[tuple[str, str], Any] = {}
        arms = compared_arms(rows)
        labels = []
        for (setup, group), axes in zip(groups.items(), panels, strict=True):
            if len(groups) > 1:
                axes.set_title(plain(str(setup)))
            labels.append((axes, *_draw_panel(axes, group, arms, theme, handles)))
        draw_legend(figure, handles)
        for axes, texts, obstacles in labels:
            texts.sort(key=lambda label: -label.y)
            place_labels(axes, texts, obstacles, RIGHT)
        return to_png(figure)


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have a point."""
    return [
        row
        for row in rows
        if row.role != "original"
        and math.isfinite(row.mean["psnr_drop_db"])
        and math.isfinite(row.mean["flop_reduction"])
    ]


def _draw_panel(
    axes: Axes,
    group: Sequence[Row],
    arms: Sequence[tuple[str, str]],
    theme: Theme,
    handles: dict[tuple[str, str], Any],
) -> tuple[list[Label], list[tuple[float, float]]]:
    """Draw the points of one setup; return labels, and points that they keep clear of."""
    labels: list[Label] = []
    obstacles = [(1.0, 0.0)]
    for (role, arm), members in reversed(curves_of(group).items()):
        look = look_of(members[0], arms, theme) | {"linestyle": "none"}
        colour = look["color"]
        points = [(row.mean["flop_reduction"], row.mean["psnr_drop_db"]) for row in members]
        xs, ys = zip(*points, strict=True)
        spread = [row.spread.get("psnr_drop_db", 0.0) for row in members]
        if any(spread):
            draw_error_bars(axes, xs, ys, colour, yerr=spread)
        for row, (x, y) in zip(members, points, strict=True):
            if reach := row.reductions():
                low, high = reach
                draw_error_bars(axes, x, y, colour, xerr=[[max(x - low, 0)], [max(high - x, 0)]])
                obstacles += [(low + (high - low) * part / 12, y) for part in range(13)]
        (handle,) = axes.plot(xs, ys, markersize=7, zorder=3, **look)
        handles.setdefault((role, arm), handle)
        obstacles += points
        labels += [
            Label(*point, text, colour)
            for row, point in zip(members, points, strict=True)
            if (text := _label(row, members, group))
        ]
    axes.axhline(0, color=theme.muted, linewidth=0.9, zorder=1)
    (handles["original", "original"],) = axes.plot(
        [1], [0], "o", color=theme.ink, markersize=7, zorder=3
    )
    reached = [1, *(n for r in group for n in (r.mean["flop_reduction"], *(r.reductions() or ())))]
    least, top = min(reached), max(reached)  # an adaptation, or a search, costs more than before
    span = max(top - least, 0.25)
    axes.set_xlim(least - 0.12 * span, top + 0.35 * span)
    axes.margins(y=0.16)
    if (linear := _linear_part(group)) is not None:
        _show_far_drops(axes, linear)
    axes.set(
        xlabel=column_of("flop_reduction").axis,
        ylabel=f"{column_of('psnr_drop_db').axis}, lower is better",
    )
    draw_grid(axes, theme)
    return labels, obstacles


def _linear_part(group: Sequence[Row]) -> float | None:
    """Return up to which drop, in dB, the scale is linear; None where it is throughout, no drop
    being far above most.
    """
    sizes = sorted(abs(row.mean["psnr_drop_db"]) for row in group)
    usual = sizes[3 * (len(sizes) - 1) // 4]
    if not usual or sizes[-1] <= FAR * usual:
        return None
    decade = 10.0 ** math.floor(math.log10(usual))
    return next(n * decade for n in (1, 2, 5, 10) if n * decade >= usual)


def _show_far_drops(axes: Axes, linear: float) -> None:
    """Make the scale logarithmic above `linear`."""
    axes.set_yscale("symlog", linthresh=linear, linscale=1.0)
    beyond = [n * 10.0**power for power in range(-4, 3) for n in (1, 2, 5)]
    ticks = [0.0, linear / 2, linear, *(tick for tick in beyond if tick > 1.01 * linear)]
    axes.yaxis.set_major_locator(FixedLocator([*(-tick for tick in ticks), *ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:zg}".replace("-", "−"))


def _label(row: Row, members: Sequence[Row], group: Sequence[Row]) -> str:
    """Return quality and change of bpp, as far as there is room for them; empty for no label."""
    crowded = len(group) > MAX_RATE_LABELS
    if row.role == "control":  # all close to (1, 0); the table has their figures
        return ""
    # One codec for all rates has about the same reduction at each: label both ends of its points.
    if row.role == "modulated" and crowded and row not in (members[0], members[-1]):
        return ""
    quality = quality_name(row) if len({other.quality for other in group}) > 1 else ""
    change = row.mean["bpp_change_pct"]
    rate = "" if crowded or not math.isfinite(change) else f"{change:+.1f} % bpp"
    return ", ".join(filter(None, (quality, rate)))


def _caption(rows: Sequence[Row]) -> str:
    caption = (
        "PSNR drop of each codec for its FLOP reduction. The change of bpp stands beside each point"
        " where there is room: at fewer bits, the same drop is a smaller loss."
    )
    if any(_linear_part(group) is not None for group in by_setup(_shown(rows)).values()):
        caption += " The scale is logarithmic above most drops, since some are far larger."
    if any(row.show_reductions() for row in rows):
        caption += " With gates, the bar goes from the image that costs most to the cheapest."
    return caption


PLOTS.register("drop_vs_reduction")(
    Plot(
        file="drop_vs_reduction.png",
        draw=drop_against_reduction,
        alt="PSNR drop over FLOP reduction",
        caption=_caption,
        place=2,
    )
)
