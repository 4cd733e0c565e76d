"""The arithmetic of the table, and its forms for people."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers_report import record, sweep

from nicprune.report import table, text_table, write_report
from nicprune.report.aggregate import aggregate
from nicprune.report.cautions import cautions
from nicprune.report.headline import headline
from nicprune.report.latex import latex
from nicprune.report.markdown import markdown
from nicprune.report.matching import as_records

NASTY = "50% & a_b #1 | $x$ <b>^~{}\\ </script>\nnext"


def test_table_arithmetic() -> None:
    frame = table(
        [record("pruned", drop=0.7, rate=1.05), record("original"), record("control", drop=-0.1)]
    )
    assert list(frame["role"]) == ["original", "control", "pruned"]
    original, control, pruned = (frame.iloc[n] for n in range(3))
    expected = {
        "kmac_per_pixel": 5.0,
        "kmac_per_pixel_encoder": 1.5,
        "kmac_per_pixel_decoder": 2.5,
        "flop_reduction": 2.0,
        "encoder_reduction": 4.0,
        "decoder_reduction": 2.0,
        "params_reduction": 2.0,
        "bpp_change_pct": 5.0,
        "psnr_drop_db": 0.7,
        "psnr_drop_pct": 2.5,
        "encode_speedup": 2.0,
        "decode_speedup": 2.0,
    }
    assert {key: pytest.approx(pruned[key]) for key in expected} == expected
    assert original["flop_reduction"] == 1 and original["psnr_drop_db"] == 0
    assert control["psnr_drop_db"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    "other",
    [
        {"quality": 2},
        {"test": "kodak"},
        {"codec": "x"},
        {"metric": "ms-ssim"},
        {"images": [{"name": "only-one.png"}]},
    ],
)
def test_no_drop_against_what_is_not_comparable(other: dict[str, Any]) -> None:
    ready = [
        record("original", **({} if "quality" in other else other)),
        record("pruned", drop=0.7),
    ]
    ready[0] |= other
    pruned = table(ready).query("role == 'pruned'").iloc[0]
    assert all(
        math.isnan(pruned[k])
        for k in ("psnr_drop_db", "psnr_drop_pct", "bpp_change_pct", "encode_speedup")
    )
    assert pruned["flop_reduction"] == 2
    said = cautions(as_records(ready), aggregate(ready))
    assert any("original was not evaluated" in note for note in said) and any(
        "no control" in note for note in said
    )
    assert "nan" not in text_table(ready) + markdown(ready) + latex(ready)


def test_no_drop_against_another_original_codec() -> None:
    foreign = record("original")
    foreign["cost"] = foreign["original_cost"] = {
        key: value + 1 for key, value in foreign["cost"].items()
    }
    assert math.isnan(
        table([foreign, record("pruned")]).query("role == 'pruned'").iloc[0]["psnr_drop_db"]
    )


def test_no_speedup_between_machines() -> None:
    pruned = (
        table([record("original", machine="other"), record("pruned", drop=0.7)])
        .query("role == 'pruned'")
        .iloc[0]
    )
    assert math.isnan(pruned["decode_speedup"]) and pruned["psnr_drop_db"] == pytest.approx(0.7)


@pytest.mark.parametrize("busy", [0.5, None])
def test_no_speedup_while_others_were_busy(busy: float | None) -> None:
    """Nor where nothing is known of them."""
    for ready in (
        [record("original", busy=busy), record("pruned", drop=0.7)],
        [record("original"), record("pruned", drop=0.7, busy=busy)],
    ):
        pruned = table(ready).query("role == 'pruned'").iloc[0]
        assert (
            math.isnan(pruned["decode_speedup"])
            and math.isnan(pruned["encode_speedup"])
            and pruned["decode_s"] == 0.2
        )
        assert "no speed-up is computed" in " ".join(
            text_table(ready).split()
        ) and "as fast" not in " ".join(headline(aggregate(ready)))
    assert "no speed-up" not in " ".join(text_table([record("original"), record("pruned")]).split())


def test_text_table_is_narrow_plain_and_complete() -> None:
    name = (
        "mask decay with a name so long that no terminal could hold the whole of it beside the"
        " figures"
    )
    ready = sweep() + [
        record("pruned", q, drop=0.7 + s / 10, seed=s, label=name)
        for q in (1, 2, 3)
        for s in (0, 1, 2)
    ]
    text = text_table(ready)
    assert max(map(len, text.splitlines())) <= 120 and text.isascii()
    for figure in ("5.00", "2.00x", "0.2000", "27.30", "0.70 (2.50 %)", "0.100", "0.200"):
        assert figure in next(
            line for line in text.splitlines() if line.startswith("  1  mask_decay")
        )
    assert "0.9000" in text_table(sweep()) and "0.9000" not in text, (
        "MS-SSIM goes where there is no room; the files have it"
    )
    column = [line[5:].split("  ")[0].strip() for line in text.splitlines()]
    assert name.replace(" ", "") in "".join(column).replace(" ", ""), (
        "a long label is wrapped, not cut"
    )
    assert "0.80 +-0.10 (2.86 %)" in text and "3 seeds" in text and "fvcore" in text


def test_seeds_keep_their_rows_and_are_joined_for_people() -> None:
    ready = [
        record("original"),
        *(record("pruned", drop=d, seed=s) for s, d in enumerate((0.5, 0.7, 0.9))),
    ]
    assert len(table(ready)) == 4
    line = aggregate(ready)[1]
    assert (line.seeds, line.mean["psnr_drop_db"], line.spread["psnr_drop_db"]) == (
        3,
        pytest.approx(0.7),
        pytest.approx(0.2),
    )
    assert "0.70 ±0.20 (2.50 %)" in markdown(ready)
    assert "±" not in markdown(ready[:2])


def test_latex_and_markdown_escape() -> None:
    ready = [record("original"), record("pruned", label=NASTY)]
    tex, md = latex(ready), markdown(ready)
    assert (
        r"50\% \& a\_b \#1 \textbar{} \$x\$"
        r" \textless{}b\textgreater{}\textasciicircum{}\textasciitilde{}\{\}\textbackslash{}" in tex
    )
    rows = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", row)) == 9 for row in rows) and len(rows) == 3
    rows = [line for line in md.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and all(len(re.findall(r"(?<!\\)\|", row)) == 11 for row in rows)
    assert "<b>" not in md.replace(r"\<b\>", "")


def test_labels_that_spreadsheets_would_run_are_text(tmp_path: Path, undrawn: None) -> None:
    labels = ["=HYPERLINK(1)", "+1", "-1+1", "@SUM(A1)", "a=1", "plain"]
    found = [
        record(role, quality, **({"label": label} if label else {}))
        for role, label in (("original", ""), *(("pruned", label) for label in labels))
        for quality in (1, 2, 3, 4)
    ]
    write_report(found, tmp_path)
    for name, column in (("table.csv", "label"), ("bd.csv", "label")):
        read = pd.read_csv(tmp_path / name)
        texts = [value for value in read[column] if value != "original"]
        with (tmp_path / name).open(encoding="utf-8", newline="") as file:
            again = [row[column] for row in csv.DictReader(file) if row[column] != "original"]
        assert texts == again
        if name == "table.csv":
            assert set(texts) == {f"'{x}" if x[0] in "=+-@" else x for x in labels}
        assert not [text for text in texts if text[0] in "=+-@"]
    # Numbers stay numbers, negative ones too, and records are exact.
    frame, read = table(found), pd.read_csv(tmp_path / "table.csv")
    for column in frame.select_dtypes("number"):
        assert read[column].tolist() == pytest.approx(frame[column].tolist(), nan_ok=True)
    kept = json.loads((tmp_path / "records.json").read_text(encoding="utf-8"))
    assert {entry["label"] for entry in kept} == {"original", *labels}
