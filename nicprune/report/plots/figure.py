"""Figures, their panels and legends, and their PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image, PngImagePlugin

from nicprune.report.plots.theme import Theme
from nicprune.report.record import ROLES

DPI = 150

COLOURS = 128
"""Colours of a small PNG file."""

MAX_PANELS = 4
"""Panels of a plot that has one for each codec."""

LEGEND_ROWS = 2
"""Rows of a legend that fit into a figure without making it higher."""


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of this size, in inches."""
    figure = Figure(
        figsize=(width, height),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.06),
    )
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """Return the PNG file of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def to_small_png(figure: Figure, description: str) -> bytes:
    """Return a PNG file of few colours, a third as large, to be kept under version control.

    Args:
        description: text to store in the file, under the PNG keyword "Description".
    """
    image = Image.open(io.BytesIO(to_png(figure))).convert("RGB").quantize(COLOURS)
    about = PngImagePlugin.PngInfo()
    about.add_itxt("Description", description)
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=about, optimize=True)
    return buffer.getvalue()


def plain(text: str) -> str:
    """Return text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def draw_grid(axes: Axes, theme: Theme) -> None:
    """Draw grid lines behind the data."""
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)


def draw_error_bars(axes: Axes, x: Any, y: Any, colour: str, **errors: Any) -> None:
    """Draw error bars without markers; `errors` are xerr or yerr of `Axes.errorbar`."""
    axes.errorbar(x, y, fmt="none", ecolor=colour, elinewidth=0.9, capsize=2.5, **errors)


def draw_legend(figure: Figure, handles: Mapping[tuple[str, str], Any]) -> None:
    """Draw a legend below the panels, and make the figure higher where it is long.

    Args:
        handles: what was drawn for each role and arm; the original comes first, then the control.
    """
    keys: Sequence[tuple[str, str]] = sorted(handles, key=lambda k: (ROLES.index(k[0]), k[1]))
    longest = max(len(arm) for _, arm in keys)
    columns = max(1, min(len(keys), int(figure.get_figwidth() / (0.75 + 0.085 * longest))))
    excess = max(0, math.ceil(len(keys) / columns) - LEGEND_ROWS)
    figure.set_figheight(figure.get_figheight() + 0.21 * excess)
    figure.legend(
        [handles[key] for key in keys],
        [plain(arm) for _, arm in keys],
        loc="outside lower center",
        ncols=columns,
        handlelength=3.2,
    )
