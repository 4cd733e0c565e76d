"""Codecs whose latents are smaller than a 64th of the image a side."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.layers import GDN
from compressai.models import FactorizedPrior, ScaleHyperprior
from compressai.models.utils import conv, deconv
from torch import Tensor, nn

import nicprune as nip
from nicprune.codecs.example import image_shape, size_multiple
from nicprune.common.errors import CodecError, DataError, RecipeError
from nicprune.data.clips import clips_in
from nicprune.data.images import calibration_images, write_png
from nicprune.evaluation.transform_times import time_codecs
from nicprune.evaluation.video import evaluate_video
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.resolve import resolve
from nicprune.runtime import latency, layer_forms
from nicprune.storage.export import export_onnx
from nicprune.storage.video_container import decode_video, encode_video


class Deep(ScaleHyperprior):
    """A hyperprior of seven or eight halvings: a total stride of 128 or 256 pixels."""

    def __init__(self, N: int = 8, M: int = 12, more: int = 1):
        super().__init__(N, M)
        for _ in range(more):
            self.h_a.extend([nn.ReLU(), conv(N, N)])
            self.h_s.insert(0, nn.ReLU())
            self.h_s.insert(0, deconv(N, N))


class Rounding(FactorizedPrior):
    """A stride of 128, of which a smaller image comes back larger than it was, without an error."""

    def __init__(self, N: int = 8, M: int = 12):
        super().__init__(N, M)
        self.g_a = nn.Sequential(
            *(m for _ in range(7) for m in (conv(3, 3), GDN(3))), conv(3, M, 1, 1)
        )
        self.g_s = nn.Sequential(
            conv(M, 3, 1, 1), *(m for _ in range(7) for m in (deconv(3, 3), GDN(3)))
        )


class Stride48(FactorizedPrior):
    """A stride that is no power of two."""

    def __init__(self, N: int = 8, M: int = 12):
        super().__init__(N, M)
        self.g_a = nn.Sequential(
            nn.Conv2d(3, N, 5, 3, 2), nn.ReLU(), nn.Conv2d(N, N, 4, 4), nn.ReLU(),
            nn.Conv2d(N, M, 4, 4),
        )  # fmt: skip
        self.g_s = nn.Sequential(
            nn.ConvTranspose2d(M, N, 4, 4), nn.ReLU(), nn.ConvTranspose2d(N, N, 4, 4), nn.ReLU(),
            nn.ConvTranspose2d(N, 3, 3, 3),
        )  # fmt: skip


class Halving(FactorizedPrior):
    """Decodes to an image of half the size."""

    def __init__(self, N: int = 8, M: int = 12):
        super().__init__(N, M)
        self.g_s = nn.Sequential(*list(self.g_s)[:-1])
        self.g_s[4] = conv(N, 3, stride=1)
        self.g_s[5] = nn.Identity()


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A photograph of noise, uint8."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=draw, dtype=torch.uint8)


def made(codec: Any) -> Any:
    """A codec with weights that are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = codec()
    found.update()
    return found.eval()


STRIDES: dict[str, tuple[Any, int]] = {
    "hyperprior of 128": (Deep, 128),
    "rounding": (Rounding, 128),
    "stride 48": (Stride48, 192),
}


@pytest.fixture(params=list(STRIDES))
def deep(request: pytest.FixtureRequest) -> tuple[Any, int]:
    """A codec, and its stride."""
    make, stride = STRIDES[request.param]
    return made(make), stride


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of sides that are multiples of nothing."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        write_png(picture(270, 300, seed=i).float() / 255, folder / f"{i}.png")
    return folder


def test_the_stride_is_found(deep: tuple[Any, int], hyperprior: nn.Module) -> None:
    codec, stride = deep
    assert size_multiple(codec) == image_shape(codec)[1] == stride
    assert size_multiple(hyperprior) == 64
    assert size_multiple(Deep(more=2)) == 256


class Demanding(FactorizedPrior):
    """It takes no image of less than 200 pixels a side, and has a stride of 16."""

    def forward(self, x: Tensor) -> Any:
        if min(x.shape[-2:]) < 200:
            raise ValueError("too small")
        return super().forward(x)


def test_a_codec_of_large_images_need_not_have_their_stride() -> None:
    codec = made(lambda: Demanding(8, 12))
    assert image_shape(codec) == (3, 256) and size_multiple(codec) == 64


def test_a_codec_that_gives_no_image_of_its_size_back_is_named(pictures: Path) -> None:
    codec = made(Halving)
    settings: dict[str, Any] = {"batch_size": 1, "patch_size": 64, "progress": False}
    for act in (
        lambda: nip.evaluate(codec, pictures),
        lambda: nip.fit(codec, pictures, steps=1, lmbda=0.01, **settings),
        lambda: nip.encode(codec, picture(64, 64)),
    ):
        with pytest.raises(CodecError, match="Halving decodes to images of another size") as told:
            act()
        assert "\n" not in str(told.value)
    assert nip.measure(codec).macs


def test_images_of_any_size_are_coded(deep: tuple[Any, int]) -> None:
    codec, _ = deep
    for height, width in ((1, 1), (63, 130), (128, 192), (300, 257)):
        coded = nip.encode(codec, picture(height, width))
        assert nip.decode(codec, coded).shape == (3, height, width)


def test_it_is_pruned_trained_and_evaluated(deep: tuple[Any, int], pictures: Path) -> None:
    codec, stride = deep
    masked = nip.attach(codec, "mask_decay", budget={"macs": 0.8}, round_to=1, decay_steps=2)
    settings: dict[str, Any] = {"batch_size": 1, "precision": "32", "progress": False}
    with pytest.raises(RecipeError, match=f"patch_size must be a multiple of {stride}"):
        nip.fit(masked, pictures, steps=4, lmbda=0.01, patch_size=64, **settings)
    nip.fit(masked, pictures, steps=4, lmbda=0.01, patch_size=stride, **settings)
    found = nip.evaluate(masked.harden(), pictures)
    assert found.mean("psnr_db") and found.mean("bpp")


def test_images_of_other_sides_are_refused_by_methods(
    deep: tuple[Any, int], pictures: Path
) -> None:
    codec, stride = deep
    fisher = nip.attach(codec, "fisher", budget={"macs": 0.8}, round_to=1)
    with pytest.raises(DataError, match=f"multiples of {stride} pixels"):
        fisher.prepare([torch.rand(1, 3, stride, stride + 64)])
    fisher.prepare(calibration_images(pictures, multiple=stride))
    assert fisher.harden()(torch.rand(1, 3, stride, stride))["x_hat"].shape[-1] == stride
    with pytest.raises(DataError, match="as large as 512x512"):
        calibration_images(pictures, multiple=512)


ODD = picture(70, 190)
"""128 x 192 pixels as multiples of 64."""


def test_it_is_timed_and_accelerated(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NICPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(
        layer_forms, "seconds_of_forms", lambda forms, *rest: dict.fromkeys(forms, 1.0)
    )
    for name in ("TURNS", "LAYER_TURNS", "LIMIT"):
        monkeypatch.setattr(latency, name, 1)
    monkeypatch.setattr(latency, "FRACTIONS", (1.0,))
    codec = made(Deep)
    assert time_codecs({"codec": codec}, pictures / "0.png", repeats=1, limit=0)
    fast = nip.accelerate(codec, backend="torch", image=ODD)
    assert nip.decode(codec, nip.encode(fast, ODD)).shape == ODD.shape
    assert nip.measure_latency(codec, size=(128, 192)).parts


@pytest.mark.slow
def test_its_transforms_are_exported(tmp_path: Path) -> None:
    assert {file.stem for file in export_onnx(made(Deep), tmp_path)} == {"g_a", "h_a", "h_s", "g_s"}


def test_frames_are_coded(deep: tuple[Any, int], tmp_path: Path) -> None:
    codec, _ = deep
    for i in range(2):
        write_png(picture(*ODD.shape[1:], seed=i).float() / 255, tmp_path / f"{i}.png")
    (clip,) = clips_in(tmp_path)
    assert evaluate_video(codec, [clip], gop=1).mean("bpp")
    encode_video(codec, clip, tmp_path / "a.npv", gop=1)
    frames = list(decode_video(codec, tmp_path / "a.npv"))
    assert [frame.shape for frame in frames] == [ODD.shape] * 2


def test_a_recipe_is_told_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, pictures: Path, tmp_path: Path
) -> None:
    offered = types.SimpleNamespace(make=lambda quality: Deep())
    monkeypatch.setitem(sys.modules, "deep_codecs", offered)
    content = {
        "version": 1,
        "name": "deep",
        "codec": "deep_codecs:make",
        "qualities": [1],
        "lambdas": {1: 0.01},
        "photographs": {"train": str(pictures), "test": str(pictures), "overlap": True},
        "training": {"batch_size": 1, "patch_size": 128, "precision": "32"},
        "sparsify": {"steps": 4},
        "finetune": {"steps": 2},
        "methods": [{"name": "mask_decay", "budget": {"macs": 0.5}, "round_to": 1}],
    }
    assert resolve(parse_recipe(content, "recipe"), tmp_path)
    content["training"] = {"batch_size": 1, "patch_size": 192, "precision": "32"}
    with pytest.raises(RecipeError, match="patch_size must be a multiple of 128"):
        resolve(parse_recipe(content, "recipe"), tmp_path)
