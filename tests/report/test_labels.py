"""Labels of a plot stay in the panel, and clear of markers and of each other."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from nicprune.report.plots.figure import new_figure
from nicprune.report.plots.labels import MARKER, Label, place_labels


def placed(points: list[tuple[float, float]], text: str) -> tuple[Axes, list[Annotation]]:
    """A panel with labelled points."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o")
    axes.margins(0.1)
    place_labels(axes, [Label(*point, text, "#000000") for point in points], points, 0)
    figure.canvas.draw()
    return axes, [note for note in axes.texts if isinstance(note, Annotation)]


def boxes(axes: Axes, notes: list[Annotation]) -> list[Bbox]:
    """Where the letters are, in pixels, without the lines to the points."""
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[union-attr]
    return [Text.get_window_extent(note, renderer) for note in notes]


@pytest.mark.parametrize(
    "points",
    [
        [(1, 1), (2, 3), (3, 2)],
        [(0, 0), (1, 1)],
        [(n, 0) for n in range(8)],
        [(0, n) for n in range(8)],
        [(0, 0), (0.05, 0.02), (1, 1)],
        [(2, 2), (2, 2), (2, 2.02), (1, 0), (4, 4)],
    ],
    ids=["apart", "corners", "row", "column", "close", "coincident"],
)
def test_labels_cover_neither_markers_nor_each_other(points: list[tuple[float, float]]) -> None:
    axes, notes = placed(points, "q3")
    assert len(notes) == len(points)
    found = boxes(axes, notes)
    markers = [
        Bbox.from_extents(x - MARKER, y - MARKER, x + MARKER, y + MARKER)
        for x, y in map(axes.transData.transform, points)
    ]
    for box in found:
        assert axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
        assert not any(box.overlaps(marker) for marker in markers)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(found, 2))


def test_a_label_far_from_its_point_has_a_line_to_it() -> None:
    _, near = placed([(1, 1), (2, 3), (3, 2)], "q3")
    assert not any(note.arrow_patch for note in near)
    _, crowded = placed([(1, 1)] * 9 + [(0, 0), (2, 2)], "q3")
    assert any(note.arrow_patch for note in crowded)
