"""Options that a command has no use for are refused, and files of others stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_cli import call, fails
from PIL import Image

from nicprune.data.images import read_image, write_png
from nicprune.methods import attach
from nicprune.storage.checkpoint import save
from nicprune.storage.named import load_codec

DEMO = "demo-hyperprior"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return write_png(torch.rand(3, 64, 64), tmp_path / "photo.png")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("eval", DEMO, "{photo}", "-q", "1", "--at", "0.3"), "no --at"),
        (("eval", "jpeg", "{photo}", "-q", "50"), "no --quality"),
        (("eval", "jpeg", "{photo}", "--level", "1"), "no --level"),
        (("eval", "webp", "{photo}", "--width", "1"), "no --width"),
        (("eval", "jpeg", "{photo}", "--fast"), "no --fast"),
        (("eval", "jpeg", "{photo}", "--metric", "ms-ssim"), "no --metric"),
        (("eval", "jpeg", "{photo}", "--weights", "none"), "no --weights"),
        (("encode", DEMO, "clip.yuv", "clip.npv", "--domain", "source"), "no --domain"),
        (("eval-video", "clip.yuv", "--codec", DEMO, "--crf", "20"), "no --crf"),
        (("eval-video", "clip.yuv", "--codec", DEMO, "--preset", "slow"), "no --preset"),
        (
            ("eval-video", "clip.yuv", "--codec", "a.safetensors", "--weights", "none"),
            "no --weights",
        ),
        (("time", "a.safetensors", "--weights", "none"), "no --weights"),
        (("eval", "a.safetensors", "{photo}", "--weights", "none"), "no --weights"),
        (("eval", "jpeg", "{photo}", "-o", "{photo}.json"), "no --output"),
        (
            (
                "prune",
                DEMO,
                "o.safetensors",
                "-q",
                "1",
                "--set",
                "budget.macs=0.5",
                "--size",
                "9x9",
            ),
            "--size is for budget.encode_s",
        ),
        (
            (*f"prune {DEMO} o.safetensors -q 1 --set budget.macs=0.5 --precision".split(), "int8"),
            "--precision is for budget.encode_s",
        ),
        (
            (*f"prune {DEMO} o.safetensors -q 1 --set budget.macs=0.5 --images".split(), "{photo}"),
            "'magnitude' looks at no images",
        ),
        (
            (
                *f"prune {DEMO} o.safetensors -q 1 --method random --set budget.macs=0.5".split(),
                *("--images", "samples"),
            ),
            "'random' looks at no images",
        ),
        (("encode", DEMO, "{photo}", "{photo}.nic", "--weights", "none", "-q", "1"), "trained"),
        (("encode", DEMO, "{photo}", "coded.png", "-q", "1"), "another ending"),
        (("export", DEMO, "codec.safetensors", "-q", "1"), "another ending, .pth.tar"),
    ],
)
def test_what_would_be_ignored_is_refused(
    arguments: tuple[str, ...],
    said: str,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    given = [argument.format(photo=photo) for argument in arguments]
    assert said in fails(monkeypatch, capsys, *given)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "command",
    [
        "eval {codec} {photo}",
        "encode {codec} {photo} photo.nic",
        "decode {codec} photo.nic other.png",
        "encode {codec} clip_64x64.yuv clip.npv",
        "decode {codec} clip.npv frames",
        "profile {codec}",
        "prune {codec} small.safetensors --set budget.macs=0.5",
        "verify photo.nic --codec {codec}",
        "time {codec} other={codec}",
        "eval-video {photo} --codec {codec}",
    ],
)
@pytest.mark.parametrize("option", [("-q", "2"), ("--metric", "ms-ssim")])
def test_a_file_has_its_own_quality_and_metric(
    command: str,
    option: tuple[str, str],
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip_64x64.yuv").write_bytes(bytes(64 * 64 * 3 // 2))
    given = command.format(photo=photo, codec=tmp_path / "codec.safetensors").split()
    told = fails(monkeypatch, capsys, *given, *option)
    assert "codec.safetensors, a codec in a file, has no --" in told


def test_the_size_of_a_yuv_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "clip_64x64.yuv"
    raw.write_bytes(bytes(64 * 64 * 3 // 2 * 2))
    told = fails(
        monkeypatch, capsys, "encode", DEMO, str(raw), str(tmp_path / "c.npv"), "--size", "32x32"
    )
    assert "64x64" in told and "32x32" in told


def test_decode_replaces_its_own_pictures_alone(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, coded, out = tmp_path / "theirs.png", tmp_path / "photo.nic", tmp_path / "out.png"
    Image.new("RGB", (8, 8)).save(theirs)
    call("encode", DEMO, str(photo), str(coded), "-q", "1")
    for _ in range(2):
        call("decode", DEMO, str(coded), str(out), "-q", "1")
    assert "--force" in fails(
        monkeypatch, capsys, "decode", DEMO, str(coded), str(theirs), "-q", "1"
    )
    assert read_image(theirs).shape == (3, 8, 8)
    call("decode", DEMO, str(coded), str(theirs), "-q", "1", "--force")
    assert torch.equal(read_image(theirs), read_image(out))


def test_a_codec_with_methods_is_not_run_by_a_backend(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slim = attach(load_codec(DEMO, 1), "slimmable", widths=[1.0, 0.5])
    file, out = save(slim, tmp_path / "slim.safetensors"), tmp_path / "photo.nic"
    told = fails(
        monkeypatch, capsys, "encode", str(file), str(photo), str(out), "--backend", "torch"
    )
    assert "extract(width)" in told and "Attached" not in told


def test_the_bound_on_pixels_is_ours_alone(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own, which warns or raises, cannot be set from the command line."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(photo).shape == (3, 64, 64)
    assert Image.MAX_IMAGE_PIXELS == 100
