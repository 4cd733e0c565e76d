"""Small codecs whose code takes other paths than the one that is traced, or that tie parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compressai.models import CompressionModel, ScaleHyperprior
from helpers import make_telling
from torch import Tensor, nn
from zoo_of_blocks import BlockCodec

C, M = 12, 6


class Factorized(BlockCodec):
    """A factorized prior with a block in each transform."""

    def __init__(self, first: nn.Module | None = None, second: nn.Module | None = None):
        super().__init__(nn.ReLU())
        self.g_a = nn.Sequential(
            nn.Conv2d(3, C, 5, 2, 2), first or nn.ReLU(), nn.Conv2d(C, C, 5, 2, 2), nn.LeakyReLU(),
            nn.Conv2d(C, M, 5, 4, 2),
        )  # fmt: skip
        self.g_s = nn.Sequential(
            nn.ConvTranspose2d(M, C, 4, 4), second or nn.ReLU(), nn.ConvTranspose2d(C, C, 4, 2, 1),
            nn.LeakyReLU(), nn.ConvTranspose2d(C, 3, 4, 2, 1),
        )  # fmt: skip


class HeadInTraining(Factorized):
    """A second picture from a feature of the encoder, in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(C, 3, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        feature = self.g_a[:2](x)
        y_hat, likelihoods = self.entropy_bottleneck(self.g_a[2:](feature))
        out = {"x_hat": self.g_s(y_hat), "likelihoods": {"y": likelihoods}}
        return out | ({"aux": self.head(feature)} if self.training else {})


class OtherLayer(nn.Module):
    """Another convolution on larger maps."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = (nn.Conv2d(C, C, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.small(x).relu() if x.shape[-1] <= 32 else self.large(x).relu()


class OtherActivation(nn.Module):
    """An activation on larger maps that does not keep zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.relu() if x.shape[-1] <= 32 else y.sigmoid()


class Tied(nn.Module):
    """Two convolutions of one weight, in one group of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(C, C, 3, padding=1) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu())


def tied_across() -> Factorized:
    """One weight for the second layer of both transforms."""
    codec = Factorized(nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1))
    codec.g_s[1].weight = codec.g_a[1].weight
    return codec


class Piecewise(ScaleHyperprior):
    """A hyperprior that calls the layers of g_a and g_s, and not g_a and g_s."""

    def encode(self, x: Tensor) -> Tensor:
        return self.g_a[2:](self.g_a[1](self.g_a[0](x)))

    def decode(self, y: Tensor) -> Tensor:
        for layer in self.g_s:
            y = layer(y)
        return y

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.encode(x)
        z_hat, of_z = self.entropy_bottleneck(self.h_a(torch.abs(y)))
        y_hat, of_y = self.gaussian_conditional(y, self.h_s(z_hat))
        return {"x_hat": self.decode(y_hat), "likelihoods": {"y": of_y, "z": of_z}}

    def compress(self, x: Tensor) -> dict[str, Any]:
        y = self.encode(x)
        z = self.h_a(torch.abs(y))
        strings = self.entropy_bottleneck.compress(z)
        scales = self.h_s(self.entropy_bottleneck.decompress(strings, z.shape[-2:]))
        indexes = self.gaussian_conditional.build_indexes(scales)
        return {
            "strings": [self.gaussian_conditional.compress(y, indexes), strings],
            "shape": z.shape[-2:],
        }

    def decompress(self, strings: Any, shape: Any) -> dict[str, Tensor]:
        z_hat = self.entropy_bottleneck.decompress(strings[1], shape)
        indexes = self.gaussian_conditional.build_indexes(self.h_s(z_hat))
        y_hat = self.gaussian_conditional.decompress(strings[0], indexes, z_hat.dtype)
        return {"x_hat": self.decode(y_hat).clamp(0, 1)}


BRANCHING: dict[str, Callable[[], CompressionModel]] = {
    "head in training": HeadInTraining,
    "other layer on larger maps": lambda: Factorized(OtherLayer(), OtherLayer()),
    "other activation on larger maps": lambda: Factorized(OtherActivation(), OtherActivation()),
}
TIED: dict[str, Callable[[], CompressionModel]] = {
    "in one group": lambda: Factorized(Tied(), Tied()),
    "across transforms": tied_across,
}


def made(factory: Callable[[], CompressionModel]) -> Any:
    """Make a codec with weights that tell mistakes: those of `Factorized` where it has them."""
    torch.manual_seed(0)
    codec = factory()
    if type(codec) is Factorized:
        return make_telling(codec).eval()
    codec.load_state_dict(make_telling(Factorized()).state_dict(), strict=False)
    return codec.eval()
