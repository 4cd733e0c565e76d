"""Records as a model: strict types, stable bytes on disk, and the definitions of all columns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import TESTS
from helpers_report import record

from nicprune.common.errors import FileError
from nicprune.report.columns import COLUMNS, OPTIONAL_COLUMNS, column_of
from nicprune.report.record import LATER, Record
from nicprune.report.record_files import read, records_json

REPORTS = sorted(
    path
    for path in (TESTS.parent / "reports").glob("*/records.json")
    if "gop" not in json.loads(path.read_text(encoding="utf-8"))[0]  # videos: test_video.py
)
UNITS = {
    r".*_db": "dB",
    r".*_pct": "%",
    r".*_s": "s",
    r".*_bytes": "bytes",
    r".*_(reduction|speedup)": "×",
    r"kmac_per_pixel.*": "kMAC/pixel",
    r"bpp|bpp_estimated": "bpp",
}


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True)


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_a_records_file_is_written_as_it_was_read(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    crops = [item["crops"] for item in json.loads(text)]
    assert records_json(read(path), path.parent, crops) == text


def test_fields_that_were_not_given_are_left_out() -> None:
    given = record()
    assert as_json(Record.parse(given).content()) == as_json(given)
    empty = given | dict.fromkeys(LATER) | {"dynamic": {}, "skipping": {}, "schedule": []}
    assert not set(LATER) & Record.parse(empty).model_fields_set
    kept = record() | {"file": None, "widths": {}}
    assert as_json(Record.parse(kept).content()) == as_json(kept), (
        "fields of the first version are written as given"
    )


def test_numbers_keep_their_type_and_later_fields_are_kept() -> None:
    given = record(lmbda=1, bpp=2, later_field={"a": [1, 2.0]})
    given["images"] = [image | {"also_later": 1} for image in given["images"]]
    assert as_json(Record.parse(given).content()) == as_json(given)


@pytest.mark.parametrize("name", [n for n in Record.model_fields if n not in ("format", "version")])
def test_a_value_of_the_wrong_type_is_refused(name: str) -> None:
    for wrong in (True, object()):
        with pytest.raises(FileError, match=f"r is a damaged record: {name}") as caught:
            Record.parse(record() | {name: wrong}, None, "r")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"quality": "3"},
        {"steps": 3.5},
        {"psnr_db": "30"},
        {"threads": [2]},
        {"cost": {"macs": -1, "encoder": 1, "decoder": 1, "params": 1}},
        {"images": [{"psnr_db": 30.0}]},
        {"images": [{"name": "a.png", "psnr_db": "30"}]},
        {"schedule": [{"step": 1}]},
        {"by_transform": {"g_a": [1, 2, 3]}},
        {"versions": {"torch": 2}},
    ],
)
def test_nothing_is_converted(change: dict[str, Any]) -> None:
    with pytest.raises(FileError, match=next(iter(change))):
        Record.parse(record() | change)


def test_every_column_has_a_definition_with_its_unit() -> None:
    names = [*COLUMNS, *(name for names in OPTIONAL_COLUMNS for name in names)]
    for name in names:
        column = column_of(name)
        assert column.title and column.header and column.description[0].isalpha(), name
        if column.unit not in ("", "×"):
            assert column.description.endswith(f", in {column.unit}"), name
        for pattern, unit in UNITS.items():
            assert column.unit == unit or not re.fullmatch(pattern, name), name
    assert column_of("psnr_db").axis == "PSNR (dB)" and column_of("psnr_db").header == "PSNR dB"


def test_a_record_is_frozen_and_a_copy_keeps_its_folder(tmp_path: Path) -> None:
    made = Record.parse(record(), tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        made.file = "other"  # type: ignore[misc]
    copy = made.model_copy(update={"file": None})
    assert copy.folder == tmp_path and copy.file is None and made.file == "codec.safetensors"
