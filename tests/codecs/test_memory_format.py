"""Weights of 2-D convolutions are put into channels_last, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_telling
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo_of_blocks import BlockCodec

from nicprune.codecs.memory_format import to_channels_last, to_contiguous
from nicprune.runtime.accelerate import accelerate
from nicprune.training.loop import fit


class Filtered(nn.Module):
    """A product of spectra, whose weights are pairs of real numbers, as GFNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.pairs = nn.Parameter(torch.randn(8, 4, 3, 2))
        self.register_buffer("fixed", torch.randn(8, 4, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.view_as_complex(self.pairs + self.fixed).mean((1, 2))[:, None, None]
        spectrum = torch.fft.rfft2(self.a(x), norm="ortho") * kernel
        y: Tensor = self.b(torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho"))
        return y


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


@pytest.mark.filterwarnings("ignore:MACs of")
def test_a_codec_that_reads_a_parameter_in_its_own_order_is_trained_and_accelerated() -> None:
    codec: Any = make_telling(BlockCodec(Filtered()))
    before = codec.g_a[1].pairs.clone()
    fit(codec, "samples", steps=2, batch_size=2, patch_size=64, lmbda=0.01, progress=False)
    assert not codec.g_a[1].pairs.equal(before)
    picture = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    image = picture[None] / 255
    codec.eval()
    with torch.no_grad():
        wanted = codec(image)["x_hat"]
        found = accelerate(codec, "torch", image=picture)(image)["x_hat"]
    assert torch.allclose(found, wanted, atol=1e-4)
