"""Random codecs of everything that can be pruned: masked = pruned, predicted = counted, saved and
loaded, streams decode.

A dozen are tried every day; `pytest -m slow` tries two hundred.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import check_pruning
from compressai.layers import GDN, AttentionBlock, ResidualBlock, subpel_conv3x3
from compressai.models import FactorizedPrior, MeanScaleHyperprior, ScaleHyperprior
from helpers import make_telling
from torch import Tensor, nn
from zoo_of_blocks import LayerNorm2d

from nicprune.pruning.surgery import analyse

Random = np.random.Generator


class Lambda(nn.Module):
    """Layers and numbers by name, and what they do together."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: Any):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def activation(rng: Random, width: int) -> nn.Module:
    choices: list[Callable[[], nn.Module]] = [
        nn.ReLU,
        lambda: nn.LeakyReLU(0.1, inplace=True),
        nn.GELU,
        nn.SiLU,
        nn.PReLU,
        lambda: nn.PReLU(width),
        nn.Hardswish,
        lambda: GDN(width),
        lambda: nn.Dropout2d(0.2),
        nn.Identity,
    ]
    return choices[rng.integers(len(choices))]()


def norm(rng: Random, width: int) -> nn.Module:
    choices: list[Callable[[], nn.Module]] = [
        lambda: nn.BatchNorm2d(width),
        lambda: nn.BatchNorm2d(width, affine=False),
        lambda: nn.InstanceNorm2d(width, affine=True),
        nn.Identity,
        lambda: nn.GroupNorm(1, width),
        lambda: nn.GroupNorm(2, width, affine=bool(rng.integers(2))),
        lambda: LayerNorm2d(width),
        lambda: on_last_dimension(nn.LayerNorm(width, bias=bool(rng.integers(2)))),
        lambda: on_last_dimension(nn.RMSNorm(width)),
    ]
    return choices[rng.integers(len(choices))]()


def on_last_dimension(norm: nn.Module) -> nn.Module:
    return Lambda(lambda s, x: s.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=norm)


def offset(width: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(1, width, 1, 1))


def pointwise(rng: Random, i: int, o: int) -> nn.Module:
    """A convolution of some sort that keeps places."""
    sort = rng.integers(5)
    bias = bool(rng.integers(2))
    if sort == 0:
        return nn.Conv2d(i, o, 3, padding="same", bias=bias)
    if sort == 1 and i % 2 == o % 2 == 0:
        return nn.Conv2d(i, o, 3, padding=1, groups=2, bias=bias)
    if sort == 2:
        return Lambda(
            lambda s, x: s.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            linear=nn.Linear(i, o, bias=bias),
        )
    if sort == 3:
        return nn.Sequential(nn.Conv2d(i, i, 3, padding=1, groups=i, bias=bias), nn.Conv2d(i, o, 1))
    return nn.Conv2d(i, o, 1, bias=bias)


def shuffled(s: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def attended(s: Any, x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = (f(tokens).view(b, h * w, -1, 3).transpose(1, 2) for f in (s.q, s.k, s.v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, -1)
    return s.o(y).transpose(1, 2).view(b, -1, h, w)


def cut_from_the_width(s: Any, x: Tensor) -> Tensor:
    """Swin's: the size of heads follows from the width."""
    b, c, h, w = x.shape
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = s.qkv(tokens).reshape(b, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * 0.4 + s.table).softmax(-1)
    y = (weights @ v).transpose(1, 2).reshape(b, h * w, c)
    return s.o(y).transpose(1, 2).view(b, c, h, w)


def by_numbers(s: Any, x: Tensor) -> Tensor:
    """Heads whose number and size are attributes."""
    b, c, h, w = x.shape
    tokens = x.flatten(2).transpose(1, 2)
    qkv = s.to_qkv(tokens).reshape(b, h * w, 3, s.heads, s.size).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(*qkv, scale=0.5).transpose(1, 2)
    return s.out(y.reshape(b, h * w, s.inner)).transpose(1, 2).reshape(b, -1, h, w)


def of_torch(s: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    y = s.attention(tokens, tokens, tokens, need_weights=False)[0]
    return y.transpose(1, 2).reshape(x.shape)


def split_by_numbers(s: Any, x: Tensor) -> Tensor:
    """TCM's: some channels go one way, the others another."""
    one, two = torch.split(s.wide(x), (s.some, s.others), dim=1)
    return s.last(torch.cat((F.gelu(s.one(one)), s.two(two)), 1))


def excited(s: Any, x: Tensor) -> Tensor:
    scale = s.expand(F.relu(s.reduce(x.mean((2, 3)))))
    return x * torch.sigmoid(scale)[:, :, None, None]


def branch(rng: Random, width: int) -> nn.Module:
    """What a residual block may add: as wide as what it is given, an even number."""
    inner = 2 * int(rng.integers(2, 5))
    sort = rng.integers(15)
    first, last = pointwise(rng, width, inner), pointwise(rng, inner, width)
    if sort == 0:
        wide = pointwise(rng, width, 2 * inner)
        return Lambda(lambda s, x: s.last(F.glu(s.wide(x), 1)), wide=wide, last=last)
    if sort == 1:
        wide = pointwise(rng, width, 2 * inner)

        def gate(s: Any, x: Tensor) -> Tensor:
            one, two = s.wide(x).chunk(2, 1)
            return s.last(F.gelu(one) * two)

        return Lambda(gate, wide=wide, last=last)
    if sort == 2:
        return Lambda(excited, reduce=nn.Linear(width, inner), expand=nn.Linear(inner, width))
    if sort == 3:
        middle = Lambda(shuffled) if rng.integers(2) else nn.ChannelShuffle(2)
        return nn.Sequential(first, norm(rng, inner), middle, activation(rng, inner), last)
    if sort == 4:
        down, up = nn.Conv2d(4 * width, inner, 1), nn.Conv2d(inner, 4 * width, 1)
        return nn.Sequential(
            nn.PixelUnshuffle(2), down, activation(rng, inner), up, nn.PixelShuffle(2)
        )
    if sort == 5:
        lines = [nn.Linear(width, 6) for _ in range(3)]
        return Lambda(attended, q=lines[0], k=lines[1], v=lines[2], o=nn.Linear(6, width))
    if sort == 6:
        wide = pointwise(rng, width, 4 * inner)
        return Lambda(
            lambda s, x: s.last(F.relu((y := s.wide(x))[:, 0::4] + y[:, 1::4]) * y[:, 3::4]),
            wide=wide,
            last=last,
        )
    if sort == 7:
        return Lambda(
            lambda s, x: x * (1 + s.scale(x)) + s.shift,
            scale=pointwise(rng, width, width),
            shift=offset(width),
        )
    if sort == 8:
        return AttentionBlock(width)
    if sort == 9:
        return ResidualBlock(width, width)
    if sort == 10:
        table = nn.Parameter(torch.rand(2, 1, 1))
        qkv, o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        return Lambda(cut_from_the_width, qkv=qkv, o=o, table=table)
    if sort == 11:
        heads, size = int(rng.integers(2, 5)), int(rng.integers(2, 5))
        layers = {
            "to_qkv": nn.Linear(width, 3 * heads * size),
            "out": nn.Linear(heads * size, width),
        }
        return Lambda(by_numbers, heads=heads, size=size, inner=heads * size, **layers)
    if sort == 12:
        attention = nn.MultiheadAttention(width, 2, batch_first=True, bias=bool(rng.integers(2)))
        return Lambda(of_torch, attention=attention)
    if sort == 13:
        some, others = int(rng.integers(2, 5)), int(rng.integers(5, 8))
        return Lambda(
            split_by_numbers,
            some=some,
            others=others,
            wide=nn.Conv2d(width, some + others, 1),
            one=nn.Conv2d(some, 4, 3, padding=1),
            two=nn.Conv2d(others, 3, 1),
            last=nn.Conv2d(7, width, 1),
        )
    return nn.Sequential(first, norm(rng, inner), activation(rng, inner), last)


def block(rng: Random, width: int) -> nn.Module:
    inner = branch(rng, width)
    sort = rng.integers(3)
    if sort == 0:
        return Lambda(
            lambda s, x: x + s.gamma * s.inner(s.norm(x)),
            gamma=offset(width),
            inner=inner,
            norm=norm(rng, width),
        )
    if sort == 1:
        return Lambda(lambda s, x: x + s.inner(x), inner=inner)
    return Lambda(
        lambda s, x: s.join(torch.cat((x, s.inner(x)), 1)),
        inner=inner,
        join=nn.Conv2d(2 * width, width, 1),
    )


def stages(rng: Random, widths: list[int], *, up: bool) -> nn.Sequential:
    """Steps of factor 4, blocks between them."""
    layers: list[nn.Module] = []
    for number, (i, o) in enumerate(zip(widths, widths[1:], strict=False)):
        if not up:
            layers.append(nn.Conv2d(i, o, 5, 4, 2))
        elif rng.integers(2):
            layers.append(nn.ConvTranspose2d(i, o, 4, 4))
        else:
            layers.append(nn.Sequential(subpel_conv3x3(i, o, 4)))
        if number < len(widths) - 2:
            layers.append(activation(rng, o))
            layers += [block(rng, o) for _ in range(rng.integers(1, 3))]
    return nn.Sequential(*layers)


def random_codec(seed: int) -> nn.Module:
    """A codec of CompressAI whose analysis and synthesis are random."""
    rng = np.random.default_rng(seed)
    width, latents = 2 * int(rng.integers(3, 6)), 6
    kind = (FactorizedPrior, ScaleHyperprior, MeanScaleHyperprior)[rng.integers(3)]
    codec: Any = kind(6, latents)
    codec.g_a = stages(rng, [3, width, latents], up=False)
    codec.g_s = stages(rng, [latents, width, 3], up=True)
    with torch.no_grad():
        for key, parameter in codec.named_parameters():
            if key.rpartition(".")[2] in ("gamma", "shift") and parameter.dim() == 4:
                parameter.copy_(torch.rand(parameter.shape))
    return codec


def tried(seed: int, folder: Path) -> None:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        codec = make_telling(random_codec(seed), seed)
    groups = analyse(codec, "adapt")
    held = {g.name: g.pinned for g in groups if g.pinned}
    assert not held, held
    for number in (0, 2):
        check_pruning(codec, groups, number, folder)


@pytest.mark.parametrize("seed", range(3))
def test_random_codecs(seed: int, tmp_path: Path) -> None:
    tried(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 200))
def test_many_random_codecs(seed: int, tmp_path: Path) -> None:
    tried(seed, tmp_path)
