"""Small codecs whose blocks are built as those of published designs are: ConvNeXt, NAFNet, ELIC,
Swin and TCM, STF, squeeze-and-excitation, ShuffleNet, Restormer, gated MLPs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck
from compressai.layers import AttentionBlock
from compressai.models import CompressionModel
from einops import rearrange
from einops.layers.torch import Rearrange
from helpers import make_telling
from torch import Tensor, nn

C = 8
"""Width of the blocks."""


class BlockCodec(CompressionModel):
    """A factorized codec with a block of `out` outputs in its analysis, one in its synthesis."""

    def __init__(
        self,
        body: nn.Module,
        mirror: nn.Module | None = None,
        colours: int = 3,
        out: int = C,
        width: int = C,
    ):
        super().__init__()
        first, last = nn.Conv2d(colours, width, 5, 4, 2), nn.Conv2d(out, 6, 5, 4, 2)
        self.g_a = nn.Sequential(first, body, last)
        self.entropy_bottleneck = EntropyBottleneck(6)
        self.g_s = nn.Sequential(
            nn.ConvTranspose2d(6, C, 4, 4),
            mirror if mirror is not None else nn.ReLU(),
            nn.ConvTranspose2d(C, colours, 4, 4),
        )

    def forward(self, x: Tensor) -> dict[str, Any]:
        y_hat, likelihoods = self.entropy_bottleneck(self.g_a(x))
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": likelihoods}}

    def compress(self, x: Tensor) -> dict[str, Any]:
        y = self.g_a(x)
        return {"strings": [self.entropy_bottleneck.compress(y)], "shape": y.shape[-2:]}

    def decompress(self, strings: Any, shape: Any) -> dict[str, Tensor]:
        y_hat = self.entropy_bottleneck.decompress(strings[0], shape)
        return {"x_hat": self.g_s(y_hat).clamp(0, 1)}


class LayerNorm2d(nn.Module):
    """Over the channels at each place, channels first, by hand."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXt(nn.Module):
    """Depthwise convolution, a norm, an MLP on channels-last tensors, layer scale, skip."""

    def __init__(self, norm: Callable[[], nn.Module] | None = None):
        super().__init__()
        self.dwconv = nn.Conv2d(C, C, 7, padding=3, groups=C)
        self.norm = norm() if norm else nn.BatchNorm2d(C)
        self.pwconv1 = nn.Linear(C, 3 * C)
        self.pwconv2 = nn.Linear(3 * C, C)
        self.gamma = nn.Parameter(torch.full((C,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x)
        if isinstance(self.norm, (nn.LayerNorm, nn.RMSNorm)):
            y = self.norm(y.permute(0, 2, 3, 1))
        else:
            y = self.norm(y).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class Small(BlockCodec):
    """A codec that its class makes without arguments."""

    def __init__(self) -> None:
        super().__init__(ConvNeXt())


class SmallWithNorm(BlockCodec):
    """Another one, with a norm by hand."""

    def __init__(self) -> None:
        super().__init__(ConvNeXt(lambda: LayerNorm2d(C)))


class SimpleGate(nn.Module):
    """The product of both halves."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return first * second


class NAF(nn.Module):
    """NAFNet's block: gates in place of activations, simplified channel attention."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.norm1, self.norm2 = norm(C), norm(C)
        self.conv1 = nn.Conv2d(C, 2 * C, 1)
        self.conv2 = nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1))
        self.conv3 = nn.Conv2d(C, C, 1)
        self.conv4, self.conv5 = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(C, C, 1)
        self.sg = SimpleGate()
        self.dropout1, self.dropout2 = nn.Dropout2d(0.1), nn.Identity()
        self.beta = nn.Parameter(torch.full((1, C, 1, 1), 0.5))
        self.gamma = nn.Parameter(torch.full((1, C, 1, 1), 0.5))

    def forward(self, inp: Tensor) -> Tensor:
        x = self.sg(self.conv2(self.conv1(self.norm1(inp))))
        x = self.dropout1(self.conv3(x * self.sca(x)))
        y = inp + x * self.beta
        x = self.dropout2(self.conv5(self.sg(self.conv4(self.norm2(y)))))
        return y + x * self.gamma


class Bottleneck(nn.Module):
    """ELIC's residual bottleneck, with PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(C, C // 2, 1),
            nn.PReLU(C // 2),
            nn.Conv2d(C // 2, C // 2, 3, padding=1),
            nn.PReLU(),
            nn.Conv2d(C // 2, C, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class SqueezeExcite(nn.Module):
    """Channel attention by two linear layers, then the residual of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.norm = nn.InstanceNorm2d(C, affine=True)
        self.fc = nn.Sequential(nn.Linear(C, 4), nn.ReLU(), nn.Linear(4, C), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        b, c = y.shape[:2]
        return x + y * self.fc(F.adaptive_avg_pool2d(y, 1).view(b, c)).view(b, c, 1, 1)


class ConvolutionalExcite(nn.Module):
    """The same by 1x1 convolutions, with a hard sigmoid; the norm has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3, padding=1), nn.InstanceNorm2d(C)
        self.reduce, self.expand = nn.Conv2d(C, 3, 1), nn.Conv2d(3, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        scale = F.hardsigmoid(self.expand(F.silu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return y * scale


class Modulated(nn.Module):
    """Spatial feature transform: x * (1 + scale) + shift, from another branch, with an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
        self.offset = nn.Parameter(torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.scale(x)) + F.relu(self.shift(x)) + self.offset


class Gated(nn.Module):
    """A gated linear unit, and a product with the sigmoid of another convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(C, C, 1)
        self.last = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.first(x), dim=1)
        return x + self.last(y * torch.sigmoid(self.second(y)))


class Shuffle(nn.Module):
    """ShuffleNet's: grouped convolutions with a channel shuffle between them."""

    def __init__(self, by_hand: bool):
        super().__init__()
        self.by_hand = by_hand
        self.first = nn.Conv2d(C, 3 * C, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(3 * C)
        self.middle = nn.Conv2d(3 * C, 3 * C, 3, padding=1, groups=3 * C)
        self.last = nn.Conv2d(3 * C, C, 1, groups=2)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)))
        if self.by_hand:
            b, c, h, w = y.shape
            y = y.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        else:
            y = self.shuffle(y)
        return x + self.last(self.middle(y))


class Multiplied(nn.Module):
    """A depthwise convolution with two outputs for each input, and a grouped transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(C, 6, 1)
        self.wide = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2, groups=3)
        self.last = nn.Conv2d(6, C, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.up(F.relu(self.wide(F.relu(self.first(x)))))))


class Interleaved(nn.Module):
    """Sums of every fourth channel, and of halves by slices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(C, 4 * C, 1), nn.Conv2d(C // 2, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y[:, 0::4] + y[:, 1::4] * y[:, 2::4] - y[:, 3::4]
        half = y.shape[1] // 2
        return self.last(F.relu(y[:, :half]) + y[:, half:])


class Shuffled(nn.Module):
    """Pixels to channels and back."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.first, self.last = nn.Conv2d(4 * C, 8, 3, padding=1), nn.Conv2d(8, 4 * C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.last(F.gelu(self.first(self.down(x)))))


class GatedMLP(nn.Module):
    """Restormer's gated feed-forward network, and an MLP on (B, L, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.project_in = nn.Conv2d(C, 12, 1, bias=False)
        self.dwconv = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project_out = nn.Conv2d(6, C, 1)
        self.mlp = nn.Sequential(nn.Linear(C, 10), nn.GELU(), nn.Dropout(0.1), nn.Linear(10, C))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        x = x + self.project_out(F.gelu(first) * second)
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.mlp(tokens).transpose(1, 2).reshape(x.shape)


class Swin(nn.Module):
    """A window attention block as Swin, STF and TCM have it: heads and width in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.table = nn.Parameter(torch.rand(2, 16, 16))
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))
        self.heads, self.scale = 2, (C // 2) ** -0.5

    def attention(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attention = (q * self.scale) @ k.transpose(-2, -1) + self.table
        return self.proj((attention.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        y = y + self.attention(self.norm1(y))
        y = y + self.mlp(self.norm2(y))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4)
        return y.reshape(b, c, h, w)


class Heads(nn.Module):
    """Attention whose number of heads follows from the width of its projections: by
    `scaled_dot_product_attention`, by products, or by einsum.
    """

    def __init__(self, how: str):
        super().__init__()
        self.how, self.size = how, 4
        self.q, self.k, self.v = nn.Linear(C, 12), nn.Linear(C, 12), nn.Linear(C, 12)
        self.proj = nn.Linear(12, C)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (
            layer(tokens).view(b, h * w, -1, self.size).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
            y = torch.einsum("bhij,bhjd->bhid", weights, v)
        else:
            y = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(b, h * w, -1))
        return x + y.transpose(1, 2).view(b, -1, h, w)


class Windows(nn.Module):
    """TCM's attention in shifted windows: the size of heads is a number, their number follows; each
    has a table of relative positions; by einops.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding_layer, self.linear = nn.Linear(C, 24), nn.Linear(8, C)
        self.relative_position_params = nn.Parameter(torch.rand(4, 7, 7))
        self.size = 2

    def relative_embedding(self) -> Tensor:
        cord = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        relation = cord[:, None, :] - cord[None, :, :] + 3
        return self.relative_position_params[:, relation[:, :, 0], relation[:, :, 1]]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(Rearrange("b c h w -> b h w c")(x), (-2, -2), (1, 2))
        x = rearrange(x, "b (w1 p1) (w2 p2) c -> b w1 w2 p1 p2 c", p1=4, p2=4)
        h, w = x.shape[1:3]
        x = rearrange(x, "b w1 w2 p1 p2 c -> b (w1 w2) (p1 p2) c", p1=4, p2=4)
        qkv = self.embedding_layer(x)
        q, k, v = rearrange(qkv, "b nw np (threeh c) -> threeh b nw np c", c=self.size).chunk(3, 0)
        sim = torch.einsum("hbwpc,hbwqc->hbwpq", q, k) * 0.7
        sim = sim + rearrange(self.relative_embedding(), "h p q -> h 1 1 p q")
        mask = torch.ones(1, 1, 1, 16, 16, dtype=torch.bool).triu(9)
        probs = sim.masked_fill_(mask, float("-inf")).softmax(-1)
        output = rearrange(torch.einsum("hbwij,hbwjc->hbwic", probs, v), "h b w p c -> b w p (h c)")
        x = rearrange(
            self.linear(output),
            "b (w1 w2) (p1 p2) c -> b (w1 p1) (w2 p2) c",
            w1=h,
            w2=w,
            p1=4,
        )
        return Rearrange("b h w c -> b c h w")(torch.roll(x, (2, 2), (1, 2)))


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention`, whose heads are as wide as its input by their number."""

    def __init__(
        self,
        *,
        first: bool = True,
        weights: bool = False,
        norm: bool = False,
        width: int = C,
        heads: int = 4,
    ):
        super().__init__()
        self.first, self.weights = first, weights
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=first)
        wide = 2 * width
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) if self.first else x.flatten(2).permute(2, 0, 1)
        y = self.norm(tokens)
        tokens = tokens + self.attention(y, y, y, need_weights=self.weights)[0]
        tokens = tokens + self.mlp(tokens)
        return (tokens.transpose(1, 2) if self.first else tokens.permute(1, 2, 0)).view(x.shape)


class CrossAttention(nn.Module):
    """Queries of one convolution, keys and values of others; an output of its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(C, 12, 1), nn.Conv2d(C, 12, 2, 2), nn.Conv2d(C, 12, 2, 2)
        self.attention = nn.MultiheadAttention(12, 3, bias=False)
        self.last = nn.Linear(12, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2).permute(2, 0, 1) for f in (self.q, self.k, self.v))
        y = self.last(F.gelu(self.attention(q, k, v, need_weights=False)[0]))
        return x + y.permute(1, 2, 0).reshape(x.shape)


class Encoder(nn.Module):
    """Torch's own transformer layer."""

    def __init__(self, norm_first: bool):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            C, 4, 12, batch_first=True, norm_first=norm_first, activation="gelu"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x)


class Split(nn.Module):
    """TCM's: some channels through a convolution, the others through an MLP, by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
        self.conv = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 1))
        self.mlp = nn.Sequential(nn.Linear(C - 3, 9), nn.GELU(), nn.Linear(9, C - 3))

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.conv1(x), (3, C - 3), dim=1)
        second = self.mlp(second.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.conv2(torch.cat((self.conv(first) + first, second), dim=1))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[str, ...]]] = {
    "ConvNeXt": (ConvNeXt, ("", "pwconv1"), ()),
    "ConvNeXt with LayerNorm": (lambda: ConvNeXt(lambda: nn.LayerNorm(C)), ("pwconv1",), ("",)),
    "ConvNeXt with RMSNorm": (lambda: ConvNeXt(lambda: nn.RMSNorm(C)), ("pwconv1",), ("",)),
    "ConvNeXt with GroupNorm": (lambda: ConvNeXt(lambda: nn.GroupNorm(1, C)), ("pwconv1",), ("",)),
    "NAF with GroupNorm": (
        lambda: NAF(lambda width: nn.GroupNorm(4, width)),
        ("conv1", "conv4"),
        ("",),
    ),
    "GroupNorm of single channels": (lambda: NAF(lambda width: nn.GroupNorm(C, width)), ("",), ()),
    "ConvNeXt by hand": (lambda: ConvNeXt(lambda: LayerNorm2d(C)), ("pwconv1",), ("",)),
    "NAF": (NAF, ("", "conv1", "conv4"), ()),
    "NAF with LayerNorm": (lambda: NAF(LayerNorm2d), ("conv1", "conv4"), ("",)),
    "ELIC": (Bottleneck, ("", "branch.0", "branch.2"), ()),
    "ELIC attention": (lambda: AttentionBlock(C), ("", "conv_a.0.conv.0"), ()),
    "SE": (SqueezeExcite, ("", "fc.0"), ()),
    "SE by convolutions": (ConvolutionalExcite, ("", "conv", "reduce"), ()),
    "modulated": (Modulated, ("",), ()),
    "gated": (Gated, ("", "first"), ()),
    "shuffle by hand": (lambda: Shuffle(True), ("", "first"), ()),
    "shuffle": (lambda: Shuffle(False), ("", "first"), ()),
    "multiplied": (Multiplied, ("", "first", "up"), ()),
    "interleaved": (Interleaved, ("", "first"), ()),
    "pixels": (Shuffled, ("", "first"), ()),
    "gated MLP": (GatedMLP, ("", "project_in", "mlp.0"), ()),
    "Swin": (Swin, ("mlp.0",), ("", "qkv")),
    "fused heads": (lambda: Heads("fused"), ("", "q"), ()),
    "heads": (lambda: Heads("products"), ("", "q"), ()),
    "heads by einsum": (lambda: Heads("einsum"), ("", "q"), ()),
    "heads by einops": (Windows, ("", "embedding_layer", "relative_position_params"), ()),
    "torch's attention": (TorchAttention, ("", "mlp.0"), ()),
    "torch's attention, tokens first": (lambda: TorchAttention(first=False), ("", "mlp.0"), ()),
    "torch's attention with weights": (lambda: TorchAttention(weights=True), ("", "mlp.0"), ()),
    "torch's attention with a norm": (lambda: TorchAttention(norm=True), ("mlp.0",), ("",)),
    "torch's cross attention": (CrossAttention, ("", "q", "attention.out_proj"), ()),
    "torch's encoder": (lambda: Encoder(True), ("layer.linear1",), ("",)),
    "torch's encoder, norm last": (lambda: Encoder(False), ("layer.linear1",), ("",)),
    "TCM": (Split, ("", "conv.0", "mlp.0"), ("conv1",)),
}
"""Each block, with the layers in it whose output channels are free, and those whose are not; "" is
the stream that runs through it. With `norms: adapt` all are free, but for `NEVER`.
"""

NEVER: dict[str, tuple[str, ...]] = {"TCM": ("conv1", "conv.2")}
"""Layers whose output channels are not free with `norms: adapt`."""


def block_codec(name: str) -> nn.Module:
    """A codec with a block of this name in its analysis, weights that let no mistake hide."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        codec = BlockCodec(BLOCKS[name][0]())
        with torch.no_grad():
            for key, parameter in codec.named_parameters():
                if key.startswith("g_a.1."):
                    parameter.copy_(torch.rand(parameter.shape) - 0.3)
        return make_telling(codec)
