"""Colours and fonts of plots, for light and dark pages."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib


@dataclass(frozen=True)
class Theme:
    """Colours of a plot.

    Hues are after Okabe and Ito, "Color Universal Design", 2008: colour-blind readers can tell
    them apart.
    """

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
    """Draw in the colours of a theme; global settings are restored at the end."""
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
        # A label in a script that the font lacks still makes a plot.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield
