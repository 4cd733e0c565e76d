"""A temporal entropy model: the distribution of a frame's latents, given those of the frame before
(Sun et al., "Spatiotemporal Entropy Model is All You Need for Learned Video Compression", arXiv
2104.06083; the slimmable one is of Liu et al., "Slimmable Video Codec", CVPRW 2022, arXiv
2205.06754).

    temporal_prior      TPM: conv5, conv5, conv5 of y_hat[t-1], to 2M channels
    h_a, h_s            HE and HD: a hyperprior of y[t] beside y_hat[t-1], strides 2 and 2
    entropy_parameters  EPM: three 1x1 convolutions of both, to a scale and a mean for each latent

Other than in the papers, the mean is learnt as a difference from y_hat[t-1]: what does not move
costs little from the first step on.

The papers' modules have CompressAI's names where CompressAI has one for what they do. Widths are
the papers' for M = 192, and in proportion for other M.
"""

from __future__ import annotations

from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import conv1x1, conv3x3
from compressai.models import CompressionModel
from compressai.models.utils import conv, deconv
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import widths_of

PAPER_M = 192
"""Latent channels that the papers' widths are for."""

START = 0.1
"""Factor of the last layer's random weights, which are small beside y_hat[t-1]."""

START_DENSITY = 1.0
"""Width of the density of z at the start. CompressAI's 10 takes thousands of steps to narrow: until
then every z costs 5 bits, whatever it is, and nothing keeps it small.
"""

MEAN_STEPS = 256
"""Means are multiples of 1 / this when they code. What both sides compute differs by about 1e-14 on
other machines, and every frame is predicted from the one before: rounded, the latents of all frames
are the same to the bit, and no difference can grow.
"""


def in_proportion(width: int, latents: int) -> int:
    """Return the width, for so many latent channels, of what has `width` in the papers."""
    return max(2, round(width * latents / PAPER_M))


def on_grid(values: Tensor) -> Tensor:
    """Round to multiples of 1 / `MEAN_STEPS`, which floating-point numbers hold exactly."""
    return torch.round(values * MEAN_STEPS) / MEAN_STEPS


class TemporalEntropyNetwork(CompressionModel):
    """The temporal entropy model as a network of its own. Its "image" is y[t] and y_hat[t-1], one
    behind the other, (B, 2M, H, W).

    Args:
        latents: channels of y, M.
        hyper: channels of the hyperprior and of the temporal prior's first layer, 256 for M = 192.
        temporal: channels of the temporal prior's second layer, 320 for M = 192.
        parameters: channels between the layers of `entropy_parameters`, 768 and 576 for M = 192.
    """

    def __init__(self, latents: int, hyper: int, temporal: int, parameters: tuple[int, int]):
        super().__init__()
        M, N = latents, hyper
        # First, so that its input says how many channels the network is given.
        self.h_a = nn.Sequential(
            conv3x3(2 * M, N), nn.LeakyReLU(), conv(N, N), nn.LeakyReLU(), conv(N, N)
        )
        self.h_s = nn.Sequential(
            deconv(N, N), nn.LeakyReLU(), deconv(N, N), nn.LeakyReLU(), conv3x3(N, 2 * M)
        )
        self.temporal_prior = nn.Sequential(
            conv(M, N, stride=1),
            nn.LeakyReLU(),
            conv(N, temporal, stride=1),
            nn.LeakyReLU(),
            conv(temporal, 2 * M, stride=1),
        )
        first, second = parameters
        self.entropy_parameters = nn.Sequential(
            conv1x1(4 * M, first),
            nn.LeakyReLU(),
            conv1x1(first, second),
            nn.LeakyReLU(),
            conv1x1(second, 2 * M),
        )
        with torch.no_grad():  # at first, the latents of the frame before, scales near 1
            last: Any = self.entropy_parameters[-1]
            last.weight.mul_(START)
            last.bias[:M] = 1.0
        self.entropy_bottleneck = EntropyBottleneck(N, init_scale=START_DENSITY)
        self.gaussian_conditional = GaussianConditional(None)

    @property
    def latents(self) -> int:
        """Channels of y."""
        return widths_of(self.temporal_prior[0])[1]

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Return {"x_hat": y_hat[t], "likelihoods"} of y[t] and y_hat[t-1], (B, 2M, H, W).

        In training y_hat is y rounded around its mean with the gradient of y, and likelihoods are
        those of y with noise.
        """
        y, previous = x.chunk(2, 1)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(x))
        scales, means = self.predict(z_hat, previous)
        y_hat, y_likelihoods = self.gaussian_conditional(y, scales, means)
        if self.training:
            centred = y - means
            y_hat = centred + (torch.round(centred) - centred).detach() + means
        return {"x_hat": y_hat, "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def predict(self, z_hat: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and mean of each latent, (B, M, H, W) each.

        Args:
            z_hat: what the hyperprior carries, (B, N, ceil(H / 4), ceil(W / 4)).
            previous: y_hat of the frame before, (B, M, H, W).
        """
        hyper, temporal = self.h_s(z_hat), self.temporal_prior(previous)
        if hyper.shape[-2:] != temporal.shape[-2:]:
            hyper = hyper[..., : temporal.shape[-2], : temporal.shape[-1]]
        scales, change = self.entropy_parameters(torch.cat((hyper, temporal), 1)).chunk(2, 1)
        return scales, previous + change

    def encode(self, y: Tensor, previous: Tensor) -> tuple[list[list[bytes]], Any, Tensor]:
        """Return the strings of y, of z, z's height and width, and y_hat; `decode` gives the same
        y_hat.
        """
        z = self.h_a(torch.cat((y, previous), 1))
        z_strings = self.entropy_bottleneck.compress(z)
        size = tuple(z.shape[-2:])
        scales, means, indexes = self._symbols_given(z_strings, size, previous)
        y_strings = self.gaussian_conditional.compress(y, indexes, means)
        y_hat = self.gaussian_conditional.quantize(y, "dequantize", means)
        return [y_strings, z_strings], size, y_hat + 0.0  # -0 is 0, as where it is decoded

    def decode(self, strings: list[list[bytes]], size: Any, previous: Tensor) -> Tensor:
        """Return y_hat from what `encode` returned."""
        y_strings, z_strings = strings
        _, means, indexes = self._symbols_given(z_strings, size, previous)
        y_hat: Tensor = self.gaussian_conditional.decompress(y_strings, indexes, means=means)
        return y_hat

    def _symbols_given(
        self, z_strings: list[bytes], size: Any, previous: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scales, means on their grid and indexes of CDF tables: what both sides compute."""
        z_hat = self.entropy_bottleneck.decompress(z_strings, size)
        scales, means = self.predict(z_hat, previous)
        return scales, on_grid(means), self.gaussian_conditional.build_indexes(scales)
