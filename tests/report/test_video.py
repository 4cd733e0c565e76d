"""The report of codecs on clips: every figure is that of the evaluations, and it is made again from
its records.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_cli import call

from nicprune.common.errors import FileError
from nicprune.evaluation.video import ClipScore, FrameCost, VideoEvaluation
from nicprune.report import folder as image_report
from nicprune.report.plots.theme import DARK
from nicprune.report.plots.video import video_rd, video_widths
from nicprune.report.video import bd_rates, video_record, video_table, write_video_report
from nicprune.report.video_record import VideoRecord, read_video_records

CLIP = ClipScore(
    name="a.mp4", frames=8, width=256, height=192, fps=25.0, bpp=0.2, bpp_intra=0.4,
    bpp_predicted=0.1, kbits=245.8, psnr_db=30.0, psnr_yuv_db=32.0, psnr_y_db=31.0, psnr_u_db=35.0,
    psnr_v_db=35.0, ms_ssim=0.95, encode_s=0.05, decode_s=0.04,
)  # fmt: skip


def evaluation(width: int | None, rate: float, quality: float, **changes: Any) -> VideoEvaluation:
    clip = replace(CLIP, bpp=rate, psnr_db=quality, psnr_yuv_db=quality + 2)
    cost = FrameCost(12.0 - 3 * (width or 0), 11.0, 7_000_000, 8_000_000, 256, 192)
    made = VideoEvaluation(
        "codec", 1, "" if width is None else f"width {width}", width, 32, (clip,), cost,
        replace(cost, encode_kmac=20.0, encode_peak_bytes=9_000_000), "cpu", 1, 0.5,
    )  # fmt: skip
    return replace(made, **changes)


def sample() -> list[VideoRecord]:
    records = []
    for width in range(3):
        points = evaluation(width, 0.4 - 0.1 * width, 34.0 - width)
        records.append(video_record(points, "codec", "slim", command="nicprune eval-video a.mp4"))
        alone = evaluation(width, 0.6 - 0.1 * width, 34.0 - width, predicted=None, gop=1)
        records.append(video_record(alone, "intra", "slim"))
    for crf, rate, quality in ((22, 0.5, 37.0), (27, 0.3, 34.0), (32, 0.1, 31.0)):
        changes = {"setting": f"crf {crf}", "intra": None, "predicted": None}
        records.append(
            video_record(evaluation(None, rate, quality, **changes), "classical", "x265")
        )
    return records


def test_a_record_holds_the_figures_of_the_evaluation() -> None:
    record = sample()[0]
    assert (record.bpp, record.psnr_db, record.psnr_yuv_db) == (0.4, 34.0, 36.0)
    assert (record.encode_ms, record.decode_ms) == (50.0, 40.0)
    assert (record.intra_encode_kmac, record.predicted_encode_kmac) == (12.0, 20.0)
    assert (record.encode_peak_mb, record.decode_peak_mb) == (9.0, 8.0)
    assert record.clips[0].name == "a.mp4" and record.counter and record.versions["torch"]
    classical = sample()[-1]
    assert classical.encode_peak_mb is None and classical.counter is None


def test_the_report_holds_every_figure(tmp_path: Path) -> None:
    page = write_video_report(sample(), tmp_path).read_text(encoding="utf-8")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text("utf-8").splitlines()))
    assert [row["setting"] for row in rows[-3:]] == ["crf 22", "crf 27", "crf 32"]
    assert float(rows[0]["bpp"]) == 0.4 and float(rows[0]["predicted_encode_kmac"]) == 20.0
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table == video_table(sample())
    for text in ("slim, I frames alone", "x265", "crf 22"):
        assert text in page and text in table
    assert "(6 Y + U + V) / 8" in table and "times are rough" in table
    assert "a.mp4 (256x192, 8 frames)" in page and "nicprune eval-video a.mp4" in page
    assert page.count("data:image/png") == 4 and "http" not in page.split("<body>")[1]
    for name in ("rd.png", "widths.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    # Without widths there is no plot over them, and none of an earlier report stays.
    write_video_report(sample()[-3:], tmp_path)
    assert not (tmp_path / "widths.png").exists() and (tmp_path / "rd.png").exists()


def test_bd_rates_stand_against_the_control_and_classical_codecs() -> None:
    found = bd_rates(sample())
    assert list(found["against"]) == ["slim, I frames alone", "x265"]
    assert -50 < found["bd_rate_pct"][0] < -20  # 0.1 to 0.2 of 0.4 to 0.6 bpp less
    assert bd_rates(sample()[:2]).empty


def test_it_is_made_again_from_its_records(tmp_path: Path) -> None:
    write_video_report(sample(), tmp_path / "one", "A title")
    out = call("report", str(tmp_path / "one"), "-o", str(tmp_path / "two"), "--title", "A title")
    assert "crf 22" in out
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes(), file.name
    both = read_video_records([tmp_path / "one", tmp_path / "two" / "records.json"])
    assert len(both) == 2 * len(sample())


def test_damaged_records_end_in_one_line(tmp_path: Path) -> None:
    write_video_report(sample(), tmp_path)
    content = json.loads((tmp_path / "records.json").read_text())
    file = tmp_path / "records.json"
    for change in ({"bpp": "x"}, {"clips": [{"name": "a"}]}, {"gop": None}, {"role": "else"}):
        file.write_text(json.dumps([content[0] | change]))
        with pytest.raises(FileError, match="is a damaged record") as caught:
            read_video_records([tmp_path])
        assert "\n" not in str(caught.value)
    file.write_text(json.dumps([content[0], {"format": "nicprune-record"}]))
    with pytest.raises(FileError, match="holds no records of videos"):
        read_video_records([tmp_path])
    file.write_text(json.dumps([{"format": "nicprune-record"}]))
    assert read_video_records([tmp_path]) == []
    with pytest.raises(FileError, match="no records"):
        write_video_report([], tmp_path)


def test_plots_are_drawn_where_there_is_something_to_show() -> None:
    assert video_rd([]) is None and video_widths(sample()[-3:]) is None
    assert video_widths(sample()[:1]) is None, "one width is no curve"
    light, dark = video_rd(sample()), video_rd(sample(), DARK)
    assert light and dark and light != dark


def test_the_page_of_images_has_the_same_style() -> None:
    folder = Path(image_report.__file__).parent
    for name in ("template.html.j2", "video.html.j2"):
        assert '{% include "style.css.j2" %}' in (folder / name).read_text(encoding="utf-8")
