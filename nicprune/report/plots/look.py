"""Colours, markers and dashes of arms, and names of qualities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nicprune.report.aggregate import Row
from nicprune.report.plots.theme import Theme

MARKERS = "^DvPX*<>hpd"
"""Markers of pruned and modulated codecs. Their number and that of the hues have no common divisor,
so that many arms differ in colour or marker.
"""

DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))


def look_of(row: Row, arms: Sequence[tuple[str, str]], theme: Theme) -> dict[str, Any]:
    """Return colour, marker and dash of a row's arm; no two arms differ by colour alone.

    Args:
        arms: all arms of the report, from `compared_arms`.
    """
    if row.role == "original":
        return {"color": theme.ink, "marker": "o", "linestyle": "-", "markerfacecolor": theme.ink}
    if row.role == "control":
        return {
            "color": theme.muted,
            "marker": "s",
            "linestyle": ":",
            "markerfacecolor": theme.background,
        }
    n = arms.index((row.role, row.arm))
    return {
        "color": theme.hues[n % len(theme.hues)],
        "marker": MARKERS[n % len(MARKERS)],
        "linestyle": DASHES[n % len(DASHES)],
    }


def compared_arms(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return role and arm of every pruned codec, then of every modulated one."""
    return [
        key
        for role in ("pruned", "modulated")
        for key in dict.fromkeys((row.role, row.arm) for row in rows if row.role == role)
    ]


def curves_of(group: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of each role and arm."""
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in group:
        curves.setdefault((row.role, row.arm), []).append(row)
    return curves


def quality_name(row: Row) -> str:
    """Return the quality as a label, for example "q3"; empty between qualities."""
    return "" if row.quality is None else f"q{row.quality}"
