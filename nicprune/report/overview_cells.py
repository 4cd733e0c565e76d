"""The cells of an overview: figures of one arm over all qualities, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tabulate import tabulate

from nicprune.report.aggregate import Row
from nicprune.report.overview_config import OverviewRow
from nicprune.report.overview_figures import Values, bd_rate, cost_over_control, gap_closed
from nicprune.report.overview_reports import Arm


def headers(qualities: Sequence[int]) -> list[str]:
    """Return the headers of a table."""
    return [
        "",
        "FLOP reduction",
        *(f"q{quality}" for quality in qualities),
        "cost over control",
        "gap closed",
        "BD-rate",
        "published",
    ]


def cells(row: OverviewRow, arm: Arm | None, qualities: Sequence[int], show: str) -> list[str]:
    """Return the cells of one row below `headers(qualities)`.

    Args:
        row: the row in overview.yaml.
        arm: the arm; None if it has not been run.
        show: figures of each quality; see `OverviewSection`.
    """
    name = plain(row.name or row.arm)
    if arm is None:
        return [name, "not run", *([""] * (len(qualities) + 3)), plain(row.published)]
    by_quality = {row.quality: row for row in arm.rows}
    unpruned = arm.rows[0].role in ("original", "control")

    def at_quality(row: Row) -> str:
        if show == "cost":
            return _one(cost_over_control(replace(arm, rows=[row])), "+z.1f")
        return point(row) if show == "point" else _drop(row)

    return [
        name,
        "" if unpruned else _range([row.mean["flop_reduction"] for row in arm.rows]),
        *(at_quality(by_quality[q]) if q in by_quality else "" for q in qualities),
        "" if unpruned and show != "cost" else _one(cost_over_control(arm), "+z.1f"),
        _gap_closed(arm),
        _bd_rate(arm),
        plain(row.published),
    ]


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[str] = ("", "published")
) -> str:
    """Return a Markdown table without the columns that are empty.

    Args:
        text: columns of text, which start at the left; numbers end at the right.
    """
    keep = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    return tabulate(
        [[row[n] for n in keep] for row in rows],
        [columns[n] for n in keep],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left" if columns[n] in text else "right" for n in keep],
    )


def plain(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _range(values: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return f"{low}×" if low == high else f"{low}–{high}×"


def _drop(row: Row) -> str:
    return f"{row.show('psnr_drop_db', 'z.2f')} dB, {row.show('bpp_change_pct', '+.1f')} %"


def point(row: Row) -> str:
    """Return PSNR and bpp."""
    return f"{row.show('psnr_db', '.2f')} dB, {row.show('bpp', '.3f')}"


def _one(values: Values, form: str) -> str:
    """Return the value of an arm in per cent; empty if there is none."""
    return values[0].text(form, " %") if values else ""


def _gap_closed(arm: Arm) -> str:
    """Return the closed fraction of the gap; "none" for a codec worse than from scratch."""
    closed = gap_closed(arm)
    return "none" if closed and closed[0].mean <= 0 else _one(closed, ".0f")


def _bd_rate(arm: Arm) -> str:
    """Return the BD-rate against the original, then against the control."""
    both = (bd_rate(arm, against) for against in ("original", "control"))
    return ", ".join(_one(values, "+.1f") for values in both if values)
