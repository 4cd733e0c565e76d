"""BD-rates with their cautions."""

from __future__ import annotations

import math
from typing import Any

import pytest
from helpers_report import PSNR, record

from nicprune.report import bd_table


def test_bd_of_a_shifted_curve_is_the_shift() -> None:
    pruned = [record("pruned", q, rate=1.1) for q in PSNR]
    frame = bd_table(
        [
            *(record("original", q) for q in PSNR),
            *(record("control", q, rate=0.9) for q in PSNR),
            *pruned,
        ]
    )
    rows = {(row["role"], row["against"]): row for _, row in frame.iterrows()}
    assert set(rows) == {("pruned", "original"), ("pruned", "control"), ("control", "original")}
    assert rows["pruned", "original"]["bd_rate_pct"] == pytest.approx(10, abs=1e-9)
    assert rows["pruned", "control"]["bd_rate_pct"] == pytest.approx(
        100 * (1.1 / 0.9 - 1), abs=1e-9
    )
    assert rows["pruned", "original"]["bd_psnr_db"] < 0
    assert (
        rows["pruned", "original"]["caution"] == "" and rows["pruned", "original"]["fit"] == "pchip"
    )
    dropped = bd_table(
        [*(record("original", q) for q in PSNR), *(record("pruned", q, drop=0.5) for q in PSNR)]
    ).iloc[0]
    assert dropped["bd_psnr_db"] == pytest.approx(-0.5, abs=1e-9) and dropped["bd_rate_pct"] > 0


@pytest.mark.parametrize(
    ("qualities", "change", "rate_blank", "psnr_blank", "said"),
    [
        ((1,), {"rate": 1.1}, True, True, "1 point: a curve needs at least 3"),
        ((1, 2), {"rate": 1.1}, True, True, "2 points: a curve needs"),
        ((1, 2, 3), {"rate": 1.1}, False, False, "only 3 points"),
        ((1, 2, 3, 4), {"drop": 2.5}, False, False, "overlap over only"),
        ((1, 2, 3, 4), {"drop": 9.0}, True, False, "do not overlap in PSNR"),
        ((1, 2, 3, 4), {"rate": 9.0}, False, True, "do not overlap in rate"),
        ((1, 2, 3, 4), {"psnr_db": 30.0}, True, False, "does not rise"),
        ((1, 2, 3, 4), {"psnr_db": None}, True, True, "no finite"),
    ],
)
def test_bd_cautions(
    qualities: tuple[int, ...],
    change: dict[str, Any],
    rate_blank: bool,
    psnr_blank: bool,
    said: str,
) -> None:
    ready = [r for q in qualities for r in (record("original", q), record("pruned", q, **change))]
    row = bd_table(ready).iloc[0]
    assert said in row["caution"] and row["points"] == len(qualities)
    assert (math.isnan(row["bd_rate_pct"]), math.isnan(row["bd_psnr_db"])) == (
        rate_blank,
        psnr_blank,
    )
    assert (row["fit"] == "none") == (rate_blank and psnr_blank)


def test_no_bd_rate_where_psnr_falls_though_the_curves_overlap() -> None:
    psnr = {1: 28.5, 2: 31.5, 3: 30.5, 4: 33.5}
    row = bd_table(
        [r for q in PSNR for r in (record("original", q), record("pruned", q, psnr_db=psnr[q]))]
    ).iloc[0]
    assert (
        math.isnan(row["bd_rate_pct"])
        and math.isfinite(row["bd_psnr_db"])
        and "does not rise" in row["caution"]
    )


def test_bd_without_anything_to_stand_against() -> None:
    assert len(bd_table([record("pruned", q) for q in PSNR])) == 0
    assert len(bd_table([])) == 0
