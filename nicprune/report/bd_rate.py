"""BD-rate and BD-PSNR between rate-distortion curves, with what casts doubt on them said beside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from nicprune.report.records import Record, arms, as_records, closeness, number

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
"""A column behind the others where there is one codec for all rates: how many of its rates its
curve goes through; "points" counts the shorter curve's.
"""
AGAINST = {
    "pruned": ("original", "control"),
    "modulated": ("original", "control"),
    "control": ("original",),
}
"""What the curves of a role stand against; roles in the order of the table."""

Curve = list[tuple[float, float]]
"""(bpp, PSNR in dB), one point per quality; of one codec for all rates, one per rate."""


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Length of the intersection of two ranges over the length of their union."""
    union = max(*a, *b) - min(*a, *b)
    return max(min(max(a), max(b)) - max(min(a), min(b)), 0.0) / union if union > 0 else 0.0


def _rising(values: Sequence[float]) -> bool:
    return all(a < b for a, b in zip(values, values[1:], strict=False))


def bjontegaard(anchor: Curve, test: Curve) -> dict[str, Any]:
    """BD-rate (per cent; negative is better) and BD-PSNR (dB; positive is better) of `test` against
    `anchor`.

    Both are fitted by pchip over log10(bpp). Below 3 points on either curve there are none; at 3
    they stand with a caution. PSNR that does not rise with bpp leaves BD-rate blank, because the
    rate is then no function of PSNR; curves without overlap leave both blank.

    Returns: points, bd_rate_pct, bd_psnr_db (NaN where blank), fit, overlap_pct (the smaller of the
        overlaps in PSNR and in log rate), caution.
    """
    import bjontegaard as bd  # imports pyplot: only when there is something to compute

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
        cautions.append(f"only {points} points: indicative, {ENOUGH_POINTS} are the custom")
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


def bd_table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """BD-rate and BD-PSNR of each pruned or modulated curve against the original and the control,
    and of the control against the original.

    One row per codec, arm, seed and anchor ("against"); the caution is empty where nothing casts
    doubt on the figures. Curves go through the means over images, one point per quality; that of
    one codec for all rates goes through those between the qualities too, and the column "rates"
    says through how many. An anchor that has no record gives no row.
    """
    ready = as_records(records)
    curves: dict[tuple[Any, ...], list[Record]] = {}
    for record, arm in zip(ready, arms(ready), strict=True):
        if record["role"] != "original":
            curves.setdefault(
                (record.setting(), list(AGAINST).index(record["role"]), arm, record["seed"]), []
            ).append(record)
    rows: list[dict[str, Any]] = []
    for (setting, _, arm, seed), members in sorted(
        curves.items(), key=lambda c: (c[0][0], c[0][1], c[0][2], number(c[0][3]))
    ):
        role = members[0]["role"]
        for against in AGAINST[role]:
            anchors = [r for r in ready if r["role"] == against and r.setting() == setting]
            if anchors:
                curve = _curve(members[0], members)
                figures = bjontegaard(_curve(members[0], anchors), curve) | (
                    {RATES: len(curve)} if role == "modulated" else {}
                )
                where = {"codec": setting.codec, "metric": setting.metric, "test": setting.test}
                rows.append(
                    where | {"role": role, "label": arm, "seed": seed, "against": against} | figures
                )
    if any(RATES in row for row in rows):
        return pd.DataFrame(rows, columns=[*COLUMNS, RATES]).astype({RATES: "Int64"})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _curve(of: Record, records: Sequence[Record]) -> Curve:
    """One point per quality or rate; where it has several records, the one closest to `of` in
    recipe, seed and steps.
    """
    best: dict[Any, Record] = {}
    for record in records:
        held = best.get(record.rate())
        if held is None or closeness(of, record) > closeness(of, held):
            best[record.rate()] = record

    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    return [(number(r["bpp"]), number(r["psnr_db"])) for r in best.values()]
