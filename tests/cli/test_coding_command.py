"""`nicprune encode` and `nicprune decode`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import built
from helpers_cli import call, fails
from PIL import Image

from nicprune.data.images import read_image, write_png
from nicprune.runtime.backends import BACKENDS
from nicprune.storage.checkpoint import load, save
from nicprune.storage.container import decode


def test_encode_and_decode(tmp_path: Path) -> None:
    import torch

    from nicprune.data.images import read_image, write_png
    from nicprune.evaluation.evaluate import evaluate
    from nicprune.methods import attach
    from nicprune.storage.container import decode, encode

    picture = write_png(torch.rand(3, 67, 130), tmp_path / "a.png")
    codec = built("bmshj2018-hyperprior")[0]
    path = str(save(codec, tmp_path / "c.safetensors"))
    coded, decoded = tmp_path / "a.nic", tmp_path / "out.png"
    coded.write_text("something older")
    out = call("encode", path, str(picture), str(coded), "--force")
    size = coded.stat().st_size
    assert (
        f"{size:,} bytes" in out and f"{8 * size / (67 * 130):.4f} bpp" in out and "130x67" in out
    )
    assert coded.read_bytes() == encode(codec, picture)
    assert "wrote" in call("decode", path, str(coded), str(decoded))
    assert torch.equal(read_image(decoded), decode(codec, coded))
    modulated = attach(codec, "bit_rate_modulator", lambdas=[0.0018, 0.0067, 0.025])
    path = str(save(modulated, tmp_path / "m.safetensors"))
    for rate in (["--level", "0.5"], ["--lmbda", "0.0067"]):
        call("encode", path, str(picture), str(coded), *rate)
        assert coded.read_bytes() == encode(
            modulated, picture, **{rate[0].removeprefix("--"): float(rate[1])}
        )
        call("decode", path, str(coded), str(decoded))
        assert torch.equal(read_image(decoded), decode(modulated, coded))
        assert str(
            evaluate(modulated, str(picture), **{rate[0].removeprefix("--"): float(rate[1])})
        ).split(" dB")[0] in call("eval", path, str(picture), *rate)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.nic",
        "a.png",
        "c.safetensors",
        "m.safetensors",
        "out.png",
    ]


@pytest.mark.parametrize(
    ("mode", "transparent"),
    [("RGB", False), ("L", False), ("RGBA", True), ("LA", True), ("P", True)],
)
def test_that_transparency_is_left_out_is_said(
    mode: str, transparent: bool, tmp_path: Path
) -> None:
    picture, codec = tmp_path / "a.png", tmp_path / "c.safetensors"
    save(built("bmshj2018-factorized")[0], codec)
    settings = {"transparency": 0} if mode == "P" else {}
    Image.new(mode, (70, 66)).save(picture, **settings)
    out = call("encode", str(codec), str(picture), str(tmp_path / "a.nic"))
    assert ("(70x66 pixels; its transparency is left out)" in out) == transparent
    assert ("(70x66 pixels)" in out) != transparent


def test_encode_and_decode_fail_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from nicprune.data.images import write_png

    picture = str(write_png(torch.rand(3, 64, 64), tmp_path / "a.png"))
    codec = str(save(built("bmshj2018-hyperprior")[0], tmp_path / "c.safetensors"))
    out, png = tmp_path / "a.nic", tmp_path / "b.png"
    for arguments, expected in (
        (["encode", codec, str(tmp_path / "nowhere.png"), str(out)], "no such image"),
        (["encode", codec, picture, str(out), "--level", "1"], "need a modulator"),
        (["decode", codec, picture, str(png)], "not an image that nicprune encoded"),
        (["decode", codec, str(out), str(png)], "no such file"),
        (["decode", codec, picture, str(tmp_path / "b.jpg")], "must end in .png"),
    ):
        err = fails(monkeypatch, capsys, *arguments)
        assert expected in err and err.startswith("nicprune: ") and err.count("\n") == 1
    assert not out.exists() and not png.exists()


def test_the_picture_is_exact_or_entropy_parameters_are_fast_if_asked(tmp_path: Path) -> None:
    import torch

    from nicprune.data.images import read_image, write_png
    from nicprune.evaluation.evaluate import evaluate
    from nicprune.storage.container import decode, encode

    codec = built("bmshj2018-hyperprior")[0]
    file, picture = save(codec, tmp_path / "c.safetensors"), tmp_path / "a.png"
    write_png(torch.rand(3, 64, 96), picture)
    coded, decoded = tmp_path / "a.nic", tmp_path / "b.png"
    call("encode", str(file), str(picture), str(coded), "--fast")
    assert coded.read_bytes() == encode(codec, picture, fast=True) != encode(codec, picture)
    call("encode", str(file), str(picture), str(coded))
    call("decode", str(file), str(coded), str(decoded), "--exact")
    assert torch.equal(read_image(decoded), decode(codec, coded, exact=True))
    expected = str(evaluate(codec, picture, fast=True)).split(" dB")[0]
    assert expected in call("eval", str(file), str(picture), "--fast")


@pytest.mark.parametrize("command", ["encode", "decode", "eval", "check", "verify"])
def test_images_of_too_many_pixels_are_refused_before_any_work(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    from nicprune.data.images import max_pixels, write_png
    from nicprune.storage import container
    from nicprune.storage.container import encode

    monkeypatch.delenv("NICPRUNE_MAX_PIXELS", raising=False)
    codec = built("bmshj2018-hyperprior")[0]
    file, picture = str(save(codec, tmp_path / "c.safetensors")), str(tmp_path / "a.png")
    write_png(torch.rand(3, 80, 90), picture)
    coded, out = tmp_path / "a.nic", str(tmp_path / "out.png")
    coded.write_bytes(encode(codec, picture))
    recipe = ["mask_decay_mbt2018", "--set", f"photographs.train={picture}"]
    recipe += [
        "--set",
        f"photographs.test={picture}",
        "--set",
        "training.patch_size=64",
        "--set",
        "photographs.overlap=true",
    ]
    arguments = {
        "encode": [file, picture, str(tmp_path / "b.nic")],
        "decode": [file, str(coded), out],
        "eval": [file, picture],
        "check": [*recipe, "--set", "weights=none"],
        "verify": [str(coded)],
    }[command]
    before = max_pixels()

    def unwanted(*args: object, **kwargs: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(container, "copy_codec", unwanted)
    told = fails(monkeypatch, capsys, command, *arguments, "--max-pixels", "7199")
    assert "90x80 pixels, more than the 7,199 that are allowed; --max-pixels" in told
    assert max_pixels() == before, "the bound is that of one command"
    monkeypatch.undo()
    if command != "check":
        call(command, *arguments, "--max-pixels", "7200")


@pytest.mark.parametrize(
    "backend",
    ["torch", *(pytest.param(b, marks=pytest.mark.slow) for b in ("onnxruntime", "openvino"))],
)
def test_files_of_a_backend_are_read_by_the_codec_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    for package in BACKENDS[backend].packages:
        pytest.importorskip(package)
    monkeypatch.setenv("NICPRUNE_CACHE", str(tmp_path / "cache"))
    picture = str(write_png(torch.rand(3, 67, 70), tmp_path / "a.png"))
    codec = str(save(built("bmshj2018-hyperprior")[0], tmp_path / "c.safetensors"))
    options: list[tuple[list[str], list[str]]] = [
        (["--backend", backend], []),
        ([], ["--backend", backend]),
    ]
    for encoding, decoding in options:
        coded, png = tmp_path / "a.nic", tmp_path / "b.png"
        call("encode", codec, picture, str(coded), "--force", *encoding)
        call("decode", codec, str(coded), str(png), "--force", *decoding)
        plain = decode(load(codec), coded)
        assert int((read_image(png).int() - plain.int()).abs().max()) <= 1


def test_backends_code_or_refuse_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NICPRUNE_CACHE", str(tmp_path / "cache"))
    picture = str(write_png(torch.rand(3, 64, 64), tmp_path / "a.png"))
    codec = str(save(built("bmshj2018-hyperprior")[0], tmp_path / "c.safetensors"))
    coded, png = str(tmp_path / "a.nic"), str(tmp_path / "b.png")
    call("encode", codec, picture, coded)
    for arguments, expected in (
        (["encode", codec, picture, coded, "--force", "--backend", "tensorrt"], "unknown backend"),
        (["decode", codec, coded, png, "--backend", "tensorrt"], "unknown backend"),
        (["decode", codec, coded, png, "--backend", "torch", "--exact"], "exact computes"),
    ):
        assert expected in fails(monkeypatch, capsys, *arguments)
    assert not Path(png).exists()
