"""Plots: looks of arms, legends, global state."""

from __future__ import annotations

import io
import itertools
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from helpers_report import record, sweep
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nicprune.report.aggregate import aggregate
from nicprune.report.plots.drop_against_reduction import drop_against_reduction
from nicprune.report.plots.look import look_of
from nicprune.report.plots.plot import PLOTS
from nicprune.report.plots.rd_curves import rd_curves, with_gaps
from nicprune.report.plots.theme import LIGHT


def test_many_arms_are_told_apart_and_leave_the_panels_their_room() -> None:
    def drawn(count: int) -> tuple[list[Any], int, int]:
        ready = aggregate(
            [
                record("original"),
                *(record("pruned", drop=0.1 * n, label=f"arm {n:02}") for n in range(count)),
            ]
        )
        made = [("pruned", line.arm) for line in ready if line.role == "pruned"]
        looks = [look_of(line, made, LIGHT) for line in ready]
        whole, above = (
            matplotlib.image.imread(io.BytesIO(draw(ready) or b""))
            for draw in (rd_curves, drop_against_reduction)
        )
        return [(look["color"], look["marker"]) for look in looks], whole.shape[0], above.shape[0]

    few, low, low_drop = drawn(2)
    many, high, high_drop = drawn(40)
    assert len(set(many)) == 41 and len(set(few)) == 3
    assert high > low + 100 and high_drop > low_drop + 100, "a longer legend makes a higher figure"


def figures_of(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn from now on."""
    figures: list[Figure] = []
    own = Figure.savefig

    def noted(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        own(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noted)
    return figures


def overlapping(figure: Figure) -> list[str]:
    """Labels of ticks that reach into the next one."""
    found = []
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        shown = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
        boxes = [(t.label1.get_text(), t.label1.get_window_extent()) for t in shown]
        found += [a for (a, one), (_, other) in itertools.pairwise(boxes) if one.overlaps(other)]
    return found


@pytest.mark.parametrize("span", [1e-3, 0.02, 0.5])
def test_labels_of_ticks_stand_apart(span: float, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = figures_of(monkeypatch)
    rows = aggregate(
        [record("original"), *(record("pruned", drop=0.1 * n, label=f"{n}") for n in range(1, 5))]
    )
    for n, row in enumerate(rows):
        row.mean["bpp"] = 0.38 + span * n / 5
    for draw in (rd_curves, drop_against_reduction):
        assert draw(rows) is not None
    assert [overlapping(figure) for figure in figures] == [[], []]


@pytest.mark.parametrize(("worst", "told"), [(0.5, False), (4.4, True)])
def test_a_failed_arm_leaves_the_others_apart(
    worst: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drops = (-0.3, 0.02, 0.1, 0.2, 0.3, worst)
    arms = [record("pruned", drop=drop, label=str(drop)) for drop in drops]
    rows, figures = aggregate([record("original"), *arms]), figures_of(monkeypatch)
    assert drop_against_reduction(rows) is not None
    (axes,) = figures[0].axes
    places = [axes.transData.transform((1.0, drop))[1] for drop in drops]
    share = (places[4] - places[1]) / (places[-1] - places[0])
    assert share > 0.2, "what lies close together takes a fifth of the height"
    assert ("logarithmic" in PLOTS["drop_vs_reduction"].caption(rows)) == told
    assert "-" not in "".join(text.get_text() for text in axes.get_yticklabels())  # nor -0
    assert axes.get_ylim()[0] < -0.3 and axes.get_ylim()[1] > worst and not overlapping(figures[0])


def test_plots_leave_global_state_alone_and_take_any_label() -> None:
    before = dict(matplotlib.rcParams)
    drawn = rd_curves(aggregate(sweep(label="$\\frac{$ 漢字 _x_")))
    assert drawn is not None and np.frombuffer(drawn[16:24], ">u4").min() > 400
    assert dict(matplotlib.rcParams) == before


def test_a_curve_has_a_gap_where_others_were_measured() -> None:
    points = [(0.1, 27.0), (0.3, 30.0), (0.5, 32.0)]
    gap = [point for point in with_gaps(points[::2], [1, 4], {1, 3, 4}) if point not in points]
    assert len(gap) == 1 and all(np.isnan(gap[0]))
    assert with_gaps(points[::-2], [4, 1], {1, 3, 4})[::2] == points[::-2], "in either direction"
    for qualities, measured in (
        ([1, 3, 4], {1, 3, 4}),
        ([2, 2, 2], {1, 2, 3}),
        ([1, None, 4], {1}),
    ):
        assert with_gaps(points, qualities, measured) == points
    assert with_gaps(points[:1], [3], {1, 3, 4}) == points[:1]


def test_codecs_that_cost_more_than_before_are_in_the_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[float, float]] = []
    own = Axes.set_xlim

    def noted(axes: Axes, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 2:
            limits.append((args[0], args[1]))
        return own(axes, *args, **kwargs)

    monkeypatch.setattr(Axes, "set_xlim", noted)
    lines = aggregate([record("original"), record("pruned", drop=0.1, label="grown")])
    for line in lines:
        if line.role == "pruned":
            line.mean["flop_reduction"] = 0.4
    assert drop_against_reduction(lines) is not None
    assert limits and all(low < 0.4 and high > 1 for low, high in limits)
