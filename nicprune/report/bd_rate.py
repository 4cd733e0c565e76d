"""BD-rate and BD-PSNR between rate-distortion curves, each with cautions about its reliability.

Bjøntegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33, 2001; fitted
by the package `bjontegaard` with piecewise cubic Hermite interpolation (pchip).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from nicprune.report.derived import number_or_nan
from nicprune.report.matching import Records, arms, as_records, closeness, none_first
from nicprune.report.record import Record

FIT = "pchip"
ENOUGH_POINTS = 4
MIN_POINTS = 3
MIN_OVERLAP = 0.75
COLUMNS = (
    "codec",
    "metric",
    "test",
    "role",
    "label",
    "seed",
    "against",
    "points",
    "bd_rate_pct",
    "bd_psnr_db",
    "fit",
    "overlap_pct",
    "caution",
)
RATES = "rates"
"""Column behind the others for one codec for all rates: number of points of its curve. "points" is
the number of points of the shorter curve.
"""
AGAINST = {
    "pruned": ("original", "control"),
    "modulated": ("original", "control"),
    "control": ("original",),
}
"""Anchors of the curves of each role; roles in the order of the table."""

Curve = list[tuple[float, float]]
"""Points (bpp, PSNR in dB): one for each quality, or for each rate of one codec for all rates."""


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the length of the intersection of two ranges over the length of their union."""
    union = max(*a, *b) - min(*a, *b)
    return max(min(max(a), max(b)) - max(min(a), min(b)), 0.0) / union if union > 0 else 0.0


def _rising(values: Sequence[float]) -> bool:
    return all(a < b for a, b in zip(values, values[1:], strict=False))


def bjontegaard(anchor: Curve, test: Curve) -> dict[str, Any]:
    """Return BD-rate and BD-PSNR of `test` against `anchor`.

    Both are fitted over log10(bpp). Either curve needs at least 3 points; 3 give a caution. Where
    PSNR does not rise with bpp, the rate is not a function of PSNR and there is no BD-rate.
    Curves that do not overlap have neither.

    Returns: a mapping of
        points: number of points of the shorter curve.
        bd_rate_pct: mean change of rate at equal PSNR, in per cent (negative is better), or NaN.
        bd_psnr_db: mean change of PSNR at equal rate, in dB (positive is better), or NaN.
        fit: "pchip", or "none".
        overlap_pct: smaller of the overlaps in PSNR and in log rate, in per cent.
        caution: reasons to doubt the figures; empty if there are none.
    """
    import bjontegaard as bd  # imports pyplot: only where it is needed

    nan = math.nan
    points = min(len(anchor), len(test))
    result: dict[str, Any] = {
        "points": points,
        "bd_rate_pct": nan,
        "bd_psnr_db": nan,
        "fit": "none",
        "overlap_pct": nan,
        "caution": "",
    }
    usable = all(
        math.isfinite(v) for curve in (anchor, test) for point in curve for v in point
    ) and all(r > 0 for r, _ in (*anchor, *test))
    if points < MIN_POINTS or not usable:
        too_few = (
            f"{points} point{'s' * (points != 1)}: a curve needs at least {MIN_POINTS}, better"
            f" {ENOUGH_POINTS}"
        )
        return result | {"caution": too_few if usable else "a point has no finite bpp or PSNR"}
    (rates_a, psnr_a), (rates_t, psnr_t) = (
        tuple(map(list, zip(*sorted(curve), strict=True))) for curve in (anchor, test)
    )
    cautions = []
    if points < ENOUGH_POINTS:
        cautions.append(f"only {points} points: indicative, {ENOUGH_POINTS} are usual")
    log_a, log_t = ([math.log10(r) for r in rates] for rates in (rates_a, rates_t))
    in_psnr, in_rate = overlap(psnr_a, psnr_t), overlap(log_a, log_t)
    result["overlap_pct"] = 100 * min(in_psnr, in_rate)
    if in_psnr == 0 or in_rate == 0:
        cautions.append(
            "curves do not overlap in "
            + " or ".join(n for n, o in (("PSNR", in_psnr), ("rate", in_rate)) if o == 0)
        )
    elif min(in_psnr, in_rate) < MIN_OVERLAP:
        cautions.append(
            f"curves overlap over only {100 * min(in_psnr, in_rate):.0f} % of their range"
        )
    monotone = _rising(psnr_a) and _rising(psnr_t)
    if not monotone:
        cautions.append("PSNR does not rise with bpp: no BD-rate")
    options = {"require_matching_points": False, "min_overlap": 0}
    if in_psnr > 0 and monotone:
        result |= {
            "bd_rate_pct": float(bd.bd_rate(rates_a, psnr_a, rates_t, psnr_t, FIT, **options)),
            "fit": FIT,
        }
    if in_rate > 0 and _rising(rates_a) and _rising(rates_t):
        result |= {
            "bd_psnr_db": float(bd.bd_psnr(rates_a, psnr_a, rates_t, psnr_t, FIT, **options)),
            "fit": FIT,
        }
    return result | {"caution": "; ".join(cautions)}


def bd_table(records: Records) -> pd.DataFrame:
    """Return a table of BD-rate and BD-PSNR.

    Pruned and modulated codecs stand against the original and the control; controls stand against
    the original. The table has one row for each setup, arm, seed and anchor ("against"); an
    anchor without records gives no row. The points of a curve are means over images, one for each
    quality. The curve of one codec for all rates also has points between the qualities; the
    column "rates" gives their number.
    """
    ready = as_records(records)
    curves: dict[tuple[Any, ...], list[Record]] = {}
    for record, arm in zip(ready, arms(ready), strict=True):
        if record.role != "original":
            curves.setdefault(
                (record.setup(), list(AGAINST).index(record.role), arm, record.seed), []
            ).append(record)
    rows: list[dict[str, Any]] = []
    for (setup, _, arm, seed), members in sorted(
        curves.items(), key=lambda c: (c[0][0], c[0][1], c[0][2], none_first(c[0][3]))
    ):
        role = members[0].role
        for against in AGAINST[role]:
            anchors = [r for r in ready if r.role == against and r.setup() == setup]
            if anchors:
                curve, other = _curve(members[0], members), _curve(members[0], anchors)
                figures = bjontegaard(_points(other), _points(curve))
                figures |= {RATES: len(curve)} if role == "modulated" else {}
                if against == "control" and (unequal := _unequal_steps(curve, other)):
                    figures["caution"] = "; ".join(filter(None, (figures["caution"], unequal)))
                where = {"codec": setup.codec, "metric": setup.metric, "test": setup.test}
                rows.append(
                    where | {"role": role, "label": arm, "seed": seed, "against": against} | figures
                )
    if any(RATES in row for row in rows):
        return pd.DataFrame(rows, columns=[*COLUMNS, RATES]).astype({RATES: "Int64"})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _curve(of: Record, records: Sequence[Record]) -> list[Record]:
    """Return one record for each quality or rate, the one closest to `of`."""
    best: dict[Any, Record] = {}
    for record in records:
        held = best.get(record.rate_point())
        if held is None or closeness(of, record) > closeness(of, held):
            best[record.rate_point()] = record
    return list(best.values())


def _points(records: Sequence[Record]) -> Curve:
    return [(number_or_nan(r.bpp), number_or_nan(r.psnr_db)) for r in records]


def _unequal_steps(curve: Sequence[Record], control: Sequence[Record]) -> str:
    """Return a caution where a control was trained for another number of steps."""
    own, its = ({record.steps for record in records} for records in (curve, control))
    if own == its:
        return ""

    def listed(steps: set[int | None]) -> str:
        return " and ".join(f"{n:,}" for n in sorted(steps - {None}, key=none_first)) or "unknown"

    return f"trained for {listed(own)} steps, the control for {listed(its)}"
