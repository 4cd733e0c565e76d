"""Small codecs with the blocks of published designs, in words of our own: TCM, STF, WACNN, TinyLIC,
MLIC++, FTIC, ELIC. They show how much of such a codec can be pruned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from compressai.layers import GDN, conv1x1, subpel_conv3x3
from compressai.models import MeanScaleHyperprior, ScaleHyperprior
from einops import rearrange
from helpers import make_telling
from torch import Tensor, nn

N, M = 16, 12
"""Width of the transforms, and latents."""


class Residual(nn.Module):
    """What its parts make of x, added to x."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.branch = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def bottleneck(width: int) -> nn.Module:
    """ELIC's residual bottleneck."""
    half = width // 2
    return Residual(
        conv1x1(width, half),
        nn.ReLU(inplace=True),
        nn.Conv2d(half, half, 3, padding=1),
        nn.ReLU(inplace=True),
        conv1x1(half, width),
    )


class GatedAttention(nn.Module):
    """A trunk times the sigmoid of a branch, added: as Cheng et al. (2020) and ELIC have it."""

    def __init__(self, width: int, before: nn.Module | None = None):
        super().__init__()
        self.trunk = nn.Sequential(*[bottleneck(width) for _ in range(2)])
        self.branch = nn.Sequential(
            before or nn.Identity(), bottleneck(width), conv1x1(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.trunk(x) * torch.sigmoid(self.branch(x))


def windows(x: Tensor, height: int, width: int) -> Tensor:
    """Cut (B, H, W, C) into windows: (B * windows, height * width, C)."""
    b, h, w, c = x.shape
    x = x.view(b, h // height, height, w // width, width, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height * width, c)


def joined(x: Tensor, height: int, width: int, h: int, w: int) -> Tensor:
    """Put windows together again."""
    b, c = x.shape[0] * height * width // (h * w), x.shape[-1]
    x = x.view(b, h // height, w // width, height, width, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)


class WindowAttention(nn.Module):
    """Swin's: heads as wide as the width by their number, a table of relative positions for each;
    a mask for windows that were shifted.
    """

    def __init__(self, dim: int, heads: int, window: tuple[int, int], shift: int = 0):
        super().__init__()
        self.dim, self.num_heads, self.window, self.shift = dim, heads, window, shift
        self.scale = (dim // heads) ** -0.5
        height, width = window
        size = (2 * height - 1) * (2 * width - 1)
        self.relative_position_bias_table = nn.Parameter(torch.rand(size, heads))
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        gaps = [g.flatten()[:, None] - g.flatten()[None, :] for g in (rows, columns)]
        index = (gaps[0] + height - 1) * (2 * width - 1) + gaps[1] + width - 1
        self.register_buffer("relative_position_index", index)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (_, h, w, _) = self.window, x.shape
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        x = windows(x, height, width)
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q * self.scale) @ k.transpose(-2, -1)
        index: Any = self.relative_position_index
        bias = self.relative_position_bias_table[index.view(-1)].view(n, n, -1)
        attention = attention + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.shift:
            mask = torch.zeros(b, n, n).masked_fill(torch.ones(n, n).triu(n // 2) > 0, -100.0)
            attention = attention + mask.unsqueeze(1)
        x = (attention.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        x = joined(self.proj(x), height, width, h, w)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


class SwinBlock(nn.Module):
    """A layer norm before attention and before an MLP, on channels-last tensors."""

    def __init__(self, dim: int, heads: int, window: tuple[int, int] = (4, 4), shift: int = 0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window, shift)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ChannelsLast(nn.Sequential):
    """Parts that read (B, H, W, C), among those that read (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchMerging(nn.Module):
    """STF's way down: four places side by side, a norm, half as many channels."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class PatchSplitting(nn.Module):
    """STF's way up: a norm, four times as many channels, shuffled to places."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm, self.expansion = nn.LayerNorm(dim), nn.Linear(dim, 4 * out, bias=False)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expansion(self.norm(x)).permute(0, 3, 1, 2)
        return self.shuffle(x).permute(0, 2, 3, 1)


class MixedBlock(nn.Module):
    """TCM's: some channels through a residual convolution, the others through window attention
    whose heads have a constant size; numbers of both are attributes.
    """

    def __init__(self, conv_dim: int, trans_dim: int, size: int):
        super().__init__()
        self.conv_dim, self.trans_dim = conv_dim, trans_dim
        both = conv_dim + trans_dim
        self.conv1_1, self.conv1_2 = conv1x1(both, both), conv1x1(both, both)
        self.conv_block = Residual(
            nn.Conv2d(conv_dim, conv_dim, 3, padding=1),
            nn.LeakyReLU(inplace=True),
            nn.Conv2d(conv_dim, conv_dim, 3, padding=1),
        )
        self.ln1, self.ln2 = nn.LayerNorm(trans_dim), nn.LayerNorm(trans_dim)
        self.msa = HeadsOfSize(trans_dim, size)
        self.mlp = nn.Sequential(
            nn.Linear(trans_dim, 2 * trans_dim), nn.GELU(), nn.Linear(2 * trans_dim, trans_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        conv_x, trans_x = torch.split(self.conv1_1(x), (self.conv_dim, self.trans_dim), dim=1)
        conv_x = self.conv_block(conv_x) + conv_x
        trans_x = rearrange(trans_x, "b c h w -> b h w c")
        trans_x = trans_x + self.msa(self.ln1(trans_x))
        trans_x = trans_x + self.mlp(self.ln2(trans_x))
        trans_x = rearrange(trans_x, "b h w c -> b c h w")
        return x + self.conv1_2(torch.cat((conv_x, trans_x), dim=1))


class HeadsOfSize(nn.Module):
    """Window attention by einops, heads of a constant size."""

    def __init__(self, dim: int, size: int, p: int = 4):
        super().__init__()
        self.head_dim, self.p, self.scale = size, p, size**-0.5
        self.embedding_layer, self.linear = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.relative_position_params = nn.Parameter(torch.rand(dim // size, 2 * p - 1, 2 * p - 1))

    def forward(self, x: Tensor) -> Tensor:
        p, (_, h, w, _) = self.p, x.shape
        x = rearrange(x, "b (h p) (w q) c -> b (h w) (p q) c", p=p, q=p)
        q, k, v = rearrange(
            self.embedding_layer(x), "b n p (heads c) -> heads b n p c", c=self.head_dim
        ).chunk(3, dim=0)
        places = torch.cartesian_prod(torch.arange(p), torch.arange(p))
        gap = places[:, None, :] - places[None, :, :] + p - 1
        bias = self.relative_position_params[:, gap[..., 0], gap[..., 1]]
        sim = torch.einsum("hbwpc,hbwqc->hbwpq", q, k) * self.scale
        sim = sim + rearrange(bias, "h p q -> h 1 1 p q")
        x = torch.einsum("hbwij,hbwjc->hbwic", sim.softmax(-1), v)
        x = self.linear(rearrange(x, "h b w p c -> b w p (h c)"))
        return rearrange(x, "b (h w) (p q) c -> b (h p) (w q) c", h=h // p, w=w // p, p=p)


class Neighbourhood(nn.Module):
    """TinyLIC's: each place attends to those around it."""

    def __init__(self, dim: int, heads: int, kernel: int = 3):
        super().__init__()
        self.heads, self.kernel, self.scale = heads, kernel, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.rand(heads, kernel * kernel))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        qkv = self.qkv(x).reshape(b, h, w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(3, 0, 4, 5, 1, 2)
        around = []
        for part in (k, v):
            padded = F.pad(part, [self.kernel // 2] * 4)
            cut = padded.unfold(3, self.kernel, 1).unfold(4, self.kernel, 1)
            around.append(cut.flatten(-2))
        q = (q * self.scale).unsqueeze(-1)
        attention = (q * around[0]).sum(2, keepdim=True) + self.bias[:, None, None, None]
        x = (attention.softmax(-1) * around[1]).sum(-1)
        return self.proj(x.permute(0, 3, 4, 1, 2).reshape(b, h, w, c))


class TinyBlock(nn.Module):
    """Neighbourhood attention and an MLP of convolutions with a depthwise one between."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, wide = Neighbourhood(dim, heads), 2 * dim
        self.fc1, self.fc2 = nn.Conv2d(dim, wide, 1), nn.Conv2d(wide, dim, 1)
        self.dwconv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x).permute(0, 3, 1, 2)
        y = self.fc2(F.gelu(self.dwconv(self.fc1(y))))
        return x.permute(0, 3, 1, 2) + y


class GlobalContext(nn.Module):
    """MLIC++'s: attention of linear cost, keys normalised over places and queries over the channels
    of a head.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.queries, self.keys = conv1x1(dim, dim), conv1x1(dim, dim)
        self.values, self.reprojection = conv1x1(dim, dim), conv1x1(dim, dim)
        self.mlp = nn.Sequential(
            conv1x1(dim, 2 * dim),
            nn.GELU(),
            nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim),
            nn.GELU(),
            conv1x1(2 * dim, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = (
            layer(x).reshape(b, self.heads, -1, h * w)
            for layer in (self.queries, self.keys, self.values)
        )
        context = k.softmax(-1) @ v.transpose(-1, -2)
        y = context.transpose(-1, -2) @ q.softmax(2)
        y = self.reprojection(y.reshape(b, -1, h, w)) + x
        return y + self.mlp(y)


class LocalContext(nn.Module):
    """MLIC++'s: windows of latents, their features and those of their neighbours by convolutions
    and gates.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.qkv = nn.Sequential(
            conv1x1(dim, 3 * dim), nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim)
        )
        self.proj, self.norm = conv1x1(dim, dim), nn.GroupNorm(1, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, 1)
        return x + self.proj(torch.sigmoid(q) * F.gelu(k) * v)


class FrequencyModulation(nn.Module):
    """FTIC's: a learnt weight for each frequency, of all channels alike, in blocks."""

    def __init__(self, dim: int, size: int = 4):
        super().__init__()
        self.size, self.norm = size, nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.weight = nn.Parameter(torch.rand(size, size // 2 + 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.fc1(self.norm(x))).permute(0, 3, 1, 2)
        y = rearrange(y, "b c (h p) (w q) -> b c h w p q", p=self.size, q=self.size)
        y = torch.fft.irfft2(torch.fft.rfft2(y) * self.weight, s=(self.size, self.size))
        y = rearrange(y, "b c h w p q -> b (h p) (w q) c")
        return x + self.fc2(y)


class FrequencyBlock(nn.Module):
    """FTIC's: window attention of high, wide and square windows, side by side over the heads."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attns = nn.ModuleList(
            WindowAttention(dim, heads, window) for window in ((2, 8), (8, 2), (4, 4))
        )
        self.mix, self.modulation = nn.Linear(3 * dim, dim), FrequencyModulation(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.mix(torch.cat([attention(y) for attention in self.attns], -1))
        return self.modulation(x)


def down(i: int, o: int) -> nn.Module:
    return nn.Conv2d(i, o, 5, 2, 2)


def up(i: int, o: int) -> nn.Module:
    return nn.ConvTranspose2d(i, o, 5, 2, 2, 1)


def stages(block: Callable[[], list[nn.Module]]) -> tuple[nn.Module, nn.Module]:
    """Analysis and synthesis of four steps, with blocks after the second and third."""
    analysis = [down(3, N), *block(), down(N, N), *block(), down(N, N), *block(), down(N, M)]
    synthesis = [up(M, N), *block(), up(N, N), *block(), up(N, N), subpel_conv3x3(N, 3, 2)]
    return nn.Sequential(*analysis), nn.Sequential(*synthesis)


def tcm() -> tuple[nn.Module, nn.Module]:
    return stages(lambda: [MixedBlock(N // 2, N // 2, 4)])


def stf() -> tuple[nn.Module, nn.Module]:
    analysis = [
        nn.Conv2d(3, N, 2, 2),
        ChannelsLast(SwinBlock(N, 4), SwinBlock(N, 4, shift=2), PatchMerging(N, N)),
        ChannelsLast(SwinBlock(N, 4), PatchMerging(N, N)),
        ChannelsLast(SwinBlock(N, 4), PatchMerging(N, M)),
    ]
    synthesis = [
        conv1x1(M, N),
        ChannelsLast(SwinBlock(N, 4), PatchSplitting(N, N)),
        ChannelsLast(SwinBlock(N, 4), PatchSplitting(N, N), SwinBlock(N, 4, shift=2)),
        ChannelsLast(PatchSplitting(N, N), SwinBlock(N, 4)),
        nn.ConvTranspose2d(N, 3, 2, 2),
    ]
    return nn.Sequential(*analysis), nn.Sequential(*synthesis)


def wacnn() -> tuple[nn.Module, nn.Module]:
    def attention() -> nn.Module:
        return GatedAttention(N, ChannelsLast(WindowAttention(N, 4, (4, 4))))

    analysis = [down(3, N), GDN(N), down(N, N), GDN(N), attention(), down(N, N), GDN(N), down(N, M)]
    synthesis = [up(M, N), GDN(N, inverse=True), up(N, N), attention(), GDN(N, inverse=True)]
    synthesis += [up(N, N), GDN(N, inverse=True), up(N, 3)]
    return nn.Sequential(*analysis), nn.Sequential(*synthesis)


def tinylic() -> tuple[nn.Module, nn.Module]:
    return stages(lambda: [TinyBlock(N, 4)])


def mlic() -> tuple[nn.Module, nn.Module]:
    return stages(lambda: [bottleneck(N), GlobalContext(N, 4), LocalContext(N)])


def ftic() -> tuple[nn.Module, nn.Module]:
    return stages(lambda: [ChannelsLast(FrequencyBlock(N, 4))])


def elic() -> tuple[nn.Module, nn.Module]:
    return stages(lambda: [*[bottleneck(N) for _ in range(3)], GatedAttention(N)])


DESIGNS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], type[Any]]] = {
    "TCM": (tcm, MeanScaleHyperprior),
    "STF": (stf, MeanScaleHyperprior),
    "WACNN": (wacnn, MeanScaleHyperprior),
    "TinyLIC": (tinylic, ScaleHyperprior),
    "MLIC++": (mlic, MeanScaleHyperprior),
    "FTIC": (ftic, MeanScaleHyperprior),
    "ELIC": (elic, MeanScaleHyperprior),
}
"""Analysis and synthesis of each design, and the codec of CompressAI that they are put into."""


def design(name: str) -> nn.Module:
    """A small codec of a design, with weights that let no mistake hide."""
    transforms, kind = DESIGNS[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        codec: Any = kind(8, M)
        codec.g_a, codec.g_s = transforms()
        return make_telling(codec)
