"""A codec of one's own, of the size that published ones have: windowed attention in the transforms,
a channel-wise autoregressive context (as WACNN; Zou et al., CVPR 2022).
"""

from __future__ import annotations

from typing import Any

import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import GDN
from compressai.models import CompressionModel
from compressai.models.utils import conv, deconv
from torch import Tensor, nn


class WindowAttention(nn.Module):
    """Attention within windows, its heads and width in code."""

    def __init__(self, width: int, window: int, heads: int):
        super().__init__()
        self.window, self.heads, self.scale = window, heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        count = window * window
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        place = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
        self.register_buffer("place", place)
        assert place.shape == (count, count)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        s, heads = self.window, self.heads
        pad = (0, -w % s, 0, -h % s)
        y = nn.functional.pad(x, pad)
        rows, columns = y.shape[2] // s, y.shape[3] // s
        y = y.view(b, c, rows, s, columns, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, c)
        qkv = self.qkv(y).reshape(-1, s * s, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = self.table[self.place.flatten()].view(s * s, s * s, heads).permute(2, 0, 1)
        attention = ((q * self.scale) @ k.transpose(-2, -1) + bias).softmax(-1)
        y = self.proj((attention @ v).transpose(1, 2).reshape(-1, s * s, c))
        y = y.view(b, rows, columns, s, s, c).permute(0, 5, 1, 3, 2, 4)
        return x + y.reshape(b, c, rows * s, columns * s)[:, :, :h, :w]


class Residual(nn.Module):
    """1x1, 3x3, 1x1 over a skip."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width // 2, 1),
            nn.GELU(),
            nn.Conv2d(width // 2, width // 2, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x + self.conv(x))


class AttentionGate(nn.Module):
    """A branch of residual blocks times the sigmoid of one with window attention."""

    def __init__(self, width: int, window: int, heads: int):
        super().__init__()
        self.a = nn.Sequential(*(Residual(width) for _ in range(3)))
        self.b = nn.Sequential(
            WindowAttention(width, window, heads),
            *(Residual(width) for _ in range(3)),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x) * torch.sigmoid(self.b(x))


def _stack(widths: list[int], strides: dict[int, int]) -> nn.Sequential:
    """3x3 convolutions with GELU between them; a stride of -2 is upsampling by pixel shuffle."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        stride = strides.get(i, 1)
        if stride < 0:
            layers.append(nn.Sequential(conv(before, 4 * after, 3, 1), nn.PixelShuffle(2)))
        else:
            layers.append(conv(before, after, 3, stride))
        layers.append(nn.GELU())
    return nn.Sequential(*layers[:-1])


class ChannelwiseCodec(CompressionModel):
    """The default sizes have 75 M parameters.

    Args:
        n, m: widths of transforms and latents.
        slices, support: parts of the latents, and how many of them the next one is told.
        hidden: widths within the networks of each slice.
        heads: of the attention.
    """

    def __init__(
        self,
        n: int = 192,
        m: int = 320,
        slices: int = 10,
        support: int = 5,
        hidden: tuple[int, ...] = (224, 176, 128, 64),
        heads: int = 8,
    ):
        super().__init__()
        self.slices, self.support = slices, support
        self.g_a = nn.Sequential(
            conv(3, n),
            GDN(n),
            conv(n, n),
            GDN(n),
            AttentionGate(n, 8, heads),
            conv(n, n),
            GDN(n),
            conv(n, m),
            AttentionGate(m, 4, heads),
        )
        self.g_s = nn.Sequential(
            AttentionGate(m, 4, heads),
            deconv(m, n),
            GDN(n, inverse=True),
            deconv(n, n),
            GDN(n, inverse=True),
            AttentionGate(n, 8, heads),
            deconv(n, n),
            GDN(n, inverse=True),
            deconv(n, 3),
        )
        steps = [m + (n - m) * i // 4 for i in range(5)]
        self.h_a = _stack([m, *steps], {2: 2, 4: 2})
        up = [n, *steps[::-1]]
        self.h_mean_s, self.h_scale_s = (_stack(up, {1: -2, 3: -2}) for _ in range(2))
        part = m // slices
        self.means, self.scales, self.residuals = (
            nn.ModuleList(
                _stack([m + part * min(i + more, support + more), *hidden, part], {})
                for i in range(slices)
            )
            for more in (0, 0, 1)
        )
        self.entropy_bottleneck = EntropyBottleneck(n)
        self.gaussian_conditional = GaussianConditional(None)

    def _context(self, slices: list[Tensor]) -> list[Tensor]:
        return slices[: self.support]

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.g_a(x)
        z = self.h_a(y)
        _, z_likelihoods = self.entropy_bottleneck(z)
        medians = self.entropy_bottleneck._get_medians()
        z_hat = (z - medians).round() + medians
        scales, means = self.h_scale_s(z_hat), self.h_mean_s(z_hat)
        decoded: list[Tensor] = []
        likelihoods = []
        for i, part in enumerate(y.chunk(self.slices, 1)):
            known = self._context(decoded)
            mean = self.means[i](torch.cat([means, *known], 1))
            scale = self.scales[i](torch.cat([scales, *known], 1))
            likelihoods.append(self.gaussian_conditional(part, scale, mean)[1])
            hat = (part - mean).round() + mean
            rest = self.residuals[i](torch.cat([means, *known, hat], 1))
            decoded.append(hat + 0.5 * torch.tanh(rest))
        return {
            "x_hat": self.g_s(torch.cat(decoded, 1)),
            "likelihoods": {"y": torch.cat(likelihoods, 1), "z": z_likelihoods},
        }

    def _code(self, z_hat: Tensor, y: Tensor | None, coder: Any) -> Tensor:
        """Write the slices of y, or read them."""
        scales, means = self.h_scale_s(z_hat), self.h_mean_s(z_hat)
        decoded: list[Tensor] = []
        conditional = self.gaussian_conditional
        tables = (
            conditional.quantized_cdf.tolist(),
            conditional.cdf_length.reshape(-1).int().tolist(),
            conditional.offset.reshape(-1).int().tolist(),
        )
        parts = y.chunk(self.slices, 1) if y is not None else [None] * self.slices
        for i, part in enumerate(parts):
            known = self._context(decoded)
            mean = self.means[i](torch.cat([means, *known], 1))
            index = conditional.build_indexes(self.scales[i](torch.cat([scales, *known], 1)))
            flat = index.reshape(-1).int().tolist()
            if part is not None:
                symbols = (part - mean).round()
                coder.encode_with_indexes(symbols.reshape(-1).int().tolist(), flat, *tables)
            else:
                symbols = torch.tensor(coder.decode_stream(flat, *tables)).view_as(mean).to(mean)
            hat = symbols + mean
            rest = self.residuals[i](torch.cat([means, *known, hat], 1))
            decoded.append(hat + 0.5 * torch.tanh(rest))
        return torch.cat(decoded, 1)

    def compress(self, x: Tensor) -> dict[str, Any]:
        y = self.g_a(x)
        z = self.h_a(y)
        strings = self.entropy_bottleneck.compress(z)
        coder = BufferedRansEncoder()
        self._code(self.entropy_bottleneck.decompress(strings, z.shape[-2:]), y, coder)
        return {"strings": [[coder.flush()], strings], "shape": z.shape[-2:]}

    def decompress(self, strings: Any, shape: Any) -> dict[str, Tensor]:
        coder = RansDecoder()
        coder.set_stream(strings[0][0])
        z_hat = self.entropy_bottleneck.decompress(strings[1], shape)
        return {"x_hat": self.g_s(self._code(z_hat, None, coder)).clamp(0, 1)}
