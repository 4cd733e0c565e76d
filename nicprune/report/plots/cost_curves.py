"""Cost over the control against FLOP reduction or steps of training: the plots of an overview.

They are made from several reports, so that they are not registered as plots of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from nicprune.report.columns import column_of
from nicprune.report.plots.figure import draw_error_bars, draw_grid, new_figure, plain, to_small_png
from nicprune.report.plots.labels import Label, place_labels
from nicprune.report.plots.look import DASHES, MARKERS
from nicprune.report.plots.theme import LIGHT, themed


@dataclass(frozen=True)
class CostCurve:
    """The points of a method.

    Attributes:
        name: name of the method.
        points: FLOP reduction or steps, cost over control in per cent, and its standard deviation
            over seeds (0 for one seed) of each arm.
    """

    name: str
    points: Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class CostAxis:
    """The horizontal axis of a plot of costs.

    Attributes:
        title: title of the axis.
        text: a value as text, for example "2.00×".
        tick: likewise, as short as possible.
        logarithmic: whether the scale is, with ticks at the points alone.
    """

    title: str
    text: Callable[[float], str]
    tick: Callable[[float], str]
    logarithmic: bool = False


REDUCTION = CostAxis(
    column_of("flop_reduction").title, lambda value: f"{value:.2f}×", lambda value: f"{value:g}×"
)
STEPS = CostAxis(
    "steps of training, logarithmic",
    lambda value: f"{value:,.0f} steps",
    lambda value: f"{value:,.0f}",
    logarithmic=True,
)


LINEAR = 1.0
"""Costs up to this, in per cent, stand on a linear scale, since they may be negative; others on a
logarithmic one, since they range over two decades.
"""

TICKS = (-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100, 200, 500)

HUES = (*LIGHT.hues[:-1], LIGHT.ink)
"""Colours of methods; the theme's last hue is close to its first."""

LEFT, RIGHT, ABOVE = 180, 0, 90
"""Preferred directions from a point to its label, in degrees."""


def cost_curves(title: str, curves: Sequence[CostCurve], axis: CostAxis = REDUCTION) -> bytes:
    """Return a PNG file of cost over control.

    Methods differ in colour, marker and dash. Each point has its cost beside it. The legend is in
    the order of the costs at the right end.
    """
    with themed(LIGHT):
        figure = new_figure(7.6, 4.6)
        axes = figure.subplots()
        axes.axhline(0, color=LIGHT.muted, linewidth=0.9, zorder=1)
        handles = [_draw_curve(axes, *numbered) for numbered in enumerate(curves)]
        axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.3)
        axes.yaxis.set_major_locator(FixedLocator(TICKS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.0f} %" if value else "0")
        if axis.logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(
                FixedLocator(sorted({p[0] for c in curves for p in c.points}))
            )
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: axis.tick(value))
        axes.margins(x=0.2, y=0.1)
        axes.set_title(plain(title))
        axes.set(xlabel=axis.title, ylabel="cost over control, lower is better")
        draw_grid(axes, LIGHT)
        order = sorted(range(len(curves)), key=lambda n: -max(curves[n].points)[1])
        if len(curves) > 1:
            figure.legend(
                handles=[handles[n] for n in order], loc="outside right center", handlelength=3.2
            )
        _label_points(axes, curves)
        return to_small_png(figure, "; ".join(_in_words(curve, axis) for curve in curves))


def _in_words(curve: CostCurve, axis: CostAxis) -> str:
    points = (f"{y:+z.1f} % at {axis.text(x)}" for x, y, _ in sorted(curve.points))
    return f"{curve.name}: {', '.join(points)}"


def _colour(n: int) -> str:
    return HUES[n % len(HUES)]


def _draw_curve(axes: Axes, n: int, curve: CostCurve) -> Any:
    """Draw the n-th curve; return its handle for the legend."""
    xs, ys, spread = zip(*sorted(curve.points), strict=True)
    if any(spread):
        draw_error_bars(axes, xs, ys, _colour(n), yerr=spread)
    (handle,) = axes.plot(
        xs,
        ys,
        color=_colour(n),
        marker=MARKERS[n % len(MARKERS)],
        linestyle=DASHES[n % len(DASHES)],
        linewidth=1.3,
        markersize=7,
        label=plain(curve.name),
    )
    return handle


def _label_points(axes: Axes, curves: Sequence[CostCurve]) -> None:
    """Write the cost of each point where its curve does not go on."""
    labels: dict[int, list[Label]] = {LEFT: [], RIGHT: [], ABOVE: []}
    for n, curve in enumerate(curves):
        points = sorted(curve.points)
        for at, (x, y, _) in enumerate(points, 1):
            side = RIGHT if at == len(points) else LEFT if at == 1 else ABOVE
            labels[side].append(Label(x, y, f"{y:+z.1f} %", _colour(n)))
    drawn = [(x, y) for curve in curves for x, y, _ in curve.points]
    for direction, texts in labels.items():
        place_labels(axes, sorted(texts, key=lambda label: -label.y), drawn, direction)
