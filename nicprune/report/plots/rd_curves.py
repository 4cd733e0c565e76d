"""Rate-distortion curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

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

ABOVE = 110
"""Preferred direction of a label, in degrees: above a rising curve."""

Panel = tuple[str, str, Callable[[float], float]]
"""Column, label of the axis, and scale of the values."""


def rd_curves(rows: Sequence[Row], theme: Theme = LIGHT) -> bytes | None:
    """Draw PSNR, and MS-SSIM where every codec has it, over bpp; a row of panels for each setup."""
    groups = by_setup(
        [
            row
            for row in rows
            if math.isfinite(row.mean["psnr_db"]) and math.isfinite(row.mean["bpp"])
        ]
    )
    if not groups:
        return None
    panels = _panels(groups.values())
    with themed(theme):
        width = 7.0 if len(panels) == 1 else 5.2 * len(panels)
        figure = new_figure(width, 0.6 + 3.9 * len(groups))
        grid = figure.subplots(len(groups), len(panels), squeeze=False)
        handles: dict[tuple[str, str], Any] = {}
        arms = compared_arms(rows)
        labels = []
        for (setup, group), panel_row in zip(groups.items(), grid, strict=True):
            if len(groups) > 1:
                panel_row[0].set_title(plain(str(setup)))
            for axes, panel in zip(panel_row, panels, strict=True):
                labels.append((axes, *_draw_panel(axes, panel, group, arms, theme, handles)))
        draw_legend(figure, handles)
        for axes, texts, obstacles in labels:
            place_labels(axes, texts, obstacles, ABOVE)
        return to_png(figure)


def _panels(groups: Any) -> list[Panel]:
    panels: list[Panel] = [("psnr_db", column_of("psnr_db").axis, lambda v: v)]
    if all(0 < row.mean["ms_ssim"] < 1 for group in groups for row in group):
        title = column_of("ms_ssim").title
        panels.append(
            ("ms_ssim", f"−10·log₁₀(1 − {title}) (dB)", lambda v: -10 * math.log10(1 - v))
        )
    return panels


def _draw_panel(
    axes: Axes,
    panel: Panel,
    group: Sequence[Row],
    arms: Sequence[tuple[str, str]],
    theme: Theme,
    handles: dict[tuple[str, str], Any],
) -> tuple[list[Label], list[tuple[float, float]]]:
    """Draw the curves of one setup; return labels, and points that they keep clear of."""
    name, axis, scale = panel
    labels: list[Label] = []
    obstacles: list[tuple[float, float]] = []
    curves = curves_of(group)
    measured = {row.quality for row in group}
    labelled = "original" if any(role == "original" for role, _ in curves) else None
    for (role, arm), members in reversed(curves.items()):  # the original lies on top
        one = role == "modulated"  # one curve through all rates
        members = sorted(members, key=lambda row: row.mean["bpp"]) if one else members
        points = [(row.mean["bpp"], scale(row.mean[name])) for row in members]
        xs, ys = zip(*points, strict=True)
        look = look_of(members[0], arms, theme)
        spread = [row.spread.get(name, 0.0) for row in members]
        if name == "psnr_db" and any(spread):
            draw_error_bars(axes, xs, ys, look["color"], yerr=spread)
        line = points if one else with_gaps(points, [row.quality for row in members], measured)
        (handle,) = axes.plot(
            *zip(*line, strict=True), linewidth=1.5, markersize=3.5 if one else 6, **look
        )
        handles.setdefault((role, arm), handle)
        obstacles += points
        if labelled in (role, None):
            labels += [
                Label(*point, quality_name(row), theme.muted)
                for point, row in zip(points, members, strict=True)
                if quality_name(row)
            ]
    axes.set(xlabel=column_of("bpp").axis, ylabel=axis)
    axes.margins(0.09, 0.12)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    draw_grid(axes, theme)
    return labels, obstacles


def with_gaps(
    points: Sequence[tuple[float, float]],
    qualities: Sequence[int | None],
    measured: Collection[int | None],
) -> list[tuple[float, float]]:
    """Return the points of a curve with a gap wherever another curve has a quality between two: a
    straight line across it would look like a measurement.
    """
    found = list(points[:1])
    for point, *around in zip(points[1:], qualities, qualities[1:], strict=False):
        ends = [quality for quality in around if quality is not None]
        if any(q is not None and min(ends) < q < max(ends) for q in measured if ends):
            found.append((math.nan, math.nan))
        found.append(point)
    return found


PLOTS.register("rd")(
    Plot(
        file="rd.png",
        draw=rd_curves,
        alt="Rate-distortion curves of the original, control and pruned codecs",
        caption=lambda rows: (
            "Rate and distortion, mean over images; q marks the quality levels of the original."
            " Up and to the left is better."
        ),
        place=1,
    )
)
