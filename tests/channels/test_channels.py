"""Channel groups: those of CompressAI's architectures, and of codecs that nobody has seen
before.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from compressai.entropy_models import EntropyBottleneck, EntropyBottleneckVbr
from compressai.layers import GDN, GDN1
from helpers import (
    ARCHITECTURES,
    built,
    hook_count,
    image,
    make_telling,
    random_keep,
    same_state,
    state_of,
)
from torch import Tensor, nn
from torch.nn.utils import prune as prune_of_torch
from zoo_of_blocks import BlockCodec

from nicprune.channels.find_groups import find_groups
from nicprune.channels.groups import Groups
from nicprune.codecs.layer_kinds.entropy import EntropyBottleneckPruner
from nicprune.codecs.layer_kinds.gdn import GDNPruner
from nicprune.common.errors import CodecError, RecipeError
from nicprune.pruning.surgery import analyse, prune


def described(groups: Groups) -> list[Any]:
    return [
        (
            g.name,
            g.width,
            g.latent,
            g.pinned,
            [(m.module, m.axis, m.index.tolist()) for m in g.members],
        )
        for g in groups
    ]


def test_frozen_parameters_and_modes_do_not_matter(architecture: str) -> None:
    codec, groups = built(architecture)
    codec.train()
    for parameter in codec.parameters():
        parameter.requires_grad_(False)
    before, modes, hooks = state_of(codec), [m.training for m in codec.modules()], hook_count(codec)
    assert described(find_groups(codec)) == described(groups)
    assert same_state(before, codec.state_dict())
    assert [m.training for m in codec.modules()] == modes and hook_count(codec) == hooks
    assert not any(p.requires_grad for p in codec.parameters())


def test_no_group_of_a_known_architecture_is_pinned(architecture: str) -> None:
    groups = built(architecture)[1]
    assert [g.pinned for g in groups if g.pinned] == (
        ["constant input of scale_to_context"] if architecture == "mbt2018-vbr" else []
    )
    latents = {g.latent for g in groups} - {None}
    assert latents == ({"y"} if "factorized" in architecture else {"y", "z"})
    assert not {g.name for g in groups.prunable()} & {g.name for g in groups if g.latent}


def test_every_layer_channel_is_in_exactly_one_group(architecture: str) -> None:
    codec, groups = built(architecture)
    seen: dict[tuple[str, str], list[int]] = {}
    for group in groups:
        for member in group.members:
            seen.setdefault((member.module, member.axis), []).extend(member.index.ravel().tolist())
    for (name, axis), channels in seen.items():
        module = codec.get_submodule(name)
        width = getattr(module, "channels", None) or (
            module.beta.numel() if hasattr(module, "beta") else None
        )
        if width is None:
            side = ("out" if axis == "out" else "in") + (
                "_features" if isinstance(module, nn.Linear) else "_channels"
            )
            width = getattr(module, side)
        assert sorted(channels) == list(range(width)), f"{name}.{axis}"


def test_the_hyperprior_as_it_is_drawn() -> None:
    groups = built("bmshj2018-hyperprior")[1]
    assert [" ".join(map(str, g.members)) for g in groups][:4] == [
        "g_a.0.out g_a.1 g_a.2.in",
        "g_a.2.out g_a.3 g_a.4.in",
        "g_a.4.out g_a.5 g_a.6.in",
        "g_a.6.out h_a.0.in h_s.4.out g_s.0.in",
    ]
    assert " ".join(map(str, groups["h_a.4"].members)) == "h_a.4.out entropy_bottleneck h_s.0.in"


def test_both_halves_of_scales_and_means_go_with_y() -> None:
    groups = built("mbt2018")[1]
    member = next(m for m in groups["g_a.6"].members if m.module == "entropy_parameters.4")
    assert np.array_equal(member.index, np.stack([np.arange(24), np.arange(24) + 24], 1))
    assert not any(m.module.startswith("h_s") for m in groups["g_a.6"].members)


def test_sub_pixel_convolutions_take_four_rows_a_channel() -> None:
    groups = built("cheng2020-anchor")[1]
    found = [
        m
        for g in groups
        for m in g.members
        if m.module.endswith("subpel_conv.0") and m.axis == "out"
    ]
    assert len(found) >= 3
    assert all(np.array_equal(m.index, np.arange(m.index.size).reshape(-1, 4)) for m in found)


@pytest.mark.parametrize("name", ["bmshj2018-factorized", "bmshj2018-hyperprior"])
@pytest.mark.filterwarnings("ignore:Maximum recursive depth:UserWarning")
def test_torch_pruning_finds_the_same_groups(name: str) -> None:
    """Its own dependency graph, where that works: with pruners for what it does not know, and
    without chunks or pixel shuffles.
    """
    codec, groups = built(name)
    bottleneck = EntropyBottleneckPruner()
    graph = tp.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph.build_dependency(
            codec,
            example_inputs=image(codec),
            customized_pruners={
                GDN: GDNPruner(),
                GDN1: GDNPruner(),
                EntropyBottleneck: bottleneck,
                EntropyBottleneckVbr: bottleneck,
            },
        )
    names = {module: key for key, module in codec.named_modules()}
    for group in groups:
        root = next(m for m in group.members if m.axis == "out")
        layer = codec.get_submodule(root.module)
        remove = tp.prune_conv_out_channels
        theirs = set()
        for dep, channels in graph.get_pruning_group(layer, remove, [0, 3]):
            if dep.target.module in names and not isinstance(dep.target.module, tuple):
                module = dep.target.module
                both = isinstance(module, (GDN, EntropyBottleneck))
                axis = "both" if both else "out" if "out_channels" in dep.handler.__name__ else "in"
                theirs.add((names[module], axis, tuple(sorted(channels))))
        ours = {
            (m.module, m.axis, tuple(sorted(m.index[[0, 3]].ravel().tolist())))
            for m in group.members
        }
        assert ours == theirs, group.name


def test_groups_by_unknown_name() -> None:
    with pytest.raises(RecipeError, match="did you mean"):
        built("mbt2018")[1]["g_a.00"]


def test_not_a_codec() -> None:
    with pytest.raises(CodecError, match="CompressionModel"):
        find_groups(nn.Conv2d(3, 3, 1))


# -- codecs that nobody has seen before -----------------------------------------------------------


class Foreign(BlockCodec):
    """A codec with something in the middle of its analysis."""

    def __init__(self, body: nn.Module, out: int = 8):
        super().__init__(body, out=out)


class Body(nn.Module):
    """Layers, and a function that runs them."""

    def __init__(
        self, parts: dict[str, Callable[[], nn.Module]], run: Callable[[Any, Tensor], Tensor]
    ):
        super().__init__()
        for name, make in parts.items():
            setattr(self, name, make())
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(i: int = 8, o: int = 8, k: int = 1, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **settings)


class Renamed(nn.Conv2d):
    """A convolution that computes what its parent does."""

    def __init__(self, width: int):
        super().__init__(width, width, 1)


class Flipped(nn.Conv2d):
    """A convolution whose class says something else than its parent's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


TWO: dict[str, Callable[[], nn.Module]] = {"a": conv, "b": conv}
FREE, PINNED = True, False
CASES: dict[str, tuple[Any, ...]] = {}


def case(free: bool | str, out: int = 8, **parts: Callable[[], nn.Module]) -> Callable[[Any], Any]:
    """Register a body. `free`: whether the channels of its layer "a" may go; a string: pinned, with
    this in the reason.
    """

    def keep(run: Any) -> Any:
        CASES[run.__name__] = (free, out, parts or TWO, run)
        return run

    return keep


@case(FREE)
def relu(s, x):
    return s.b(F.relu(s.a(x)))


@case(FREE)
def relu_in_place(s, x):
    return s.b(F.relu_(s.a(x)))


@case("sigmoid")
def sigmoid(s, x):
    return s.b(torch.sigmoid(s.a(x)))


@case("sigmoid")
def sigmoid_in_place(s, x):
    return s.b(s.a(x).sigmoid_())


@case("add")
def one_added_in_place(s, x):
    y = s.a(x)
    y += 1
    return s.b(y)


@case("add")
def written_through_a_view(s, x):
    y = s.a(x)
    y.view(1, 8, -1).add_(1.0)
    return s.b(y)


@case("sigmoid")
def part_written_through_a_view(s, x):
    y = s.a(x)
    y[:, :4].sigmoid_()
    return s.b(y)


@case(PINNED)
def written_out(s, x):
    y = torch.empty_like(x)
    torch.sigmoid(s.a(x), out=y)
    return s.b(y)


@case("rsub")
def one_minus(s, x):
    return s.b(1 - s.a(x))


@case("add")
def keyword_added(s, x):
    return s.b(torch.add(s.a(x), other=1.0))


@case("pow")
def power_negative(s, x):
    return s.b((s.a(x).abs() + 1) ** -0.5)


@case("pow")
def power_zero(s, x):
    return s.b(s.a(x) ** 0)


@case(FREE)
def power_two(s, x):
    return s.b(s.a(x) ** 2)


@case(PINNED)
def power_of_two(s, x):
    return s.b(2.0 ** (0.1 * s.a(x)))


@case(PINNED)
def divided_by(s, x):
    return s.b(x.mean() / (1 + s.a(x).abs()))


class Constant(nn.Module):
    """A buffer that code takes as a number of its own."""

    def __init__(self, value: float = 2.0):
        super().__init__()
        self.register_buffer("value", torch.full((1, 1, 1, 1), value))
        self.register_buffer("odd", torch.arange(1 << 20) % 2 == 1, persistent=False)

    def mask(self, y: Tensor) -> Tensor:
        """Every second column."""
        return self.odd[: y.shape[-1]].expand(1, 1, *y.shape[2:])


WITH_CONSTANT = {"a": conv, "c": Constant, "b": conv}


@case(FREE, **WITH_CONSTANT)
def constant_moved_to_it(s, x):
    y = s.a(x)
    return s.b(y * s.c.value.to(y))


@case(FREE, **WITH_CONSTANT)
def constant_of_its_type(s, x):
    y = s.a(x)
    return s.b(y * s.c.value.type_as(y))


@case(FREE)
def numbers_of_its_type(s, x):
    y = s.a(x)
    return s.b(y * y.new_tensor([2.0]))


@case("constant with a value per channel")
def numbers_of_its_type_per_channel(s, x):
    y = s.a(x)
    return s.b(y * y.new_tensor([1.0, 2.0] * 4)[:, None, None])


@case(FREE)
def moved_to_another(s, x):
    y = s.a(x)
    return s.b(y.to(x).type_as(x.mean()))


@case("sigmoid")
def moved_to_another_and_not_zero(s, x):
    return s.b(s.a(x).sigmoid().to(x))


@case(FREE, **WITH_CONSTANT)
def zero_filled_in(s, x):
    y = s.a(x)
    return s.b(y.masked_fill(s.c.mask(y), 0.0))


@case(FREE)
def zero_filled_in_where_it_is_small(s, x):
    y = s.a(x)
    return s.b(y.masked_fill(y < 0.1, 0.0))


@case("masked_fill", **WITH_CONSTANT)
def one_filled_in(s, x):
    y = s.a(x)
    return s.b(y.masked_fill(s.c.mask(y), value=1.0))


@case("masked_fill", **WITH_CONSTANT)
def one_filled_in_in_place(s, x):
    y = s.a(x)
    y.masked_fill_(s.c.mask(y), 1.0)
    return s.b(y)


@case("constant with a value per channel")
def zero_filled_into_some_channels(s, x):
    y = s.a(x)
    return s.b(y.masked_fill(torch.arange(8).view(1, 8, 1, 1) > 4, 0.0))


@case(FREE)
def leaky_by_hand(s, x):
    y = s.a(x)
    return s.b(torch.where(y > 0, y, 0.1 * y))


@case(FREE, **WITH_CONSTANT)
def zero_chosen(s, x):
    y = s.a(x)
    return s.b(torch.where(s.c.mask(y), y, 0.0) + y.where(s.c.mask(y), torch.zeros(())))


@case("where", **WITH_CONSTANT)
def one_chosen(s, x):
    y = s.a(x)
    return s.b(torch.where(s.c.mask(y), 1.0, y))


@case("where", **WITH_CONSTANT)
def buffer_chosen(s, x):
    y = s.a(x)
    return s.b(y.where(condition=s.c.mask(y), other=s.c.value))


@case("sigmoid", **WITH_CONSTANT)
def nonzero_chosen(s, x):
    y = s.a(x)
    return s.b(torch.where(s.c.mask(y), input=y, other=y.sigmoid()))


@case(PINNED, a=conv, e=conv, b=conv)
def chosen_by_another_per_channel(s, x):
    y = s.a(x)
    return s.b(torch.where(s.e(x) > 0, y, y.cos()))


@case("clamp")
def clamp_above_zero(s, x):
    return s.b(s.a(x).clamp(min=0.1))


@case("clamp")
def clamp_below_zero(s, x):
    return s.b(s.a(x).clamp(max=-0.1))


@case(FREE)
def clamp_around_zero(s, x):
    return s.b(torch.clamp(s.a(x), -1, 1))


@case(PINNED)
def clamp_per_channel(s, x):
    return s.b(torch.clamp(s.a(x), min=torch.linspace(-1, 1, 8, dtype=x.dtype).view(1, 8, 1, 1)))


@case("hardtanh")
def hardtanh_above_zero(s, x):
    return s.b(F.hardtanh(s.a(x), 0.2, 1))


@case("softmax")
def softmax(s, x):
    return s.b(s.a(x).softmax(1))


@case(FREE)
def einsum(s, x):
    return s.b(torch.einsum("bchw,bdhw->bdhw", s.a(x), x))


@case("chunk")
def chunk_uneven(s, x):
    return s.b(torch.cat(list(s.a(x).chunk(3, 1))[::-1], 1))


@case(FREE)
def chunk_negative_dim(s, x):
    p, q = s.a(x).chunk(2, -3)
    return s.b(torch.cat([q, p], dim=-3))


@case(PINNED)
def split_by_numbers(s, x):
    p, q = torch.split(s.a(x), [3, 5], 1)
    return s.b(torch.cat([q, p], 1))


@case(FREE, 4, a=conv, b=lambda: conv(4, 4))
def gated(s, x):
    p, q = s.a(x).chunk(2, 1)
    return s.b(p * torch.sigmoid(q))


@case(FREE)
def shuffled(s, x):
    y = s.a(x)
    b, c, h, w = y.shape
    return s.b(y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


@case(FREE, a=conv, p=lambda: nn.ChannelShuffle(4), b=conv)
def shuffled_by_a_layer(s, x):
    return s.b(s.p(s.a(x)))


@case(FREE)
def halves_swapped(s, x):
    y = s.a(x)
    half = y.shape[1] // 2
    return s.b(torch.cat([y[:, half:], y[:, :half]], 1))


@case(FREE)
def split_by_half_the_width(s, x):
    y = s.a(x)
    p, q = torch.split(y, y.size(1) // 2, 1)
    return s.b(torch.cat([q, p], 1))


@case(FREE)
def every_other_channel_first(s, x):
    y = s.a(x)
    return s.b(torch.cat([y[:, 1::2], y[:, 0::2]], 1))


@case("getitem")
def every_third_channel(s, x):
    y = s.a(x)
    return s.b(torch.cat([y[:, 0::3], y[:, 1::3], y[:, 2::3]], 1))


@case("computes with their number")
def divided_by_the_width(s, x):
    y = s.a(x)
    return s.b(y / y.shape[1])


@case(FREE, a=conv, b=lambda: conv(32, 8))
def pixel_unshuffle(s, x):
    return F.interpolate(s.b(F.pixel_unshuffle(s.a(x), 2)), scale_factor=2)


@case("div", a=conv, c=conv, b=conv)
def zero_by_zero(s, x):
    return s.b(s.a(x) / s.c(x))


@case("roll")
def rolled(s, x):
    return s.b(torch.roll(s.a(x), 2, 1))


@case(FREE)
def flipped(s, x):
    return s.b(s.a(x).flip(1))


@case(FREE, a=conv, d=lambda: conv(8, 8, 3, groups=8, bias=False), b=conv)
def depthwise(s, x):
    return s.b(s.d(s.a(x)))


@case(FREE, a=conv, d=lambda: conv(8, 8, 3, groups=8), b=conv)
def depthwise_with_bias(s, x):
    return s.b(s.d(s.a(x)))


@case(FREE, a=conv, d=lambda: conv(8, 8, 3, groups=2), b=conv)
def grouped(s, x):
    return s.b(s.d(s.a(x)))


@case(FREE, a=conv, d=lambda: nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=8, bias=False), b=conv)
def depthwise_transposed(s, x):
    return s.b(s.d(s.a(x)))


@case(FREE, a=conv, d=lambda: nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=4), b=conv)
def grouped_transposed(s, x):
    return s.b(s.d(s.a(x)))


@case(FREE, a=conv)
def called_twice(s, x):
    return s.a(F.relu(s.a(F.relu(x))))


@case(FREE, a=lambda: conv(4, 4), b=conv)
def called_on_halves(s, x):
    p, q = x.chunk(2, 1)
    return s.b(torch.cat([s.a(p), s.a(q)], 1))


@case(FREE, a=conv, c=conv, g=lambda: GDN(8), b=conv)
def gdn_shared(s, x):
    return s.b(s.g(s.a(x)) + s.g(s.c(x)))


@case(FREE, a=conv, b=lambda: conv(16, 8))
def skip_concatenated(s, x):
    return s.b(torch.cat([x, s.a(x)], 1))


@case(FREE, a=conv, b=lambda: conv(10, 8))
def coordinates_concatenated(s, x):
    grid = torch.linspace(0, 1, x.shape[3], dtype=x.dtype).expand(1, 2, *x.shape[2:])
    return s.b(torch.cat([grid, s.a(x)], 1))


THREE: dict[str, Callable[[], nn.Module]] = {"a": conv, "c": conv, "b": conv}


@case(FREE, **THREE)
def places_concatenated(s, x):
    """Coordinate attention."""
    y = s.a(x)
    rows, columns = y.mean(3, keepdim=True), y.mean(2, keepdim=True).transpose(2, 3)
    both = s.c(torch.cat([rows, columns], 2)).sigmoid()
    rows, columns = both.split([y.shape[2], y.shape[3]], 2)
    return s.b(y * rows * columns.transpose(2, 3))


@case(FREE, a=conv, c=conv, p=lambda: nn.Linear(8, 8), b=conv)
def tokens_concatenated(s, x):
    tokens = [y.flatten(2).transpose(1, 2) for y in (s.a(x), s.c(x))]
    one, other = s.p(torch.concatenate(tokens, axis=-2)).chunk(2, 1)
    return s.b((one + other).transpose(1, 2).reshape(x.shape))


@case(FREE, **THREE)
def images_concatenated(s, x):
    one, other = s.c(torch.cat([s.a(x), x])).chunk(2)
    return s.b(one * other)


@case(FREE)
def scans_concatenated(s, x):
    """The four directions of VMamba."""
    y = s.a(x)
    scans = torch.stack([y.flatten(2), y.transpose(2, 3).flatten(2)], 1)
    return s.b(torch.cat([scans, scans.flip(-1)], dim=1).sum(1).view_as(y))


@case(FREE)
def zeros_concatenated(s, x):
    y = s.a(x)
    return s.b(torch.cat([y.new_zeros(y[:, :, :1].shape), y[:, :, 1:]], 2))


@case(PINNED)
def zeros_of_eight_channels_concatenated(s, x):
    return s.b(torch.cat([torch.zeros(1, 8, 1, 16, dtype=x.dtype), s.a(x)[:, :, 1:]], 2))


@case("constant with a value per channel")
def ones_concatenated(s, x):
    y = s.a(x)
    return s.b(torch.cat([y.new_ones(y[:, :, :1].shape), y[:, :, 1:]], 2))


@case(FREE, a=conv, t=lambda: nn.Parameter(torch.rand(8, 1, 1)), b=conv)
def parameter_concatenated(s, x):
    return s.b(torch.cat([s.t[None].expand(-1, -1, 1, 16), s.a(x)[:, :, 1:]], 2))


@case("cat in", a=conv, t=lambda: nn.Parameter(torch.rand(4, 8)), p=lambda: nn.Linear(8, 8), b=conv)
def tokens_of_its_own_concatenated(s, x):
    tokens = s.a(x).flatten(2).transpose(1, 2)
    both = s.p(torch.cat([s.t.expand(len(x), -1, -1), tokens], 1))
    return s.b((both[:, 4:] + both[:, :4].mean(1, keepdim=True)).transpose(1, 2).reshape(x.shape))


@case("sigmoid", **THREE)
def not_zero_concatenated(s, x):
    return s.b(torch.cat([s.c(x)[:, :, :8], s.a(x)[:, :, 8:].sigmoid()], 2))


@case("cat in")
def channels_beside_places_concatenated(s, x):
    y = s.a(x)[:, :, :8, :8]
    return s.b(torch.cat([y, y.transpose(1, 2)]).sum(0, keepdim=True).repeat(len(x), 1, 2, 2))


@case(PINNED, a=conv, c=lambda: conv(8, 16), b=conv)
def parts_concatenated(s, x):
    """Eight channels, and eight of sixteen by their number."""
    return s.b(torch.cat([s.a(x), s.c(x)[:, :8]], 2)[:, :, ::2])


@case(FREE)
def interpolated(s, x):
    return F.avg_pool2d(s.b(F.interpolate(s.a(x), scale_factor=2, mode="bilinear")), 2)


@case(FREE, a=conv, u=lambda: nn.Upsample(scale_factor=2), b=conv)
def upsampled(s, x):
    return F.avg_pool2d(s.b(s.u(s.a(x))), 2)


@case(PINNED, a=conv, q=lambda: nn.Linear(8, 24), p=lambda: nn.Linear(8, 8), b=conv)
def window_attention(s, x):
    y = s.a(x)
    b, c, h, w = y.shape
    y = y.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    q, k, v = s.q(y).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
    y = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c)
    return s.b(
        x + s.p(y).view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
    )


@case("computes over channels", a=conv, n=lambda: nn.LayerNorm(8), b=conv)
def layer_norm(s, x):
    return s.b(s.n(s.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@case(FREE, a=conv, n=lambda: nn.BatchNorm2d(8), b=conv)
def batch_norm(s, x):
    return s.b(s.n(s.a(x)))


@case(FREE, a=conv, n=lambda: nn.PReLU(8), b=conv)
def prelu(s, x):
    return s.b(s.n(s.a(x)))


@case(FREE, a=conv, n=nn.Dropout, i=nn.Identity, b=conv)
def dropout_and_identity(s, x):
    return s.b(s.i(s.n(s.a(x))))


@case(
    "a value per channel",
    a=conv,
    p=lambda: nn.ParameterList([nn.Parameter(torch.ones(1, 8, 1, 1))]),
    b=conv,
)
def scaled_per_channel(s, x):
    return s.b(s.a(x) * s.p[0])


@case("conv2d", a=conv, p=lambda: nn.ParameterList([nn.Parameter(torch.rand(8, 8, 1, 1))]), b=conv)
def unknown_weights(s, x):
    return s.b(F.conv2d(s.a(x), s.p[0]))


@case(PINNED, a=conv, b=conv, c=conv)
def weights_used_twice(s, x):
    return s.b(F.conv2d(F.relu(s.a(s.c(x))), s.a.weight, s.a.bias))


@case("computed at every call", a=lambda: nn.utils.parametrizations.weight_norm(conv()), b=conv)
def weight_norm(s, x):
    return s.b(s.a(x))


@case("conv2d", a=lambda: Flipped(8, 8, 1), b=conv)
def subclassed(s, x):
    return s.b(s.a(x))


@case(FREE, a=lambda: Renamed(8), b=conv)
def subclassed_without_overriding(s, x):
    return s.b(s.a(x))


@case(FREE, a=conv, e=lambda: nn.Linear(8, 8), b=conv)
def squeeze_and_excitation(s, x):
    y = s.a(x)
    return s.b(y * torch.sigmoid(s.e(y.mean((2, 3))))[:, :, None, None])


@case("spreads one channel", a=lambda: conv(8, 1), b=conv)
def one_channel_added_to_all(s, x):
    return s.b(x + s.a(x))


@case("mean")
def mean_over_channels(s, x):
    y = s.a(x)
    return s.b(y * y.mean(1, keepdim=True))


@case("mean")
def mean_over_everything(s, x):
    y = s.a(x)
    return s.b(y * float(y.mean()))


@case("max")
def maximum_over_channels(s, x):
    y = s.a(x)
    return s.b(y * y.max(1, keepdim=True)[0])


@case("pad", a=conv, b=lambda: nn.Conv2d(8, 8, 3))
def padded_with_ones(s, x):
    return s.b(F.pad(s.a(x), (1, 1, 1, 1), value=1.0))


@case(FREE, a=conv, b=lambda: nn.Conv2d(8, 8, 3))
def padded_by_reflection(s, x):
    return s.b(F.pad(s.a(x), (1, 1, 1, 1), mode="reflect"))


@case(PINNED)
def permuted_by_numbers(s, x):
    return s.b(s.a(x)[:, [3, 1, 2, 0, 7, 6, 5, 4]])


@case(PINNED)
def width_in_the_code(s, x):
    return s.b(s.a(x).view(1, 8, *x.shape[2:]))


@case(PINNED)
def width_in_a_factor(s, x):
    y = s.a(x)
    return s.b(y * y.shape[1])


@case(PINNED)
def width_of_another(s, x):
    y = x.new_zeros(x.shape)
    y[:, :] = s.a(x)
    return s.b(y)


@case(FREE)
def assigned_by_checkerboard(s, x):
    y, z = s.a(x), torch.zeros_like(x)
    z[:, :, ::2] = y[:, :, ::2]
    z[:, :, 1::2] = x[:, :, 1::2]
    return s.b(z)


@case("numpy")
def through_numpy(s, x):
    return s.b(torch.from_numpy(s.a(x).numpy()))


@case(FREE)
def without_a_batch(s, x):
    return s.b(s.a(x)[0])[None]


@case(FREE)
def channels_last_dimension(s, x):
    y = s.a(x).movedim(1, -1)
    return s.b((y.sigmoid() * y).movedim(-1, 1))


@case(FREE, a=lambda: conv(8, 32), p=lambda: nn.PixelShuffle(2), b=conv)
def pixel_shuffle(s, x):
    return F.avg_pool2d(s.b(s.p(s.a(x))), 2)


@case("another dimension", a=conv, b=lambda: nn.Conv2d(1, 1, 3, padding=1))
def channels_as_batch(s, x):
    return s.b(s.a(x).permute(1, 0, 2, 3)).permute(1, 0, 2, 3)


def foreign(name: str) -> nn.Module:
    _, out, parts, run = CASES[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return make_telling(Foreign(Body(parts, run), out))


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_foreign_codec_is_pruned_rightly_or_pinned(name: str) -> None:
    codec, free = foreign(name), CASES[name][0]
    groups = analyse(codec)
    mine = [g for g in groups if any(m.module == "g_a.1.a" and m.axis == "out" for m in g.members)]
    if free is FREE:
        assert mine and not any(g.pinned for g in mine), [g.pinned for g in mine]
    else:
        assert all(g.pinned for g in mine)
        if isinstance(free, str):
            assert any(free in str(g.pinned) for g in groups), [g.pinned for g in groups]
    for seed in range(3):
        prune(
            codec, random_keep(groups, seed, minimal=seed == 2), groups
        )  # raises unless pruned = masked


class LowRank(nn.Conv2d):
    """A convolution with an adapter beside it, as LoRA has."""

    def __init__(self) -> None:
        super().__init__(8, 8, 1)
        self.down, self.up = nn.Parameter(torch.rand(2, 8, 1, 1)), nn.Parameter(torch.rand(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        low = F.conv2d(x, self.down)
        return super().forward(x) + (low.movedim(1, -1) @ self.up.T).movedim(-1, 1)


REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(conv()),
        r"computed at every call \(torch.nn.utils.parametrize.remove_parametrizations ends that\)",
    ),
    "weight norm": (
        lambda: nn.utils.weight_norm(conv()),
        r"computed at every call \(torch.nn.utils.remove_weight_norm ends that\)",
    ),
    "spectral norm": (
        lambda: nn.utils.spectral_norm(conv()),
        r"computed at every call \(torch.nn.utils.remove_spectral_norm ends that\)",
    ),
    "masked": (
        lambda: prune_of_torch.random_unstructured(conv(), "weight", 0.5),
        r"computed at every call \(torch.nn.utils.prune.remove ends that\)",
    ),
    "adapter": (LowRank, "LowRank derives from Conv2d and has parameters of its own, down, up$"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", REASONS)
def test_what_is_said_of_weights_that_are_not_a_layers_own_is_true(name: str) -> None:
    make, says = REASONS[name]
    codec = Foreign(make()).eval()
    pinned = [str(group.pinned) for group in find_groups(codec)]
    assert any(re.search(says, reason) for reason in pinned), pinned
    if "computed" not in says:
        assert not any("every call" in reason for reason in pinned), pinned


def test_nothing_to_prune_is_an_error_that_names_the_layers() -> None:
    class Sealed(Foreign):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.g_a = nn.Sequential(nn.Conv2d(3, 6, 16, 16), nn.Sigmoid())
            self.g_s = nn.Sequential(nn.Sigmoid(), nn.ConvTranspose2d(6, 3, 16, 16))

    with pytest.raises(
        CodecError, match=r"nothing in Sealed can be pruned.*(g_s|g_a|entropy_bottleneck)"
    ):
        analyse(make_telling(Sealed()))


def test_a_forward_pass_that_fails_is_an_error_of_its_own() -> None:
    class Failing(Foreign):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return super().forward(x[:, :2])

    codec = Failing(nn.Identity())
    with pytest.raises(CodecError, match="Failing cannot be followed"):
        find_groups(codec)
    assert hook_count(codec) == 0 and codec.training


def test_a_codec_is_its_copy(architecture: str) -> None:
    assert architecture in ARCHITECTURES
    codec, groups = built(architecture)
    assert described(find_groups(copy.deepcopy(codec))) == described(groups)


class Turned(nn.Module):
    """A layer over the rows of a map, with its channels moved aside."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(16), nn.PReLU(16), nn.Conv2d(16, 16, 1, groups=4)],
    ids=["coupled", "coupled, slope", "grouped"],
)
def test_a_layer_over_another_dimension_holds_the_channels_beside_it(layer: nn.Module) -> None:
    groups = find_groups(Foreign(Turned(layer)).eval())  # 64 pixels: 16 rows behind g_a.0
    (found,) = [g for g in groups if any(m.module == "g_a.0" for m in g.members)]
    assert "reads another dimension than the channels'" in str(found.pinned)
