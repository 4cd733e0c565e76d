"""The cells of an overview: figures of one arm over all qualities, as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nicprune.report.aggregate import Row, aggregate
from nicprune.report.bd_rate import ENOUGH_POINTS, bd_table
from nicprune.report.matching import reference_for
from nicprune.report.overview_config import OverviewRow
from nicprune.report.rate_distortion_cost import cost
from nicprune.report.record import Record
from nicprune.report.scratch_gap import scratch_gaps


@dataclass(frozen=True)
class Chosen:
    """An arm that an overview shows.

    Attributes:
        config: its row in overview.yaml.
        rows: its rows in the report, by quality; none if it has not been run.
        records: all records of the report with the setup of these rows.
    """

    config: OverviewRow
    rows: list[Row]
    records: list[Record]


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


def cells(chosen: Chosen, qualities: Sequence[int], show: str) -> list[str]:
    """Return the cells of one row below `headers(qualities)`.

    Args:
        show: figures of each quality; see `OverviewSection`.
    """
    config, rows, records = chosen.config, chosen.rows, chosen.records
    name = _plain(config.name or config.arm)
    if not rows:
        return [name, "not run", *([""] * (len(qualities) + 3)), _plain(config.published)]
    by_quality = {row.quality: row for row in rows}
    unpruned = rows[0].role in ("original", "control")
    at_quality = {
        "drop": _drop,
        "point": _point,
        "cost": lambda row: _cost_over_control([row], records, config.control),
    }[show]
    return [
        name,
        "" if unpruned else _range([row.mean["flop_reduction"] for row in rows]),
        *(at_quality(by_quality[q]) if q in by_quality else "" for q in qualities),
        ("" if unpruned and show != "cost" else _cost_over_control(rows, records, config.control)),
        _gap_closed(rows, records),
        _bd_rate(rows, records),
        _plain(config.published),
    ]


def _plain(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _range(values: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return f"{low}×" if low == high else f"{low}–{high}×"


def _drop(row: Row) -> str:
    return f"{row.show('psnr_drop_db', 'z.2f')} dB, {row.show('bpp_change_pct', '+.1f')} %"


def _point(row: Row) -> str:
    return f"{row.show('psnr_db', '.2f')} dB, {row.show('bpp', '.3f')}"


def _cost_over_control(rows: Sequence[Row], records: Sequence[Record], named: str | None) -> str:
    """Return the mean over qualities of cost divided by the control's cost, minus 1, in per cent.

    Each record is compared with the control of its quality and seed. Empty without a control
    trained for the same number of steps.

    Args:
        named: arm that is the control in place of the report's, however long it was trained.
    """
    by_seed: dict[Any, list[float]] = {}
    for record in (record for row in rows for record in row.members):
        if named is None:
            controls = [r for r in records if r.role == "control" and r.steps == record.steps]
        else:
            controls = [
                r.model_copy(update={"role": "control"}) for r in records if r.label == named
            ]
        control = reference_for(record, controls, "control")
        # Costs at different lambdas cannot be compared: widths of a slimmable codec have others.
        if control is None or not math.isclose(control.lmbda or 0, record.lmbda or 0, rel_tol=1e-4):
            continue
        own, reference = cost(record), cost(control)
        if own is not None and reference is not None:
            by_seed.setdefault(record.seed, []).append(100 * (own / reference - 1))
    means = [statistics.fmean(values) for values in by_seed.values()]
    if not means:
        return ""
    spread = f" ±{statistics.stdev(means):.1f}" if len(means) > 1 else ""
    return f"{statistics.fmean(means):+z.1f}{spread} %"


def _gap_closed(rows: Sequence[Row], records: Sequence[Record]) -> str:
    """Return the closed fraction of the gap to the same codec from scratch, mean over qualities.

    Of several codecs from scratch, those trained longest count. "none" where the codec is worse
    than from scratch; empty where there is none from scratch.
    """
    found = [
        gap
        for gap in scratch_gaps(aggregate(records))
        if gap.arm == rows[0].arm and gap.closed() is not None
    ]
    longest = max((gap.steps for gap in found), default=0)
    closed = [c for gap in found if gap.steps == longest and (c := gap.closed()) is not None]
    if not closed:
        return ""
    mean = statistics.fmean(closed)
    return f"{mean:.0f} %" if mean > 0 else "none"


def _bd_rate(rows: Sequence[Row], records: Sequence[Record]) -> str:
    """Return the BD-rate against the original, then against the control.

    Empty below four qualities. The overlap of the curves is added where it is small.
    """
    if len({row.quality for row in rows}) < ENOUGH_POINTS:
        return ""
    table = bd_table(records)
    table = table[(table["label"] == rows[0].arm) & (table["role"] == rows[0].role)]
    shown = []
    for against in ("original", "control"):
        found = table[(table["against"] == against) & table["bd_rate_pct"].notna()]
        if len(found):
            overlap = (
                f" (over {found['overlap_pct'].min():.0f} % of the range)"
                if (found["caution"] != "").any()
                else ""
            )
            shown.append(f"{found['bd_rate_pct'].mean():+.1f} %{overlap}")
    return ", ".join(shown)
