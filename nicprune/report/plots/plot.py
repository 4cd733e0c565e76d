"""The interface of a plot, and the registry of all plots.

A new plot is a file in this folder that registers a `Plot`. Page and folder of a report have it
wherever it has something to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nicprune.common.registry import Registry
from nicprune.report.aggregate import Row


@dataclass(frozen=True)
class Plot:
    """A plot of the rows of a report.

    Attributes:
        file: file name in the report's folder.
        draw: function of rows and a theme; returns a PNG file, or None with nothing to show.
        alt: alternative text.
        caption: function of the rows; returns the text below the plot.
        place: position on the page; the smallest comes first.
        heading: heading on the page; none if empty.
    """

    file: str
    draw: Callable[..., bytes | None]
    alt: str
    caption: Callable[[Sequence[Row]], str]
    place: float
    heading: str = ""


PLOTS: Registry[Any] = Registry("plot")
"""Every plot, by name."""


def plots_in_order() -> list[Plot]:
    """Return every plot, in the order of the page."""
    return sorted((PLOTS[name] for name in PLOTS), key=lambda plot: (plot.place, plot.file))
