"""What a plot of a report is.

A new one is a file in this folder that registers a `Plot`; the page shows it, and the report's
folder holds it, wherever it has something to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nicprune.common.registry import Registry
from nicprune.report.aggregate import Line


@dataclass(frozen=True)
class Plot:
    """A plot of the lines of a report.

    Attributes:
        file: its name in the report's folder.
        draw: lines and a theme to a PNG; None where there is nothing to show.
        alt: what it shows, for those who do not see it.
        caption: the sentence below it, given the report's lines.
        place: where it stands among the others on the page, the smallest first.
        heading: its own heading on the page; none if empty.
    """

    file: str
    draw: Callable[..., bytes | None]
    alt: str
    caption: Callable[[Sequence[Line]], str]
    place: float
    heading: str = ""


PLOTS: Registry[Any] = Registry("plot")
"""Every plot, by name."""


def plots_in_order() -> list[Plot]:
    """Every plot, as they stand on the page."""
    return sorted((PLOTS[name] for name in PLOTS), key=lambda plot: (plot.place, plot.file))
