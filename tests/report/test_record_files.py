"""Records found, read and checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_report import record, store, sweep

from nicprune.common.errors import FileError
from nicprune.report import Record, collect, write_report


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


def test_a_table_is_no_record(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("role,codec\n")
    with pytest.raises(FileError, match=r"table\.csv is no record: give the folder"):
        collect([table])


def test_nothing_found_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"record\.json.*below"):
        collect([tmp_path])
    with pytest.raises(FileError, match="nowhere does not exist"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(FileError, match="no records"):
        write_report([], tmp_path / "out")
    with pytest.raises(FileError, match="no paths"):
        collect([])


def test_record_is_checked_when_made() -> None:
    with pytest.raises(FileError, match="record is not a record"):
        Record.parse({})
    assert Record.parse(record()).crops == []
