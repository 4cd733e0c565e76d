"""`nicprune report`: no input, and nobody else's file, is replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers_cli import call, fails

from nicprune.data.images import write_png

REPORTS = Path(__file__).parents[2] / "reports"


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """Two reports of images and one of videos, as records alone."""
    for name in ("base_evc", "mask_decay_evc", "slimvc_demo"):
        (tmp_path / name).mkdir()
        shutil.copy(REPORTS / name / "records.json", tmp_path / name / "records.json")
    return tmp_path


def test_an_input_is_replaced_only_where_it_is_the_only_one(
    reports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = str(reports / "base_evc"), str(reports / "mask_decay_evc")
    before = (reports / "base_evc" / "records.json").read_bytes()
    for more in ([], ["--force"]):
        err = fails(monkeypatch, capsys, "report", one, other, "-o", one, *more)
        assert "is an input of this command; name another folder" in err
    assert (reports / "base_evc" / "records.json").read_bytes() == before
    assert not (reports / "base_evc" / "index.html").exists()
    call("report", one, "-o", one)
    assert (reports / "base_evc" / "index.html").exists()


@pytest.mark.parametrize("given", ["base_evc", "slimvc_demo"])
@pytest.mark.parametrize("name", ["index.html", "table.csv", "records.json"])
def test_the_files_of_others_stay(
    given: str,
    name: str,
    reports: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site = reports / "site"
    site.mkdir()
    (site / name).write_text("[1, 2]")
    arguments = ["report", str(reports / given), "-o", str(site)]
    assert f"{name} exists and is not of a report" in fails(monkeypatch, capsys, *arguments)
    assert [path.name for path in site.iterdir()] == [name]
    call(*arguments, "--force")
    call(*arguments)  # a report now


@pytest.mark.parametrize("inside", ["", "train", "test"])
def test_no_report_is_written_among_images(
    inside: str, reports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = write_png(torch.rand(3, 8, 8), reports / "photos" / inside / "one.png")
    arguments = ["report", str(reports / "base_evc"), "-o", str(reports / "photos")]
    err = fails(monkeypatch, capsys, *arguments)
    assert f"{photo} exists and is not of a report" in err and "--force" in err
    assert list((reports / "photos").rglob("*.*")) == [photo]
    for number in range(2):
        write_png(torch.rand(3, 64, 64), reports / "clip" / f"{number}.png")
    video = ["eval-video", str(reports / "clip"), "--classical", "x264", "--report", arguments[-1]]
    assert f"{photo} exists and is not of a report" in fails(monkeypatch, capsys, *video)
    call(*arguments, "--force")
    call(*arguments)  # a report now
