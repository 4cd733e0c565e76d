"""`nicprune verify`: what is whole, what made it, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import built
from helpers_cli import call, fails
from safetensors.torch import load_file, save_file

from nicprune.codecs.rans import Symbols
from nicprune.common.errors import CodecError, FileError
from nicprune.common.machine import versions
from nicprune.data.images import write_png
from nicprune.methods import attach
from nicprune.storage.adaptation import save_adaptation
from nicprune.storage.checkpoint import FORMAT, _digest, read_header, save
from nicprune.storage.coded_image import EARLIER, HEADER, MAGIC
from nicprune.storage.container import encode
from nicprune.storage.identity import fingerprint, mark
from nicprune.storage.verify import verify


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A pruned codec with a modulator, and an image that it coded."""
    small = attach(
        built("bmshj2018-hyperprior")[0], "magnitude", budget={"macs": 0.5}, round_to=1
    ).harden()
    codec = attach(small, "bit_rate_modulator", qualities=[1, 2])
    picture = write_png(torch.rand(3, 70, 90), tmp_path / "a.png")
    found = {"codec": save(codec, tmp_path / "c.safetensors"), "image": tmp_path / "a.nic"}
    found["image"].write_bytes(encode(codec, picture))
    found["other"] = save(built("mbt2018-mean")[0], tmp_path / "o.safetensors")
    found["picture"] = picture
    return found


def test_files_that_are_whole(files: dict[str, Path]) -> None:
    from nicprune.storage.checkpoint import load

    out = call("verify", str(files["codec"]), str(files["image"]), "--codec", str(files["codec"]))
    codec, image = out.split(f"{files['image']}: ")
    model = load(files["codec"])
    own = mark(fingerprint(model), model).hex()
    for expected in (
        f"{files['codec']}: whole (codec)",
        f"nicprune {versions()['nicprune']}, torch {versions()['torch']}",
        "ScaleHyperprior",
        "digest      fits",
        f"codec       {own}",
        "methods     bit_rate_modulator",
        "step 1      magnitude: ",
        "x fewer MACs",
        f"{sum(p.numel() for p in model.parameters()):,}",
    ):
        assert expected in codec
    size = files["image"].stat().st_size
    for expected in (
        "whole (coded image)",
        "90x70 pixels",
        f"{size:,} bytes, {8 * size / 6300:.4f} bpp",
        own,
        "float64",
        "coded at            level 1\n",
        "all symbols are the encoder's",
    ):
        assert expected in image
    assert "decoded" not in call("verify", str(files["image"]))


GROWN = {"domain": "screen", "grow": 0.25, "round_to": 1}


@pytest.mark.parametrize(
    ("method", "settings", "rate", "told"),
    [
        ("bit_rate_modulator", {"qualities": [1, 2]}, {"level": 0}, "level 0"),
        ("slimmable", {"widths": [1.0, 0.5], "round_to": 1}, {"width": 1}, "width 1"),
        ("adaptation", GROWN, {"domain": "screen"}, "domain screen"),
        ("adaptation", GROWN, {"domain": 0}, None),
    ],
)
def test_the_point_of_a_coded_image_is_told(
    method: str, settings: dict[str, Any], rate: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    codec = attach(built("bmshj2018-hyperprior")[0], method, **settings)
    file = tmp_path / "a.nic"
    file.write_bytes(encode(codec, torch.zeros(3, 64, 64, dtype=torch.uint8), **rate))
    assert verify(file, codec).facts.get("coded at") == told


def test_an_adaptation_alone_is_verified_without_its_codec_and_with_it(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = built("bmshj2018-hyperprior")[0]
    codec = str(save(source, tmp_path / "source.safetensors"))
    alone = save_adaptation(attach(source, "adaptation", **GROWN), tmp_path / "screen.safetensors")
    found = call("verify", str(alone))
    for expected in (
        f"{alone}: whole (adaptation)",
        "domain        screen",
        "digest        fits",
        "needs its codec, which --codec names",
        "methods       adaptation",
    ):
        assert expected in found
    assert "over the codec that it adapts" in call("verify", str(alone), "--codec", codec)
    told = fails(monkeypatch, capsys, "verify", str(alone), "--codec", str(files["other"]))
    assert "adapts another codec" in told and told.count("\n") == 1
    content = bytearray(alone.read_bytes())
    content[-9] ^= 4
    alone.write_bytes(content)
    assert "checksum does not fit" in fails(monkeypatch, capsys, "verify", str(alone))


def test_each_file_that_is_not_whole_is_named(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damaged = []
    for name in ("codec", "image"):
        content = bytearray(files[name].read_bytes())
        content[-9] ^= 4
        damaged.append(tmp_path / f"damaged-{files[name].name}")
        damaged[-1].write_bytes(content)
    told = fails(
        monkeypatch, capsys, "verify", *map(str, damaged), str(files["picture"]), "nowhere",
        str(files["image"]),
    )  # fmt: skip
    lines = told.splitlines()
    assert [line.startswith("nicprune: ") for line in lines] == [True] * 4
    for line, expected in zip(
        lines,
        ("checksum does not fit", "checksum does not fit", "neither a codec", "no such file"),
        strict=True,
    ):
        assert expected in line


def test_an_image_is_decoded_by_its_codec_alone(files: dict[str, Path]) -> None:
    from nicprune.storage.checkpoint import load

    with pytest.raises(FileError, match="coded with another codec"):
        verify(files["image"], load(files["other"]))
    codec = load(files["codec"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Symbols, "digest", lambda self, strings: b"another!")
        with pytest.raises(FileError, match="symbols differ from the encoder's"):
            verify(files["image"], codec)
    assert verify(files["image"], codec).facts["decoded"]


def test_an_image_of_an_earlier_version_says_that_it_carries_no_digest(
    files: dict[str, Path],
) -> None:
    import zlib

    from nicprune.storage.checkpoint import load

    codec = load(files["codec"])
    data = encode(codec, files["picture"], fast=True)
    body = MAGIC + b"\2" + data[len(MAGIC) + 1 : EARLIER.size] + data[HEADER.size : -4]
    files["image"].write_bytes(body + zlib.crc32(body).to_bytes(4, "big"))
    found = verify(files["image"], codec).facts
    assert (found["format"], found["entropy parameters"]) == ("version 2", "float32")
    assert found["symbols"] == "no digest" and "is not known" in found["decoded"]


def test_a_codec_of_somebodys_own_class_is_whole_without_being_loaded(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nicprune.storage import verify as module

    def foreign(path: Path) -> None:
        raise CodecError("pass factory=")

    monkeypatch.setattr(module, "load", foreign)
    assert verify(files["codec"]).facts["loaded"] == "not here: pass factory="
    header, tensors = module.read_contents(files["codec"])
    header.pop("digest")
    monkeypatch.setattr(module, "read_contents", lambda path: (header, tensors))
    with pytest.raises(CodecError, match="factory"):
        verify(files["codec"])


def test_files_say_by_which_versions_they_were_made(files: dict[str, Path], tmp_path: Path) -> None:
    header, tensors = read_header(files["codec"]), load_file(files["codec"])
    assert header["versions"] == versions()
    json.dumps(header["versions"])
    del header["versions"]  # as earlier versions wrote it
    header["digest"] = _digest(header, tensors)
    earlier = tmp_path / "earlier.safetensors"
    save_file(tensors, earlier, metadata={FORMAT: json.dumps(header)})
    assert verify(earlier).facts["made by"].startswith("not recorded")
