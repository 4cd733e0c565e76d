"""How plots look: colours, markers, texts beside points, legends."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from nicprune.report.aggregate import Line
from nicprune.report.records import ROLES

DPI = 150

MARKERS = "^DvPX*<>hpd"
"""Of what was made, those of original and control apart: as many as have no divisor in common with
the number of hues.
"""

ROWS = 2
"""Rows of a legend that a figure has room for as it is."""

DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))

MAX_PANELS = 4

TURNS = ((0, 30, -30), (60, -60, 90, -90), (135, -135, 180))
"""Directions around a point in which a text is tried, in degrees from the preferred one."""

REACHES = (7, 11, 16, 24, 34)
"""Distances of a text from its point, in typographic points."""


@dataclass(frozen=True)
class Theme:
    """Colours of a plot; hues are Okabe and Ito's, which colour-blind readers can tell apart."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    hues: tuple[str, ...]


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1d2329",
    "#6b7480",
    "#e3e6ea",
    ("#0072b2", "#d55e00", "#009e73", "#a8488a", "#b07400", "#3d8fc4"),
)

DARK = Theme(
    "dark",
    "#171b20",
    "#e4e7eb",
    "#98a2ae",
    "#323942",
    ("#56b4e9", "#f0883e", "#2dbf95", "#d98fbf", "#e6b422", "#9fc9f0"),
)


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Draw in a theme's colours."""
    rc: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.usetex": False,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.muted,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.grid": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "regular",
        "legend.frameon": False,
        "legend.fontsize": 9.5,
    }
    with matplotlib.rc_context(rc), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # a label in a script the font lacks still makes a plot
        yield


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    figure = Figure(
        figsize=(width, height),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.06),
    )
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """Return text that Matplotlib draws as it is, without formulas."""
    return text.replace("$", r"\$")  # not mathematics


def look_of(line: Line, pruned: Sequence[tuple[str, str]], theme: Theme) -> dict[str, Any]:
    """Colour, marker and dash of an arm: no two arms differ by colour alone."""
    if line.role == "original":
        return {"color": theme.ink, "marker": "o", "linestyle": "-", "markerfacecolor": theme.ink}
    if line.role == "control":
        return {
            "color": theme.muted,
            "marker": "s",
            "linestyle": ":",
            "markerfacecolor": theme.background,
        }
    n = pruned.index((line.role, line.arm))
    return {
        "color": theme.hues[n % len(theme.hues)],
        "marker": MARKERS[n % len(MARKERS)],
        "linestyle": DASHES[n % len(DASHES)],
    }


def pruned_arms(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Role and arm of what was made, the pruned ones first."""
    return [
        key
        for role in ("pruned", "modulated")
        for key in dict.fromkeys((line.role, line.arm) for line in lines if line.role == role)
    ]


def quality_of(line: Line) -> str:
    """Return the quality for a label, e.g. "q3"; empty without one."""
    return "" if line.quality is None else f"q{line.quality}"


def annotate(
    axes: Axes,
    points: Sequence[tuple[float, float, str, str]],
    obstacles: Sequence[tuple[float, float]],
    first: float,
) -> None:
    """Write a text beside each point (x, y, text, colour), at the first of the places around it
    that covers neither marker nor text.

    Args:
        obstacles: every marker drawn, in data coordinates.
        first: the direction tried first, in degrees.
    """
    figure = axes.figure
    figure.canvas.draw()  # positions are known once the layout is
    to_pixels = axes.transData.transform
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in (to_pixels(p) for p in obstacles)]
    scale = figure.dpi / 72
    for x, y, text, colour in points:
        px, py = to_pixels((x, y))
        width, height = 5.2 * scale * len(text), 10 * scale
        best: tuple[float, Any] = (math.inf, None)
        for reach, turn in ((reach, turn) for near in TURNS for reach in REACHES for turn in near):
            angle = math.radians(first + turn)
            bx, by = (
                px + math.cos(angle) * (reach * scale + width / 2),
                py + math.sin(angle) * (reach * scale + height / 2),
            )
            box = (bx - width / 2, by - height / 2, bx + width / 2, by + height / 2)
            frame = axes.bbox
            outside = (
                box[2] > frame.x1 or box[0] < frame.x0 or box[3] > frame.y1 or box[1] < frame.y0
            )
            cost = sum(_common(box, other) for other in taken) + 1e6 * outside
            if cost < best[0]:
                best = (cost, (bx, by, box, reach))
            if cost == 0:
                break
        bx, by, box, reach = best[1]
        taken.append(box)
        arrow = (
            {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            if reach > 11
            else None
        )
        note = axes.annotate(
            plain(text),
            (x, y),
            ((bx - px) / scale, (by - py) / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            color=colour,
            arrowprops=arrow,
        )
        note.set_in_layout(False)


def _common(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def legend(figure: Figure, handles: dict[tuple[str, str], Any]) -> None:
    """A legend below the panels, never over data; the original first, then the control."""
    keys = sorted(handles, key=lambda key: (ROLES.index(key[0]), key[1]))
    columns = max(
        1,
        min(
            len(keys),
            int(figure.get_figwidth() / (0.75 + 0.085 * max(len(arm) for _, arm in keys))),
        ),
    )
    more = max(0, math.ceil(len(keys) / columns) - ROWS)
    figure.set_figheight(
        figure.get_figheight() + 0.21 * more
    )  # at the expense of the page, not of the panels
    figure.legend(
        [handles[key] for key in keys],
        [plain(arm) for _, arm in keys],
        loc="outside lower center",
        ncols=columns,
        handlelength=3.2,
    )
