"""Plots: looks of arms, legends, global state."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from helpers_report import record, sweep
from matplotlib.axes import Axes

from nicprune.report.aggregate import aggregate
from nicprune.report.plots.drop_against_reduction import drop_against_reduction
from nicprune.report.plots.look import look_of
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
