"""EVC: depthwise-separable transforms, a hyperprior and two checkerboard passes (Wang et al., "EVC:
Towards Real-Time Neural Image Compression with Mask Decay", ICLR 2023, arXiv 2302.05071).

The architecture, in our own words; widths and slopes are those of the authors' public code
(microsoft/DCVC). No weights come with it.

*Transforms.* Three stages of a strided residual block and a depthwise block, then a strided
convolution to the latents; the decoder mirrors them. The sizes L, M and S differ in the widths of
these stages alone: latents and priors are the same, which is what mask decay is made for.

*Entropy model.* From z the hyperprior gives a quantisation step, a scale and a mean for every
latent. Latents are coded in two passes. The first codes one half of the channels on the
checkerboard (even, even) + (odd, odd) and the other half on the rest; the second codes what is
left, its scales and means predicted from the first.

*Rate.* EVC divides y by max(q, 1/2) s, with a learnt q for each latent and s for each rate, and
multiplies back in front of the decoder. That is the method `quantisation_steps`, which attaches to
this codec as to any other; without it the codec has one rate, and q is in the weights of g_a and
g_s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import conv1x1, conv3x3
from compressai.models import CompressionModel
from compressai.models.base import get_scale_table
from compressai.ops import LowerBound
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import nearest_kind
from nicprune.common.errors import CodecError

SIZES = {
    "evc-l": (192, 192, 192, 192),
    "evc-m": (128, 128, 192, 192),
    "evc-s": (64, 64, 128, 192),
    "evc-xs": (32, 32, 64, 96),
}
"""Widths at 1/2, 1/4, 1/8 and 1/16 of the image's size; the last is that of the latents. XS is not
the paper's: half of S everywhere, to try things on without a GPU.
"""

LEAST_STEP = 0.5
"""Lower bound of the quantisation steps that the prior predicts."""

SCALES = (0.11, 64.0, 256)
"""Smallest and largest scale of the Gaussian tables, and how many there are."""


def subpel_conv1x1(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 1x1 convolution and a pixel shuffle, twice the size."""
    return nn.Sequential(conv1x1(in_channels, out_channels * 4), nn.PixelShuffle(2))


class Downsample(nn.Module):
    """Two 3x3 convolutions, the first with stride 2, beside a strided 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride=2)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.skip = conv1x1(in_channels, out_channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H / 2, W / 2)."""
        out = self.conv2(F.leaky_relu(self.conv1(x), 0.01))
        return F.leaky_relu(out, 0.1) + self.skip(x)


class Upsample(nn.Module):
    """A sub-pixel and a 3x3 convolution, beside another sub-pixel convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = subpel_conv1x1(in_channels, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.skip = subpel_conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, 2 H, 2 W)."""
        out = self.conv2(F.leaky_relu(self.conv1(x), 0.01))
        return F.leaky_relu(out, 0.1) + self.skip(x)


class DepthwiseBlock(nn.Module):
    """A depthwise-separable convolution, then two 1x1 convolutions over a wider hidden layer, each
    of the two residual. This is the block of the transforms.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        hidden = self.hidden(out_channels)
        self.conv1 = conv1x1(in_channels, in_channels)
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels)
        self.conv2 = conv1x1(in_channels, out_channels)
        self.skip = (
            nn.Identity() if in_channels == out_channels else conv1x1(in_channels, out_channels)
        )
        self.expand = conv1x1(out_channels, hidden)
        self.reduce = conv1x1(hidden, out_channels)

    @staticmethod
    def hidden(channels: int) -> int:
        """Return the width of the hidden layer."""
        return 4 * channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H, W)."""
        out = F.leaky_relu(self.conv1(x), 0.01)
        out = F.leaky_relu(self.depthwise(out), 0.01)
        x = F.leaky_relu(self.conv2(out), 0.01) + self.skip(x)
        return F.relu(self.reduce(F.relu(self.expand(x)))) + x


class PriorBlock(DepthwiseBlock):
    """The same layers with fewer activations and a bounded hidden width, for the priors."""

    @staticmethod
    def hidden(channels: int) -> int:
        return max(min(4 * channels, 1024), 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.conv1(x), 0.01)
        x = self.conv2(self.depthwise(out)) + self.skip(x)
        return F.leaky_relu(self.reduce(F.leaky_relu(self.expand(x), 0.1)), 0.1) + x


def checkerboard_passes(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return which elements of y the first pass codes, and which the second.

    Args:
        y: latents (B, N, H, W).

    Returns:
        Two masks of type bool, shape (N, H, W), that complement each other. In the first, the lower
        half of the channels is set where row + column is even, the upper half where it is odd.
    """
    channels, height, width = y.shape[1:]
    rows, columns, upper = (torch.arange(n, device=y.device) for n in (height, width, channels))
    parity = rows[:, None] + columns + (upper >= channels // 2)[:, None, None]
    return parity % 2 == 0, parity % 2 == 1


class EVC(CompressionModel):
    """The codec at any widths; at those of L if none are given.

    Example:
        >>> from nicprune.codecs.evc import EVC, SIZES
        >>> codec = EVC(SIZES["evc-s"])
        >>> codec.channels
        [64, 64, 128, 192]

    Args:
        channels: widths at 1/2, 1/4, 1/8 and 1/16 of the image's size. The last is the number N of
            latents y and z, and the unit of the priors' widths; it must be even.

    Raises:
        CodecError: these are not four widths, or N is odd.
    """

    def __init__(self, channels: Sequence[int] = SIZES["evc-l"]):
        super().__init__()
        self.channels = [int(width) for width in channels]
        if len(self.channels) != 4 or min(self.channels) < 1 or self.channels[-1] % 2:
            raise CodecError(
                f"channels must be four widths, the last of them even (got {list(channels)})"
            )
        c1, c2, c3, n = self.channels
        self.g_a = nn.Sequential(
            Downsample(3, c1),
            DepthwiseBlock(c1, c1),
            Downsample(c1, c2),
            DepthwiseBlock(c2, c2),
            Downsample(c2, c3),
            DepthwiseBlock(c3, c3),
            conv3x3(c3, n, stride=2),
        )
        self.g_s = nn.Sequential(
            DepthwiseBlock(n, n),
            Upsample(n, c3),
            DepthwiseBlock(c3, c3),
            Upsample(c3, c2),
            DepthwiseBlock(c2, c2),
            Upsample(c2, c1),
            DepthwiseBlock(c1, c1),
            subpel_conv1x1(c1, 3),
        )
        self.h_a = nn.Sequential(
            PriorBlock(n, n), conv3x3(n, n, stride=2), nn.LeakyReLU(0.01), conv3x3(n, n, stride=2)
        )
        self.h_s = nn.Sequential(
            PriorBlock(n, n),
            subpel_conv1x1(n, n),
            PriorBlock(n, n),
            subpel_conv1x1(n, n),
            PriorBlock(n, n),
        )
        self.prior_fusion = nn.Sequential(PriorBlock(n, 2 * n), PriorBlock(2 * n, 3 * n))
        self.spatial_prior = nn.Sequential(
            PriorBlock(4 * n, 3 * n), PriorBlock(3 * n, 2 * n), PriorBlock(2 * n, 2 * n)
        )
        self.step_bound = LowerBound(LEAST_STEP)
        self.entropy_bottleneck = EntropyBottleneck(n)
        self.gaussian_conditional = GaussianConditional(None)

    @property
    def downsampling_factor(self) -> int:
        """Both sides of an image must be multiples of this."""
        return 64

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> EVC:
        """Return a codec with these weights. Every layer has the widths found there, so a pruned
        codec, whose layers shrink one by one, is loaded as it is.
        """
        ends = ("g_a.0.conv2", "g_a.2.conv2", "g_a.4.conv2", "g_a.6")
        codec = cls([state_dict[f"{name}.weight"].shape[0] for name in ends])
        for name, module in codec.named_modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                found = torch.empty(state_dict[f"{name}.{key}"].shape, dtype=parameter.dtype)
                module.register_parameter(key, nn.Parameter(found))
            if (kind := nearest_kind(module)) is not None:
                kind.follow_shapes(module)
        codec.load_state_dict(dict(state_dict))
        return codec

    def update(self, scale_table: Any = None, force: bool = False, **kwargs: Any) -> bool:
        """Make the CDF tables; see `CompressionModel.update`. The scales are EVC's unless given."""
        table = get_scale_table(*SCALES) if scale_table is None else scale_table
        return bool(super().update(table, force=force, **kwargs))

    # -- entropy model ----------------------------------------------------------------------------

    def _hyperprior(self, z_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return quantisation step, scale and mean of every latent, in units of its step."""
        step, scales, means = self.prior_fusion(self.h_s(z_hat)).chunk(3, 1)
        return self.step_bound(step), scales, means

    def _two_passes(
        self,
        step: Tensor,
        scales: Tensor,
        means: Tensor,
        code: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run both passes. Encoder and decoder share this, so that both do the same arithmetic.

        Args:
            step, scales, means: what the hyperprior gives, (B, N, H, W) each.
            code: called for each pass with its mask (N, H, W), scales and means; returns quantised
                latents (B, N, H, W), of which those of the pass are used.

        Returns:
            Quantised latents, and the scales and means that they were coded with.
        """
        first, second = checkerboard_passes(means)
        y_hat = code(first, scales, means) * first
        refined = self.spatial_prior(torch.cat((y_hat, means, scales, step), 1)).chunk(4, 1)
        refined_scales = torch.cat((refined[0], refined[2]), 1)
        refined_means = torch.cat((refined[1], refined[3]), 1)
        y_hat = y_hat + code(second, refined_scales, refined_means) * second
        return (
            y_hat,
            scales * first + refined_scales * second,
            means * first + refined_means * second,
        )

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Return {"x_hat": (B, 3, H, W), "likelihoods": {"y", "z"}} of images (B, 3, H, W) in
        [0, 1] with sides that are multiples of 64. In training, noise stands for rounding.
        """
        y = self.g_a(x)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(y))
        step, scales, means = self._hyperprior(z_hat)
        y = y / step
        mode = "noise" if self.training else "dequantize"
        y_hat, scales, means = self._two_passes(
            step,
            scales,
            means,
            lambda mask, scales, means: self.gaussian_conditional.quantize(y, mode, means),
        )
        _, y_likelihoods = self.gaussian_conditional(y, scales, means)
        return {
            "x_hat": self.g_s(y_hat * step),
            "likelihoods": {"y": y_likelihoods, "z": z_likelihoods},
        }

    def compress(self, x: Tensor) -> dict[str, Any]:
        """Return {"strings": [first pass, second pass, z], "shape"} of images (B, 3, H, W) in
        [0, 1] with sides that are multiples of 64; a string for each image.
        """
        y = self.g_a(x)
        z = self.h_a(y)
        z_strings = self.entropy_bottleneck.compress(z)
        step, scales, means = self._hyperprior(
            self.entropy_bottleneck.decompress(z_strings, z.shape[-2:])
        )
        y, conditional = y / step, self.gaussian_conditional
        strings: list[list[bytes]] = []

        def encode(mask: Tensor, scales: Tensor, means: Tensor) -> Tensor:
            indexes = conditional.build_indexes(scales[:, mask])
            strings.append(conditional.compress(y[:, mask], indexes, means[:, mask]))
            return conditional.quantize(y, "dequantize", means)

        self._two_passes(step, scales, means, encode)
        return {"strings": [*strings, z_strings], "shape": z.shape[-2:]}

    def decompress(self, strings: Sequence[list[bytes]], shape: Sequence[int]) -> dict[str, Tensor]:
        """Return {"x_hat": (B, 3, H, W)} in [0, 1] from what `compress` returned."""
        first, second, z_strings = strings
        step, scales, means = self._hyperprior(self.entropy_bottleneck.decompress(z_strings, shape))
        conditional, unread = self.gaussian_conditional, iter((first, second))

        def decode(mask: Tensor, scales: Tensor, means: Tensor) -> Tensor:
            indexes = conditional.build_indexes(scales[:, mask])
            found = torch.zeros_like(means)
            found[:, mask] = conditional.decompress(
                next(unread), indexes, means.dtype, means[:, mask]
            )
            return found

        y_hat, _, _ = self._two_passes(step, scales, means, decode)
        return {"x_hat": self.g_s(y_hat * step).clamp_(0, 1)}
