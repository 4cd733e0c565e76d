"""Codecs of grey images, and codecs that need more than an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import METHOD_SETTINGS, image
from PIL import Image
from renamed_codecs import renamed_codec
from torch import Tensor, nn
from zoo_of_blocks import BlockCodec

import nicprune as nip
from nicprune.codecs.calling import EXAMPLE
from nicprune.common.errors import CodecError, DataError
from nicprune.data.images import to_channels
from nicprune.evaluation.transform_times import time_codecs
from nicprune.pruning.surgery import analyse
from nicprune.storage.export import export_onnx


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small colour images."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(2):
        values = rng.integers(0, 256, (6, 5, 3)).astype(np.uint8)
        Image.fromarray(values).resize((80, 96), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


# -- grey -----------------------------------------------------------------------------------------


def test_grey_is_pillows() -> None:
    values = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    picture = torch.from_numpy(values).permute(2, 0, 1)
    grey = to_channels(picture, 1)
    assert torch.equal(grey[0], torch.from_numpy(np.array(Image.fromarray(values).convert("L"))))
    floats = to_channels(picture[None].double() / 255, 1)
    assert floats.shape == (1, 1, 64, 64) and (floats[0] * 255 - grey).abs().max() <= 0.5
    assert to_channels(picture, 3) is picture and to_channels(grey, 1) is grey
    for wrong in (4, 2):
        with pytest.raises(DataError, match=f"takes images of {wrong} channels, this one has 3"):
            to_channels(picture, wrong)


def test_a_grey_codec_is_trained_and_evaluated(pictures: Path) -> None:
    codec: Any = renamed_codec("grey")
    masked = nip.attach(codec, "mask_decay", budget={"macs": 0.7}, round_to=1, decay_steps=2)
    settings = {"batch_size": 2, "patch_size": 64, "precision": "32", "progress": False}
    nip.fit(masked, pictures, steps=4, lmbda=0.01, lr=1e-4, **settings)  # type: ignore[arg-type]
    small = masked.harden()
    shown: list[tuple[Tensor, Tensor]] = []
    found = nip.evaluate(
        small, pictures, keep_decoded=lambda name, a, b, score: shown.append((a, b))
    )
    for (original, decoded), score, path in zip(
        shown, found.images, sorted(pictures.iterdir()), strict=True
    ):
        assert original.shape == decoded.shape == (1, 96, 80)
        grey = np.array(Image.open(path).convert("L")).astype(float)
        assert np.array_equal(original[0].mul(255).round().numpy(), grey)
        error = decoded[0].mul(255).round().numpy() - grey
        assert score.psnr_db == pytest.approx(10 * np.log10(255**2 / np.mean(error**2)))
        assert score.bpp_estimated > 0 and score.bpp > 0
    assert "kMAC/pixel" in str(nip.compare(masked.detach(), small, pictures))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fisher", {"budget": {"macs": 0.8}, "round_to": 1}),
        ("channel_gating", {"alpha": 1.0, "gating_steps": 2}),
        ("bit_rate_modulator", {"qualities": [1, 2]}),
        (
            "slimmable",
            {
                "widths": [1.0, 0.5],
                "round_to": 1,
                "order": "importance",
                "lambdas": [0.02, 0.01],
                "schedule": {"first": 1, "every": 1},
            },
        ),
    ],
)
def test_methods_look_at_grey_images(method: str, settings: Any) -> None:
    attached = nip.attach(renamed_codec("grey"), method, **settings)
    colour = [image(nn.Linear(1, 1), seed) for seed in range(2)]
    attached.prepare(colour)
    attached.calibrate(colour)
    attached.validate(colour)
    attached.update(force=True)
    grey = to_channels(colour[0], 1)
    sent = attached.eval().compress(grey)
    assert attached.decompress(sent["strings"], sent["shape"])["x_hat"].shape == grey.shape


def test_a_grey_codec_codes_images(pictures: Path, tmp_path: Path) -> None:
    codec: Any = renamed_codec("grey")
    codec.update(force=True)
    path = sorted(pictures.iterdir())[0]
    data = nip.encode(codec, path)
    decoded = nip.decode(codec, data)
    assert decoded.dtype == torch.uint8 and decoded.shape == (1, 96, 80)
    colour = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert data == nip.encode(codec, colour) == nip.encode(codec, to_channels(colour, 1))
    with pytest.raises(DataError, match=r"shape \(1, H, W\), got uint8 of shape \(2, 96, 80\)"):
        nip.encode(codec, colour[:2])
    again = nip.load(nip.save(codec, tmp_path / "grey.safetensors"))
    assert torch.equal(nip.decode(again, data), decoded)
    (times,) = time_codecs({"grey": codec}, path, repeats=1, limit=1.0)
    assert {"g_a", "g_s", "h_a"} <= set(times.encode) | set(times.decode)


def test_a_grey_codec_of_other_names_is_exported(tmp_path: Path) -> None:
    told: list[str] = []
    files = export_onnx(renamed_codec("grey"), tmp_path, say=told.append)
    assert [file.name for file in files] == ["g_a.onnx", "g_s.onnx"]
    assert "inputs 1x128x192" in told[0] and "inputs 12x8x12" in told[1]


def test_what_is_not_one_module_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="Flat has none of g_a") as error:
        export_onnx(renamed_codec("flat"), tmp_path)
    assert "\n" not in str(error.value)


# -- more than an image ---------------------------------------------------------------------------


class Mapped(BlockCodec):
    """A codec with a quality map beside the image, and a number where it decodes."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)))
        self.condition = nn.Conv2d(1, 8, 4, 4)

    def encode(self, x: Tensor, qmap: Tensor) -> Tensor:
        y = self.g_a[1](self.g_a[0](x) * torch.sigmoid(self.condition(qmap)))
        out: Tensor = self.g_a[2](y)
        return out

    def forward(self, x: Tensor, qmap: Tensor, gain: float = 1.0) -> dict[str, Any]:
        y_hat, likelihoods = self.entropy_bottleneck(self.encode(x, qmap))
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": likelihoods}}

    def compress(self, x: Tensor, qmap: Tensor) -> dict[str, Any]:
        y = self.encode(x, qmap)
        return {"strings": [self.entropy_bottleneck.compress(y)], "shape": y.shape[-2:]}

    def decompress(self, strings: Any, shape: Any, *, gain: float) -> dict[str, Tensor]:
        return super().decompress(strings, shape)


class Told(Mapped):
    """The same, and it says with what it is run."""

    def example_arguments(self, x: Tensor) -> dict[str, Any]:
        return {"qmap": torch.full_like(x[:, :1], 0.5), "gain": 1.0, "unused": None}


USES = {
    "measure": lambda codec, pictures: nip.measure(codec),
    "attach": lambda codec, pictures: nip.attach(codec, "magnitude", budget={"macs": 0.5}),
    "evaluate": lambda codec, pictures: nip.evaluate(codec, pictures),
    "fit": lambda codec, pictures: nip.fit(
        codec, pictures, steps=1, lmbda=0.01, batch_size=1, patch_size=64, precision="32",
        progress=False,
    ),
    "encode": lambda codec, pictures: nip.encode(codec, sorted(pictures.iterdir())[0]),
    "export": lambda codec, pictures: export_onnx(codec, pictures / "onnx", check=False),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_an_argument_that_is_not_known_is_named_in_one_line(use: str, pictures: Path) -> None:
    codec = Mapped().eval()
    codec.update()
    with pytest.raises(CodecError, match="forward of Mapped needs qmap beside the image") as error:
        USES[use](codec, pictures)
    assert "\n" not in str(error.value) and f"codec.{EXAMPLE} = lambda x:" in str(error.value)


@pytest.mark.parametrize("use", [use for use in USES if use not in ("attach", "export")])
def test_a_codec_that_says_what_it_needs_is_used(use: str, pictures: Path) -> None:
    codec = make_mapped()
    codec.update()
    assert USES[use](codec, pictures) is not None


def make_mapped() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = Told()
    return codec.eval()


def test_what_was_pruned_of_it_codes_as_it_does(pictures: Path, tmp_path: Path) -> None:
    codec = make_mapped()
    groups = analyse(codec)
    assert groups["g_a.0"].pinned is None
    for method, settings in (
        ("magnitude", {"budget": {"macs": 0.6}, "round_to": 1}),
        ("bottleneck_scaling", {"qualities": [1, 2]}),
    ):
        attached = nip.attach(codec, method, **settings)  # type: ignore[arg-type]
        x = image(codec)
        with torch.no_grad():
            expected = codec(x, torch.full((1, 1, 64, 64), 0.5))["x_hat"]
            assert torch.equal(attached(x)["x_hat"], expected)
        small: Any = attached.harden()
        attached.detach()
        again = nip.load(nip.save(small, tmp_path / "small.safetensors"))
        path = sorted(pictures.iterdir())[0]
        assert nip.decode(again, nip.encode(small, path)).shape == (3, 96, 80)
        assert nip.evaluate(again, pictures).images


def test_a_lambda_given_to_an_object_is_drawn_for_each_batch(pictures: Path) -> None:
    codec: Any = Mapped().eval()
    seen: list[torch.Size] = []

    def give(x: Tensor) -> dict[str, Any]:
        seen.append(x.shape)
        return {"qmap": torch.rand_like(x[:, :1])}

    codec.example_arguments = give
    nip.fit(
        codec, pictures, steps=2, lmbda=0.01, batch_size=2, patch_size=64, precision="32",
        progress=False,
    )  # fmt: skip
    assert seen.count(torch.Size((2, 3, 64, 64))) == 2
    codec.example_arguments = lambda x: [x]
    codec.__dict__.pop("_nicprune_image")
    with pytest.raises(CodecError, match="returns no dictionary but a list"):
        nip.measure(codec)


def test_a_decoder_is_given_nothing_of_the_image(pictures: Path) -> None:
    codec: Any = Told().eval()
    codec.update(force=True)
    own = codec.example_arguments

    def give(x: Tensor) -> dict[str, Any]:
        return own(x) | {"gain": float(x.mean())}

    codec.example_arguments = give
    for use in (nip.evaluate, lambda one, given: nip.encode(one, sorted(given.iterdir())[0])):
        with pytest.raises(CodecError, match="another 'gain' for another image") as error:
            use(codec, pictures)
        assert "\n" not in str(error.value)
    # What the encoder alone takes may be of the image.
    codec.example_arguments = lambda x: own(x) | {"qmap": x[:, :1]}
    assert nip.evaluate(codec, pictures)


def test_a_decoder_that_needs_more_is_told_apart() -> None:
    codec: Any = Mapped().eval()
    codec.example_arguments = lambda x: {"qmap": torch.zeros_like(x[:, :1])}
    with pytest.raises(
        CodecError, match="decompress of Mapped needs gain beside strings and shape"
    ):
        analyse(codec)


class Framed(Told):
    """A codec whose decoder adds a picture of the image's size."""

    def forward(self, x: Tensor, qmap: Tensor, frame: Tensor) -> dict[str, Any]:  # type: ignore[override]
        out = super().forward(x, qmap)
        return {**out, "x_hat": out["x_hat"] + frame}

    def decompress(self, strings: Any, shape: Any, frame: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"x_hat": super().decompress(strings, shape, gain=1.0)["x_hat"] + frame}

    def example_arguments(self, x: Tensor) -> dict[str, Any]:
        ramp = torch.linspace(0, 1, x.shape[3]).expand(x.shape[0], 1, x.shape[2], -1)
        return super().example_arguments(x) | {"frame": ramp}


STACKS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "mask_decay": [("mask_decay", METHOD_SETTINGS["mask_decay"])],
    "rates": [("bottleneck_scaling", {"qualities": [1, 2]})],
    "gates": [("channel_gating", METHOD_SETTINGS["channel_gating"])],
}


@pytest.mark.parametrize("stack", STACKS)
def test_methods_give_the_decoder_what_it_takes_for_images_of_any_size(
    stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    codec: Any = Framed().eval()
    codec.update(force=True)
    x = torch.rand(2, 3, 128, 192)
    frame = codec.example_arguments(x)["frame"]
    attached: Any = nip.attach(codec, STACKS[stack]).eval()
    sent = attached.compress(x)
    pictures = attached.decompress(sent["strings"], sent["shape"])["x_hat"]
    bare = Told.decompress(
        attached.codec, codec.compress(x, qmap=torch.full_like(x[:, :1], 0.5))["strings"],
        sent["shape"], gain=1.0,
    )["x_hat"] if stack != "gates" else None  # fmt: skip
    assert pictures.shape == x.shape
    if bare is not None:
        assert torch.equal(pictures, bare + frame)
    given = attached.decompress(sent["strings"], sent["shape"], like=x)["x_hat"]
    assert torch.equal(given, pictures)
    with pytest.raises(CodecError, match="does not follow from the shape 5"):
        attached.decompress(sent["strings"], 5)
    if not attached.stays:  # files are not written with masks that still decay
        return
    picture = (x[0] * 255).byte()
    data = nip.encode(attached, picture)
    one = attached.compress(picture[None] / 255)
    expected = attached.decompress(one["strings"], one["shape"])["x_hat"][0].clamp(0, 1).mul(255)
    assert (nip.decode(attached, data) - expected.round()).abs().max() <= 1
    monkeypatch.delattr("nicprune.methods.bitstream._image_coded_to")  # who knows the size says it
    assert (nip.decode(attached, data) - expected.round()).abs().max() <= 1
