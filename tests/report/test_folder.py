"""The folder of a report and its page."""

from __future__ import annotations

import copy
import csv
import json
import re
from pathlib import Path
from typing import Any

import markupsafe
import pytest
from helpers_report import PNG, record, store, sweep

from nicprune.common.errors import FileError
from nicprune.report import collect, text_table, write_report
from nicprune.report.columns import column_of

NASTY = "50% & a_b #1 | $x$ <b>^~{}\\ </script>\nnext"


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


def test_report_folder(tmp_path: Path) -> None:
    store(tmp_path / "runs", sweep())
    found = collect([tmp_path / "runs"])
    out = tmp_path / "report"
    page = write_report(found, out)
    assert page == out / "index.html"
    names = {p.name for p in out.iterdir()}
    plots = {name for name in names if name.endswith(".png")}
    assert plots >= {"rd.png", "drop_vs_reduction.png", "widths.png"}
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


@pytest.mark.usefixtures("undrawn")
def test_the_page_defines_the_columns_of_the_csv(tmp_path: Path) -> None:
    html = write_report(sweep(), tmp_path).read_text(encoding="utf-8")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        names = next(csv.reader(file))
    listed = html.partition("The columns of")[2]
    for name in names:
        definition = markupsafe.escape(column_of(name).description)
        assert f"<dt><code>{name}</code></dt><dd>{definition}</dd>" in listed
    assert f'<th title="{column_of("psnr_drop_db").description}">drop dB</th>' in html


@pytest.mark.usefixtures("undrawn")
def test_speed_ups_have_columns_only_where_they_are_known(tmp_path: Path) -> None:
    for busy, shown in ((0.0, 2), (None, 0)):
        ready = [r | {"busy": busy} for r in sweep()]
        html = write_report(ready, tmp_path).read_text(encoding="utf-8")
        assert html.count(">speed-up</th>") == shown
        table = html.partition("Cost and quality")[2].partition("</table>")[0]
        rows = table.partition("<tbody>")[2].split("</tr>")[:-1]
        assert {row.count("<td") + row.count("<th") for row in rows} == {17 + shown}


@pytest.mark.usefixtures("undrawn")
def test_missing_crops_are_counted_in_one_sentence(tmp_path: Path) -> None:
    store(tmp_path / "runs", sweep())
    for file in (tmp_path / "runs").rglob("x.png"):
        file.unlink()
    html = write_report(collect([tmp_path / "runs"]), tmp_path / "out").read_text(encoding="utf-8")
    assert html.count("crops were not found") == 1 and "9 of 9 crops were not found" in html
