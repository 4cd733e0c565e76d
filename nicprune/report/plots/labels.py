"""Labels beside the points of a plot, placed clear of markers and of each other.

adjustText was tried in place of this search: it moves labels onto markers and error bars where
points are dense, and takes two to five times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from nicprune.report.plots.figure import plain

TURNS = ((0, 30, -30), (60, -60, 90, -90), (135, -135, 180))
"""Directions around a point, in degrees from the preferred one; nearer groups are tried first."""

DISTANCES = (7, 11, 16, 24, 34)
"""Distances of a label from its point, in typographic points."""

LINE_FROM = 11
"""Distance beyond which a line joins label and point, in typographic points."""

MARKER = 6
"""Half the side of the square around a marker that labels keep clear of, in pixels."""

OUTSIDE = 1e6
"""Cost of a label that leaves the panel, in square pixels of overlap."""


class Label(NamedTuple):
    """A label of a point, in data coordinates."""

    x: float
    y: float
    text: str
    colour: str


class _Box(NamedTuple):
    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: _Box) -> float:
        """Return the area of the intersection."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)


class _Place(NamedTuple):
    """A place for a label: distance from its point (typographic points), and pixels."""

    distance: float
    x: float
    y: float
    box: _Box


def place_labels(
    axes: Axes,
    labels: Sequence[Label],
    obstacles: Sequence[tuple[float, float]],
    direction: float,
) -> None:
    """Write each label at the first place around its point that is free.

    Where none is free, the place with the least overlap is taken. Call this after all that changes
    the limits of the axes or the size of the figure.

    Args:
        obstacles: every marker of the panel, in data coordinates.
        direction: preferred direction from a point to its label, in degrees.
    """
    figure = axes.figure
    figure.canvas.draw()  # positions are known once the layout is
    scale = figure.dpi / 72
    taken = [
        _Box(x - MARKER, y - MARKER, x + MARKER, y + MARKER)
        for x, y in map(axes.transData.transform, obstacles)
    ]
    for label in labels:
        x, y = axes.transData.transform((label.x, label.y))
        place = _best(_places(x, y, label.text, direction, scale), axes, taken)
        taken.append(place.box)
        line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 0}
        note = axes.annotate(
            plain(label.text),
            (label.x, label.y),
            ((place.x - x) / scale, (place.y - y) / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            color=label.colour,
            arrowprops={**line, "shrinkB": 3} if place.distance > LINE_FROM else None,
            # Lines to other labels end beside the letters.
            path_effects=[
                withStroke(linewidth=2.5, foreground=matplotlib.rcParams["axes.facecolor"])
            ],
            zorder=4,
        )
        note.set_in_layout(False)


def _places(x: float, y: float, text: str, direction: float, scale: float) -> list[_Place]:
    """Return the places around a point, in the order in which they are tried."""
    width, height = 5.2 * scale * len(text), 10 * scale
    places = []
    for near in TURNS:
        for distance in DISTANCES:
            for turn in near:
                angle = math.radians(direction + turn)
                at_x = x + math.cos(angle) * (distance * scale + width / 2)
                at_y = y + math.sin(angle) * (distance * scale + height / 2)
                box = _Box(at_x - width / 2, at_y - height / 2, at_x + width / 2, at_y + height / 2)
                places.append(_Place(distance, at_x, at_y, box))
    return places


def _best(places: Sequence[_Place], axes: Axes, taken: Sequence[_Box]) -> _Place:
    """Return the first free place, or the one with the least overlap."""
    frame = _Box(*axes.bbox.extents)
    best, least = places[0], math.inf
    for place in places:
        box = place.box
        outside = (
            box.right > frame.right
            or box.left < frame.left
            or box.top > frame.top
            or box.bottom < frame.bottom
        )
        cost = sum(box.overlap(other) for other in taken) + OUTSIDE * outside
        if cost < least:
            best, least = place, cost
        if cost == 0:
            break
    return best
