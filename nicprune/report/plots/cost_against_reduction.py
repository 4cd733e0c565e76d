"""Cost over the control against FLOP reduction, a curve for each method: the plot of an overview.

It is made from several reports, so that it is not registered as a plot of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nicprune.report.plots.figure import (
    draw_error_bars,
    draw_grid,
    new_figure,
    plain,
    to_png,
)
from nicprune.report.plots.look import DASHES, MARKERS
from nicprune.report.plots.theme import LIGHT, themed


@dataclass(frozen=True)
class MethodCurve:
    """The points of a method.

    Attributes:
        name: name of the method.
        points: FLOP reduction, cost over control in per cent, and its standard deviation over
            seeds (0 for one seed) of each arm.
    """

    name: str
    points: Sequence[tuple[float, float, float]]

    def __str__(self) -> str:
        """Return the points as text."""
        points = ", ".join(f"{y:+z.1f} % at {x:.2f}×" for x, y, _ in sorted(self.points))
        return f"{self.name}: {points}"


def cost_against_reduction(title: str, curves: Sequence[MethodCurve]) -> bytes:
    """Return a PNG file of cost over control against FLOP reduction.

    Methods differ in colour, marker and dash. The legend stands in the order of the costs at the
    right end.
    """
    theme = LIGHT
    with themed(theme):
        figure = new_figure(7.6, 4.4)
        axes = figure.subplots()
        handles = {}
        for n, curve in enumerate(curves):
            xs, ys, spread = zip(*sorted(curve.points), strict=True)
            colour = theme.hues[n % len(theme.hues)]
            if any(spread):
                draw_error_bars(axes, xs, ys, colour, yerr=spread)
            (handles[curve],) = axes.plot(
                xs,
                ys,
                color=colour,
                marker=MARKERS[n % len(MARKERS)],
                linestyle=DASHES[n % len(DASHES)],
                linewidth=1.3,
                markersize=7,
            )
        axes.axhline(0, color=theme.muted, linewidth=0.9, zorder=1)
        axes.set_title(plain(title))
        axes.set(xlabel="FLOP reduction", ylabel="cost over control, lower is better")
        draw_grid(axes, theme)
        ordered = sorted(curves, key=lambda curve: -max(curve.points)[1])
        figure.legend(
            [handles[curve] for curve in ordered],
            [plain(curve.name) for curve in ordered],
            loc="outside right center",
            handlelength=3.2,
        )
        return to_png(figure, description="; ".join(map(str, curves)))
