"""Codecs run in channels_last where their code does, and in torch's default format otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ARCHITECTURES, built, make_telling, same_state, state_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo_of_blocks import BlockCodec

from nicprune.codecs.memory_format import fast_format, to_channels_last, to_contiguous
from nicprune.common.errors import RecipeError
from nicprune.data.images import write_png
from nicprune.evaluation.evaluate import evaluate
from nicprune.evaluation.transform_times import time_codecs
from nicprune.runtime.accelerate import accelerate
from nicprune.runtime.latency import measure_latency
from nicprune.storage.container import decode, encode
from nicprune.training.loop import fit

SMALL = torch.zeros(3, 64, 64, dtype=torch.uint8)


class Between(nn.Module):
    """Something between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.inner(self.a(x)))
        return y

    def inner(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Filtered(Between):
    """A product of spectra, whose weights are pairs of real numbers, as GFNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Parameter(torch.randn(8, 4, 3, 2))
        self.register_buffer("fixed", torch.randn(8, 4, 3, 2))

    def inner(self, x: Tensor) -> Tensor:
        kernel = torch.view_as_complex(self.pairs + self.fixed).mean((1, 2))[:, None, None]
        spectrum = torch.fft.rfft2(x, norm="ortho") * kernel
        return x + torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")


class Rows(Between):
    """A softmax over each row of all channels."""

    def inner(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return x.view(batch, channels * height, width).softmax(-1).view(x.shape)


class OfTheBatch(Between):
    """A kernel for each image, as dynamic convolutions have; one image alone runs anyway."""

    def inner(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        kernels = x.mean((2, 3)).view(batch * channels, 1, 1, 1)
        y = F.conv2d(x.view(1, batch * channels, height, width), kernels, groups=batch * channels)
        return y.view(x.shape)


def test_weights_of_convolutions_alone_are_converted() -> None:
    module = nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.ConvTranspose2d(4, 8, 3),
        parametrizations.weight_norm(nn.Conv2d(4, 8, 3)),
        Filtered(),
        nn.Conv3d(4, 8, 3),
    )
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    last = {name for name, t in to_channels_last(module).state_dict().items() if _is_last(t)}
    assert last == {"0.weight", "1.weight", "2.parametrizations.weight.original1", "3.a.weight"}
    assert all(t.equal(before[name]) for name, t in module.state_dict().items())
    assert all(t.is_contiguous() for t in to_contiguous(module).state_dict().values())


def _is_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        write_png(torch.rand(3, 80, 96), tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.mark.filterwarnings("ignore:MACs of")
@pytest.mark.parametrize("kind", [Filtered, Rows, OfTheBatch])
def test_what_runs_in_the_default_format_alone_is_run_in_it(
    kind: Callable[[], nn.Module], photos: Path
) -> None:
    codec: Any = make_telling(BlockCodec(kind()))
    codec.update()
    state, drawn = state_of(codec), torch.random.get_rng_state()
    runs = fast_format(codec) == torch.channels_last
    assert runs == (kind is Filtered), "the weights of convolutions alone change"
    assert same_state(state_of(codec), state) and codec.g_a[0].weight.is_contiguous()
    assert torch.equal(torch.random.get_rng_state(), drawn)
    plain = evaluate(codec, photos).mean("psnr_db")
    fast = evaluate(accelerate(codec, image=SMALL), photos).mean("psnr_db")
    assert fast == pytest.approx(plain, abs=1e-2)
    assert decode(codec, encode(codec, SMALL)).shape == SMALL.shape
    assert measure_latency(codec, size=(64, 64)).layers
    assert time_codecs({"own": codec}, repeats=1, limit=1)
    settings: dict[str, Any] = {"steps": 1, "lmbda": 0.01, "batch_size": 2, "patch_size": 64}
    if not runs:
        with pytest.raises(RecipeError, match="^channels_last: the code of BlockCodec does not"):
            fit(codec, photos, channels_last=True, **settings)
    assert fit(codec, photos, **settings).step == 1
    assert codec.g_a[0].weight.is_contiguous()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_codecs_of_the_zoo_run_in_channels_last(architecture: str) -> None:
    assert fast_format(built(architecture)[0]) == torch.channels_last
