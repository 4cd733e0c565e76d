"""The report: records found and checked, arithmetic of the table, BD-rates with their cautions, and
what is written.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from helpers_report import PNG, PSNR, record, store, sweep

from nicprune.common.errors import FileError
from nicprune.report import Record, bd_table, collect, table, text_table, write_report
from nicprune.report.aggregate import aggregate
from nicprune.report.cautions import cautions
from nicprune.report.headline import headline
from nicprune.report.latex import latex
from nicprune.report.markdown import markdown
from nicprune.report.matching import arms, as_records, reference_for
from nicprune.report.plots.drop_against_reduction import drop_against_reduction
from nicprune.report.plots.look import look_of
from nicprune.report.plots.rd_curves import rd_curves
from nicprune.report.plots.theme import LIGHT


def test_collect_finds_records_below_folders_once_and_knows_their_folder(tmp_path: Path) -> None:
    store(tmp_path, sweep())
    found = collect([tmp_path, tmp_path / "part0", tmp_path / "part0/record.json"])
    assert len(found) == 9
    assert {r.folder for r in found} == {tmp_path / f"part{n}" for n in range(9)}


@pytest.mark.usefixtures("undrawn")
def test_a_report_beside_its_runs_counts_nothing_twice(tmp_path: Path) -> None:
    store(tmp_path / "runs", sweep())
    write_report(collect([tmp_path / "runs"]), tmp_path / "report")
    assert len(collect([tmp_path / "runs", tmp_path / "report"])) == 9


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"format": "nicprune-record", "ver', "truncated or not JSON"),
        ("[" * 100_000, "truncated or not JSON"),
        ("\x00\ud800", "truncated or not JSON"),
        ('{"format": "something"}', "expected 'nicprune-record'"),
        ("[3]", "entry 1"),
        (json.dumps(record() | {"version": 2}), "version 2"),
        (json.dumps({k: v for k, v in record().items() if k != "psnr_db"}), "psnr_db is missing"),
        (json.dumps(record() | {"cost": {"macs": 3}}), "cost.encoder is missing"),
        (json.dumps(record() | {"role": "hero"}), "'hero'"),
        (json.dumps(record() | {"widths": {"g_a.0": [64]}}), "widths.g_a.0"),
        (json.dumps(record() | {"crops": [{"image": "x"}]}), "crops.0.original"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "record.json"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(FileError) as caught:
        collect([tmp_path])
    assert (
        str(file) in str(caught.value)
        and said in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"record\.json.*below"):
        collect([tmp_path])
    with pytest.raises(FileError, match="nowhere does not exist"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(FileError, match="no records"):
        write_report([], tmp_path / "out")
    with pytest.raises(FileError, match="no paths"):
        collect([])


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


def test_many_arms_are_told_apart_and_leave_the_panels_their_room() -> None:
    def drawn(count: int) -> tuple[list[Any], int, int]:
        ready = aggregate(
            [
                record("original"),
                *(record("pruned", drop=0.1 * n, label=f"arm {n:02}") for n in range(count)),
            ]
        )
        made = [("pruned", line.arm) for line in ready if line.role == "pruned"]
        looks = [look_of(line, made, LIGHT) for line in ready]
        whole, above = (
            matplotlib.image.imread(io.BytesIO(draw(ready) or b""))
            for draw in (rd_curves, drop_against_reduction)
        )
        return [(look["color"], look["marker"]) for look in looks], whole.shape[0], above.shape[0]

    few, low, low_drop = drawn(2)
    many, high, high_drop = drawn(40)
    assert len(set(many)) == 41 and len(set(few)) == 3
    assert high > low + 100 and high_drop > low_drop + 100, "a longer legend makes a higher figure"


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


def test_the_original_of_the_same_recipe_is_preferred() -> None:
    other = record("original", recipe="b", recipe_sha256="cd" * 32, psnr_db=20.0)
    for order in ([other, record("original")], [record("original"), other]):
        assert table([*order, record("pruned", drop=0.7)]).query("role == 'pruned'").iloc[0][
            "psnr_drop_db"
        ] == pytest.approx(0.7)


def test_the_seed_counts_before_the_text_of_the_recipe() -> None:
    """A recipe may grow by an arm and a seed together."""
    grown = "cd" * 32
    controls = [
        record("control", psnr_db=27.0),
        record("control", seed=1, recipe_sha256=grown, psnr_db=26.0),
    ]
    arm = as_records([record("pruned", recipe_sha256=grown)])[0]
    for order in (controls, controls[::-1]):
        found = reference_for(arm, as_records(order), "control")
        assert found is not None and found.seed == 0


def test_one_label_for_two_results_is_told_apart() -> None:
    ready = as_records(
        [
            record("pruned"),
            record("pruned", psnr_db=20.0, recipe="b"),
            record("pruned", psnr_db=21.0, recipe="b"),
            record("pruned", 2),
        ]
    )
    names = arms(ready)
    assert len({(r.quality, name) for r, name in zip(ready, names, strict=True)}) == 4
    assert len(aggregate(ready)) == 4
    same = [record("pruned"), record("pruned", date="2026-11-22T10:00:00")]
    assert set(arms(as_records(same))) == {"mask_decay"} and len(aggregate(same)) == 1


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


@pytest.mark.usefixtures("undrawn")
def test_a_table_of_blanks_is_one_sentence(tmp_path: Path) -> None:
    for qualities, blank in (((1, 2), True), ((1, 2, 3), False)):
        page = write_report(
            [record(role, q) for q in qualities for role in ("original", "control", "pruned")],
            tmp_path,
        ).read_text()
        assert ("no curve has three points" in page) == blank and (
            "<th>BD-rate</th>" in page
        ) != blank


def test_bd_without_anything_to_stand_against() -> None:
    assert len(bd_table([record("pruned", q) for q in PSNR])) == 0
    assert len(bd_table([])) == 0


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


NASTY = "50% & a_b #1 | $x$ <b>^~{}\\ </script>\nnext"


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


def test_report_folder(tmp_path: Path) -> None:
    store(tmp_path / "runs", sweep())
    found = collect([tmp_path / "runs"])
    out = tmp_path / "report"
    page = write_report(found, out)
    assert page == out / "index.html"
    names = {p.name for p in out.iterdir()}
    plots = {"rd.png", "drop_vs_reduction.png", "widths.png"}
    assert (
        names
        == {
            "table.csv",
            "table.md",
            "table.tex",
            "bd.csv",
            "records.json",
            "index.html",
            "crops",
        }
        | plots
    )
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    with open(out / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["flop_reduction"]) for r in rows if r["role"] == "pruned"] == [2, 2, 2]
    html = page.read_text(encoding="utf-8")
    for figure in (
        "2.00×",
        "0.700",
        "2.50 %",
        "29.87 dB",
        "0.432 bpp",
        "quickstart",
        "ab" * 32,
        "pchip",
        "only 3 points",
        "8 bits",
        "g_s",
    ):
        assert figure in html, figure
    assert not re.search(r"https?://|src=\"(?!data:)|<script|<link", html)
    assert html.count("data:image/png") == 3 * 2 + 3 * 4
    assert len(list((out / "crops").iterdir())) == 1 + 9  # the photograph once


def test_report_is_the_same_from_its_own_records_and_names_no_place_on_disk(tmp_path: Path) -> None:
    places = {
        "file": str(tmp_path / "secret/codec.safetensors"),
        "test": str(tmp_path / "photos"),
        "codec": str(tmp_path / "c.pth"),
    }
    store(tmp_path / "runs", [r | places for r in sweep()])
    write_report(collect([tmp_path / "runs"]), tmp_path / "one")
    again = collect([tmp_path / "one"])
    assert all(r.crops for r in again)
    write_report(again, tmp_path / "two")
    for name in ("records.json", "table.md", "bd.csv", "index.html", "rd.png"):
        first, second = ((tmp_path / which / name).read_bytes() for which in ("one", "two"))
        assert first == second, name
        assert str(tmp_path).encode() not in first
    assert json.loads((tmp_path / "one/records.json").read_text())[0]["file"] == "codec.safetensors"


@pytest.mark.usefixtures("undrawn")
def test_page_escapes_what_records_say(tmp_path: Path) -> None:
    ready = sweep(label=NASTY)
    for r in ready:
        r["recipe_text"] = r["machine"] = r["recipe"] = "<script>alert(1)</script>"
    html = write_report(ready, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html


@pytest.mark.usefixtures("undrawn")
def test_crops_come_only_from_beside_the_record_and_only_pictures(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG + b"secret")
    run = store(tmp_path / "run", [record("original")])
    file = run / "part0/record.json"
    base = json.loads(file.read_text())
    (run / "part0/text.png").write_text("not a picture")
    for path in (
        "../../secret.png",
        str(tmp_path / "secret.png"),
        "text.png",
        "crops/missing.png",
        "x\0y",
    ):
        bad = copy.deepcopy(base)
        bad["crops"][0]["decoded"] = path
        file.write_text(json.dumps(bad))
        html = write_report(collect([run]), tmp_path / "out").read_text(encoding="utf-8")
        assert "1 of 1 crops were not found" in html and "original image</b>" not in html
        assert not any(
            b"secret" in p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
        )


@pytest.mark.usefixtures("undrawn")
def test_a_report_may_leave_the_photographs_out(tmp_path: Path) -> None:
    found = collect([store(tmp_path / "run", [record("original"), record("pruned")])])
    html = write_report(found, tmp_path / "out", crops=False).read_text(encoding="utf-8")
    assert (
        not (tmp_path / "out" / "crops").exists()
        and "original image</b>" not in html
        and "crops were not found" not in html
    )
    assert "original image</b>" in write_report(found, tmp_path / "with").read_text(
        encoding="utf-8"
    )
    assert not any(r.crops for r in collect([tmp_path / "out"]))


@pytest.mark.usefixtures("undrawn")
def test_a_page_of_many_codecs_shows_fewer_photographs(tmp_path: Path) -> None:
    for number, codecs in enumerate((10, 60)):
        run = store(
            tmp_path / f"run{number}", [record("pruned", label=f"arm {n}") for n in range(codecs)]
        )
        for file in run.rglob("record.json"):
            content = json.loads(file.read_text())
            content["crops"] = [content["crops"][0] | {"image": f"{name}.png"} for name in "abc"]
            file.write_text(json.dumps(content))
        html = write_report(collect([run]), tmp_path / f"out{number}").read_text(encoding="utf-8")
        assert [name for name in "abc" if f"<h3>{name}.png" in html] == (list("abc"), ["a"])[number]


def test_report_without_pruned_codecs_leaves_no_stale_plot(tmp_path: Path) -> None:
    write_report(sweep(), tmp_path)
    assert (tmp_path / "widths.png").exists()
    html = write_report([record("original", 1)], tmp_path, title="Only one").read_text(
        encoding="utf-8"
    )
    assert "No pruned codec is among the records." in html and "<title>Only one</title>" in html
    assert (
        not (tmp_path / "widths.png").exists() and not (tmp_path / "drop_vs_reduction.png").exists()
    )


def test_sparse_records_still_make_a_report(tmp_path: Path) -> None:
    blank = dict.fromkeys(
        "quality metric lmbda seed steps ms_ssim encode_s decode_s test recipe recipe_text file"
        " machine".split()
    )
    nothing: dict[str, Any] = {
        "images": [],
        "crops": [],
        "widths": {},
        "by_transform": {},
        "versions": {},
    }
    bare = [record(role) | blank | nothing for role in ("original", "pruned")]
    html = write_report(bare, tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b|None", re.sub(r"base64,[^\"]*", "", html))
    assert "nan" not in text_table(bare) and "NaN" not in (tmp_path / "records.json").read_text()


@pytest.mark.usefixtures("undrawn")
def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(FileError) as caught:
        write_report(sweep(), tmp_path / "taken" / "report")
    assert "taken" in str(caught.value) and "\n" not in str(caught.value)


def test_headline_is_made_of_the_numbers() -> None:
    said = headline(aggregate(sweep()))
    assert (
        said[0].replace("\u00a0", " ")
        == "mask_decay needs 2.00× fewer MACs at qualities 1 to 3: PSNR drops by 0.70 dB (2.19 to"
        " 2.50 %) while bpp changes by +0.0 %; decoding is 2.00× as fast."
    )
    assert (
        "control (the original fine-tuned without pruning)" in said[1]
        and "PSNR rises by 0.10" in said[1]
    )


def test_unequal_training_is_said() -> None:
    ready = sweep((1,), steps=300)
    assert any(
        "300 steps, its control for 100" in note
        for note in cautions(as_records(ready), aggregate(ready))
    )
    assert cautions(as_records(sweep()), aggregate(sweep())) == []


def test_plots_leave_global_state_alone_and_take_any_label() -> None:
    before = dict(matplotlib.rcParams)
    drawn = rd_curves(aggregate(sweep(label="$\\frac{$ 漢字 _x_")))
    assert drawn is not None and np.frombuffer(drawn[16:24], ">u4").min() > 400
    assert dict(matplotlib.rcParams) == before


def test_record_is_checked_when_made() -> None:
    with pytest.raises(FileError, match="record is not a record"):
        Record.parse({})
    assert Record.parse(record()).crops == []
