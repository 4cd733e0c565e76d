"""`nicprune encode`, `decode`, `verify` and `eval-video` of clips."""

from __future__ import annotations

import shutil
from pathlib import Path

import elsewhere
import pytest
import torch
from helpers import built
from helpers_cli import call, fails
from helpers_video import HEIGHT, WIDTH, moving, written

from nicprune.data.clips import clips_in
from nicprune.data.images import write_png
from nicprune.methods import attach
from nicprune.storage.checkpoint import save
from nicprune.storage.coded_video import open_video
from nicprune.storage.video_container import decode_video, encode_video


@pytest.fixture
def there(tmp_path: Path) -> dict[str, str]:
    """A clip, a slimmable codec, and the codec itself."""
    codec = built("bmshj2018-hyperprior")[0]
    written(tmp_path / "a.y4m", moving(3))
    save(codec, tmp_path / "c.safetensors")
    save(attach(codec, "slimmable", widths=[1.0, 0.5], round_to=1), tmp_path / "s.safetensors")
    return {
        name: str(tmp_path / name)
        for name in (
            "a.y4m",
            "c.safetensors",
            "s.safetensors",
            "a.npv",
            "out",
            "out.mp4",
            "out.y4m",
        )
    }


def test_a_clip_is_encoded_and_decoded_in_another_process(
    there: dict[str, str], tmp_path: Path
) -> None:
    from nicprune.storage.checkpoint import load

    out = call("encode", there["s.safetensors"], there["a.y4m"], there["a.npv"], "--width", "1")
    size = Path(there["a.npv"]).stat().st_size
    assert f"3 frames of {WIDTH}x{HEIGHT} pixels in 3 groups, {size:,} bytes" in out
    encode_video(load(there["s.safetensors"]), clips_in(there["a.y4m"])[0], tmp_path / "b", width=1)
    assert (tmp_path / "b").read_bytes() == Path(there["a.npv"]).read_bytes()
    done = elsewhere.run(
        "from nicprune.cli.application import main; main()",
        *("decode", there["s.safetensors"], there["a.npv"], there["out"]),
    )
    assert done.returncode == 0, done.stderr
    assert f"wrote {there['out']} (3 frames of {WIDTH}x{HEIGHT} pixels)" in done.stdout
    here = list(decode_video(load(there["s.safetensors"]), there["a.npv"]))
    (again,) = clips_in(there["out"])
    assert len(again) == 3 and all(map(torch.equal, again.frames(), here))
    found = call("verify", there["a.npv"], "--codec", there["s.safetensors"])
    assert "whole (coded video)" in found and "all symbols are the encoder's" in found


def test_outputs_and_their_options(there: dict[str, str]) -> None:
    codec, coded = there["c.safetensors"], there["a.npv"]
    call("encode", codec, there["a.y4m"], coded, "--gop", "2", "--frames", "2")
    with open_video(coded) as video:
        assert video.header.gop == 2 and len(list(video.frames())) == 2
    for name in ("out", "out.mp4", "out.y4m"):
        for _ in range(2):  # a script may run again
            assert "2 frames" in call("decode", codec, coded, there[name])
        assert len(clips_in(there[name])[0]) == 2
    frames = Path(there["out"])
    call("encode", codec, str(frames), coded)  # a folder of frames
    raw = frames.parent / "nameless.yuv"
    raw.write_bytes(bytes(2 * 96 * 64 * 3 // 2))
    assert "96x64" in call("encode", codec, str(raw), coded, "--size", "96x64")


def test_of_a_damaged_file_the_frames_before_are_written(
    there: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codec, coded = there["c.safetensors"], Path(there["a.npv"])
    call("encode", codec, there["a.y4m"], str(coded))
    coded.write_bytes(coded.read_bytes()[:-40])
    for name in ("out", "out.mp4", "out.y4m"):
        err = fails(monkeypatch, capsys, "decode", codec, str(coded), there[name])
        assert err.startswith(f"nicprune: {coded} is damaged or cut short at frame 2 (at byte ")
        assert err.endswith(f"; the 2 frames before it are in {there[name]}\n")
        assert err.count("\n") == 1
        assert len(clips_in(there[name])[0]) == 2
    err = fails(monkeypatch, capsys, "verify", str(coded))
    assert "damaged or cut short at frame 2" in err


def test_what_does_not_fit_ends_in_one_line(
    there: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codec, clip, coded = there["c.safetensors"], there["a.y4m"], there["a.npv"]
    picture = str(write_png(torch.rand(3, 64, 64), tmp_path / "f" / "a.png"))
    written(tmp_path / "f" / "b.y4m", moving(1))
    call("encode", codec, clip, coded, "--frames", "1")
    for arguments, expected in (
        (["encode", codec, clip, "a.nic"], "is a video or a folder: encode it into a .npv"),
        (["encode", codec, picture, coded], "is an image"),
        (["encode", codec, str(tmp_path / "f"), coded], "holds 2 clips"),
        (["encode", codec, clip, coded, "--lmbda", "0.01"], "coding a video has no --lmbda"),
        (["encode", codec, clip, coded, "--fast"], "coding a video has no --fast"),
        (["encode", codec, clip, coded, "--width", "1"], "width"),
        (["encode", codec, picture, "a.nic", "--gop", "8"], "coding an image has no --gop"),
        (["encode", codec, clip, clip], "is a video or a folder"),
        (["encode", codec, clip, codec.replace("c.safe", "d.safe"), "--gop", "8"], "no --gop"),
        (["encode", codec, clip, coded, "--max-pixels", "100"], "more than the 100"),
        (["decode", codec, coded, "a.webm"], "another suffix"),
        (["decode", codec, coded, there["out"], "--exact"], "decoding a video has no --exact"),
        (["decode", codec, coded, coded], "another suffix"),
        (["decode", codec, coded, str(tmp_path / "f")], "holds other files than frames"),
        (["decode", codec, str(tmp_path / "none.npv"), there["out"]], "no such video"),
        (["decode", codec, coded, there["out"], "--max-pixels", "100"], "more than the 100"),
        (["eval", codec, clip], "nicprune eval-video"),
        (["eval-video", clip], "name a --codec or a --classical codec"),
        (
            ["eval-video", clip, "--classical", "x264", "--quality", "3"],
            "a classical one has no --quality",
        ),
        (["eval-video", clip, "--classical", "x264", "--no-control"], "one has no --no-control"),
        (["eval-video", clip, "--classical", "vp9"], "unknown classical codec 'vp9'"),
    ):
        err = fails(monkeypatch, capsys, *arguments)
        assert expected in err and err.startswith("nicprune: ") and err.count("\n") == 1
    assert "WIDTHxHEIGHT" in fails(monkeypatch, capsys, "encode", codec, clip, coded, "--size", "9")
    before = Path(coded).read_bytes()
    Path(coded).write_text("notes")
    assert "--force" in fails(monkeypatch, capsys, "encode", codec, clip, coded)
    call("encode", codec, clip, coded, "--frames", "1", "--force")
    assert Path(coded).read_bytes() == before


def test_what_a_classical_codec_refuses_is_noticed_before_the_work(
    there: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nicprune.storage.named.load_codec", None)  # nothing is loaded
    err = fails(
        monkeypatch, capsys, "eval-video", there["a.y4m"], "--codec", there["c.safetensors"],
        "--classical", "x264", "--preset", "never",
    )  # fmt: skip
    assert err.startswith("nicprune: x264 does not code a.y4m: ") and err.count("\n") == 1


def test_codecs_of_one_name_in_two_folders_have_labels_of_their_own(
    there: dict[str, str], tmp_path: Path
) -> None:
    given = []
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        given.append(str(shutil.copy(there["c.safetensors"], tmp_path / folder)))
    slim = there["s.safetensors"]
    codecs = [*given, f"{slim}@0", f"{slim}@1", f"curve={given[0]}", f"curve={given[1]}"]
    options = [word for codec in codecs for word in ("--codec", codec)]
    out = call("eval-video", there["a.y4m"], *options, "--frames", "1")
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["c (1)", "c (2)", "s", "s", "curve", "curve"]


def test_evaluation_of_every_width_beside_x264(there: dict[str, str], tmp_path: Path) -> None:
    clip = written(tmp_path / "b.y4m", moving(2, 63, 95))
    out = call(
        "eval-video", str(clip), "--codec", f"slim={there['s.safetensors']}",
        "--codec", f"one={there['s.safetensors']}@1", "--classical", "x264", "--crf", "20",
        "--crf", "30", "--frames", "2", "--report", str(tmp_path / "r"),
    )  # fmt: skip
    rows = [line.split("|")[1:3] for line in out.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in row] for row in rows[1:]] == [
        ["slim", "width 0"],
        ["slim", "width 1"],
        ["one", "width 1"],
        ["x264", "crf 20"],
        ["x264", "crf 30"],
    ]
    assert (tmp_path / "r" / "index.html").exists() and (tmp_path / "r" / "widths.png").exists()
