"""Every kind of layer by the same properties: less of it is what is left of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import GDN, GDN1, CheckerboardMaskedConv2d, MaskedConv2d
from compressai.models.vbr import ScaleHyperpriorVbr
from compressai.ops import LowerBound
from helpers import make_telling
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from zoo_of_blocks import BlockCodec

from nicprune.channels.find_groups import find_groups
from nicprune.codecs.layer_kinds import (
    KINDS,
    Convolution,
    holder,
    index_of,
    is_bottleneck,
    kind_of,
    register_kind,
)
from nicprune.codecs.layer_kinds import OwnNorm as OwnNormKind
from nicprune.codecs.layer_kinds.gdn import GrownNormalisation
from nicprune.codecs.layer_kinds.parameters import OwnParameter, Part, layers_of
from nicprune.codecs.layer_operations import remove, resize, zero
from nicprune.codecs.reinitialise import reinitialise
from nicprune.common.errors import CodecError, SurgeryError
from nicprune.pruning.cost import measure
from nicprune.pruning.surgery import analyse, prune

KEPT_OUT, KEPT_IN = [0, 2, 3, 6], [1, 2, 4]


def _vbr_bottleneck() -> nn.Module:
    return ScaleHyperpriorVbr(7, 7, vr_entbttlnck=True).entropy_bottleneck


class Scaled(nn.Module):
    """A module with a parameter of its own."""

    def __init__(self, *shape: int):
        super().__init__()
        self.beta = nn.Parameter(torch.rand(shape if len(shape) > 1 else (1, *shape, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.beta


class OwnNorm(nn.Module):
    """A norm over channels by hand, of a class that nobody registered."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.shift = nn.Parameter(torch.rand(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scale = x.var(1, keepdim=True).add(1e-6).sqrt()
        return (x - x.mean(1, keepdim=True)) / scale * self.weight[:, None, None] + self.shift


LAYERS: dict[str, Callable[[], Any]] = {
    "convolution": lambda: nn.Conv2d(5, 7, 3, 2, 1),
    "convolution without bias": lambda: nn.Conv2d(5, 7, 1, bias=False),
    "transposed convolution": lambda: nn.ConvTranspose2d(5, 7, 3, 2, 1),
    "masked convolution": lambda: MaskedConv2d(5, 7, 5, padding=2),
    "checkerboard convolution": lambda: CheckerboardMaskedConv2d(5, 7, 5, padding=2),
    "depthwise convolution": lambda: nn.Conv2d(7, 7, 3, padding=1, groups=7),
    "depthwise transposed convolution": lambda: nn.ConvTranspose2d(7, 7, 3, groups=7),
    "grouped convolution": lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2),
    "grouped convolution of one input each": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "grouped transposed convolution": lambda: nn.ConvTranspose2d(6, 8, 3, 2, groups=2, bias=False),
    "batch norm": lambda: nn.BatchNorm2d(7),
    "batch norm of vectors": lambda: nn.BatchNorm1d(7),
    "synchronised batch norm": lambda: nn.SyncBatchNorm(7),
    "batch norm without scale": lambda: nn.BatchNorm2d(7, affine=False),
    "instance norm": lambda: nn.InstanceNorm2d(7, affine=True),
    "instance norm with running mean": lambda: nn.InstanceNorm2d(7, track_running_stats=True),
    "instance norm without scale": lambda: nn.InstanceNorm2d(7),
    "layer norm": lambda: nn.LayerNorm(7),
    "layer norm without bias": lambda: nn.LayerNorm(7, bias=False),
    "layer norm without scale": lambda: nn.LayerNorm(7, elementwise_affine=False),
    "RMS norm": lambda: nn.RMSNorm(7),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "group norm of one group": lambda: nn.GroupNorm(1, 7),
    "group norm without scale": lambda: nn.GroupNorm(2, 8, affine=False),
    "group norm of single channels": lambda: nn.GroupNorm(7, 7),
    "group norm of single channels without scale": lambda: nn.GroupNorm(7, 7, affine=False),
    "own norm": lambda: OwnNorm(7),
    "PReLU": lambda: nn.PReLU(7),
    "parameter": lambda: OwnParameter(Scaled(7), "beta"),
    "parameter of three dimensions": lambda: OwnParameter(Scaled(7, 6, 6), "beta"),
    "linear": lambda: nn.Linear(5, 7),
    "GDN": lambda: GDN(7),
    "IGDN": lambda: GDN(7, inverse=True),
    "GDN1": lambda: GDN1(7),
    "entropy bottleneck": lambda: EntropyBottleneck(7),
    "variable-rate entropy bottleneck": _vbr_bottleneck,
}
BOTH = [
    name
    for name in LAYERS
    if any(
        word in name for word in ("GDN", "bottleneck", "depthwise", "norm", "PReLU", "parameter")
    )
]
LATTICES: dict[str, tuple[list[int], list[int]]] = {
    "grouped convolution": ([0, 2, 4, 6], [1, 2, 4, 5]),
    "grouped convolution of one input each": ([2, 3, 6, 7], [1, 3]),
    "grouped transposed convolution": ([0, 2, 4, 6], [1, 2, 4, 5]),
    "group norm": ([0, 1, 3, 4, 5, 7], [0, 1, 3, 4, 5, 7]),
    "group norm without scale": ([1, 3, 5, 7], [1, 3, 5, 7]),
}
"""Channels that can stay of layers where not any can: outputs and inputs."""
NO_WEIGHTS = [
    f"{norm} without scale"
    for norm in ("instance norm", "layer norm", "group norm", "group norm of single channels")
]
UNSCALED = [name for name in LAYERS if "without scale" in name or "running mean" in name]


def make(name: str) -> tuple[Any, Any]:
    """A layer in float64 with weights that let no mistake hide, and its kind."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    make_telling(nn.Sequential(holder(layer))).double()
    kind = kind_of(layer)
    assert kind is not None
    return layer, kind


def inputs(layer: Any, kind: Any) -> Tensor:
    channels = kind.widths(layer)[1]
    shape = (2, 4, channels) if kind.channel_axis == -1 else (2, channels, 6, 6)
    if isinstance(layer, nn.BatchNorm1d):
        shape = (2, channels, 6)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, dtype=torch.float64, generator=generator) * 3


def call(layer: Any, x: Tensor) -> Tensor:
    """What a layer makes of x; of an entropy model, likelihoods."""
    layer = holder(layer).eval()
    with torch.no_grad():
        out = layer(x)
    return torch.stack(out) if isinstance(out, tuple) else out


def dim_of(kind: Any, layer: Any, x: Tensor) -> int:
    """The dimension of channels, of stacked outputs too."""
    return (
        kind.channel_dim(layer, x[0]) + 1
        if kind.codes and x.dim() == 5
        else kind.channel_dim(layer, x)
    )


def remaining(name: str) -> tuple[list[int], list[int]]:
    """The outputs and inputs that stay."""
    if name in LATTICES:
        return LATTICES[name]
    return KEPT_OUT, KEPT_OUT if name in BOTH else KEPT_IN


def reduced(name: str, layer: Any, kind: Any, out: list[int], inn: list[int]) -> Any:
    """A copy of the layer with these channels alone."""
    less = copy.deepcopy(layer)
    widths = kind.widths(layer)
    axes = [("both", out, widths[0])]
    if name not in BOTH:
        axes = [("out", out, widths[0]), ("in", inn, widths[1])]
    for axis, kept, width in axes:
        remove(less, axis, [i for i in range(width) if i not in kept], kind)
    return less


def smaller(name: str) -> tuple[Any, Any, Any, list[int], list[int]]:
    """A layer, its kind, the layer with some channels removed, and those that stay."""
    layer, kind = make(name)
    out, inn = remaining(name)
    return layer, kind, reduced(name, layer, kind, out, inn), out, inn


def test_every_kind_is_tried() -> None:
    tried = {type(make()) for make in LAYERS.values()}
    without: set[Any] = {GaussianConditional, LowerBound}
    heads: set[Any] = {nn.MultiheadAttention, Part, NonDynamicallyQuantizableLinear}
    assert heads <= set(KINDS)  # they have tests of their own below
    without |= heads | {GrownNormalisation}  # in tests/methods/test_adaptation_pruned.py
    assert set(KINDS) - without <= tried
    for made in (GaussianConditional(None), LowerBound(1.0)):
        assert not kind_of(made).has_channels  # type: ignore[union-attr]
        with pytest.raises(SurgeryError, match="no channels can be removed"):
            remove(made, "out", [0])


@pytest.mark.parametrize("name", LAYERS)
def test_masked_is_removed(name: str) -> None:
    """Zeros at the inputs and at the producers' rows leave what is there without them."""
    layer, kind, less, out, inn = smaller(name)
    assert kind.widths(less) == (len(out), len(inn))
    x = inputs(layer, kind)
    dim = kind.channel_dim(layer, x)
    masked = torch.zeros_like(x).index_copy(
        dim, torch.tensor(inn), x.index_select(dim, torch.tensor(inn))
    )
    gone = [i for i in range(kind.widths(layer)[0]) if i not in out]
    zeroed = copy.deepcopy(layer)
    zero(zeroed, "both" if name in BOTH else "out", gone)
    # What computes over channels has a masked form of its own, which does not look at the others.
    full, read = (zeroed, x) if kind.mixes else (layer, masked)
    found, expected = call(less, x.index_select(dim, torch.tensor(inn))), call(full, read)
    axis = dim_of(kind, layer, expected)
    kept = expected.index_select(axis, torch.tensor(out))
    assert torch.allclose(found, kept, rtol=0, atol=1e-12)
    # What absorbs makes a removed channel zero whatever it reads.
    read = x if kind.absorbs or name not in BOTH else masked
    silent = call(zeroed, read).index_select(axis, torch.tensor(gone))
    if kind.codes:  # the value that is coded; likelihoods are another matter
        silent = silent[0]
    if kind.masked("out") or kind.masked("both") or kind.pools or not kind.needs_zero:
        if "parameter" not in name:
            assert not silent.any()
        else:  # it adds nothing to what it is given
            assert torch.equal(silent, read.index_select(1, torch.tensor(gone)))


@pytest.mark.parametrize("name", LAYERS)
def test_a_mask_of_zeros_is_removal_and_one_of_ones_is_nothing(name: str) -> None:
    """As hooks put it there, on parameters or behind the layer."""
    layer, kind = make(name)
    out, inn = remaining(name)
    if not (kind.masked("out") or kind.masked("both")):
        return
    x = inputs(layer, kind)
    factor = torch.zeros(kind.widths(layer)[0], dtype=x.dtype)
    factor[out] = 1.0
    for mask in (factor, torch.ones_like(factor)):
        zeroed = copy.deepcopy(layer)
        zero(zeroed, "both" if name in BOTH else "out", (mask == 0).nonzero().flatten().tolist())
        values = kind.masked_attributes(layer, mask)
        if kind.codes:
            continue
        with torch.no_grad():
            if kind.mixes:
                holder(layer).__dict__.update(values or {})
                found = kind.on_some(layer, x, mask != 0)
                for key in values or {}:
                    del holder(layer).__dict__[key]
            elif values is None:
                found = call(layer, x)
                shape = [1] * found.dim()
                shape[kind.channel_dim(layer, found)] = -1
                found = found * kind.on_output(mask).view(shape)
            else:
                holder(layer).__dict__.update(values)
                found = call(layer, x)
                for key in values:
                    del holder(layer).__dict__[key]
        dim = kind.channel_dim(layer, found)
        stays = mask.nonzero().flatten()
        whole = call(zeroed if kind.mixes else layer, x).index_select(dim, stays)
        assert torch.allclose(found.index_select(dim, stays), whole, rtol=0, atol=1e-12)
        if kind.absorbs or name not in BOTH:
            assert torch.allclose(found, call(zeroed, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in LAYERS if "bottleneck" not in n])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_slice_is_the_layer_with_channels_removed(name: str, contiguous: bool) -> None:
    layer, kind = make(name)
    out, inn = remaining(name)
    if contiguous and name not in LATTICES:
        out = [0, 1, 2, 3]
        inn = out if name in BOTH else [0, 1, 2]
    widths = kind.widths(layer)
    less = reduced(name, layer, kind, out, inn)
    sliced = kind.sliced(
        layer, index_of(np.array(out), widths[0]), index_of(np.array(inn), widths[1])
    )
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(getattr(holder(less), k)))
        for k, v in sliced.items()
    )
    assert all(
        torch.equal(v, getattr(holder(layer), k))
        for k, v in kind.sliced(layer, None, None).items()
        if isinstance(v, Tensor)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_follow_the_widths(name: str) -> None:
    layer, kind, less, *_ = smaller(name)
    terms = kind.parameter_terms(layer)
    assert terms == kind.parameter_terms(less)
    for one in (layer, less):
        out, inn = kind.widths(one)
        inn //= kind.inputs_at_once(one)
        found = sum(p.numel() for _, p in one.named_parameters())
        assert terms[0] * out * inn + terms[1] * out == found


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_are_followed_when_parameters_are_replaced(name: str) -> None:
    layer, kind, less, out, inn = smaller(name)
    for (key, parameter), (_, other) in zip(
        list(layer.named_parameters()), less.named_parameters(), strict=True
    ):
        owner = holder(layer).get_submodule(key.rpartition(".")[0])
        if isinstance(owner, nn.ParameterList):
            owner[int(key.rpartition(".")[2])] = nn.Parameter(other.detach().clone())
        else:
            setattr(owner, key.rpartition(".")[2], nn.Parameter(other.detach().clone()))
        del parameter
    for key, buffer in holder(less).named_buffers():
        if "." not in key:
            setattr(holder(layer), key, buffer.clone())
    x = inputs(less, kind)
    kind.follow_shapes(layer)
    if kind.reads_width(layer):
        kind.follow_input(layer, x)
    assert kind.widths(layer) == kind.widths(less)
    assert getattr(layer, "groups", 1) == getattr(less, "groups", 1)


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_grouped_convolution_pruned_to_one_of_each_group_loses_groups(layer: Any) -> None:
    """It is a depthwise one from then on; its file has to tell so by its shapes alone."""
    small = layer(6, 6, 3, groups=3)
    kind = kind_of(small)
    for axis in ("out", "in"):
        remove(small, axis, [1, 3, 5], kind)
    remove(small, "both", [1])
    again = layer(6, 6, 3, groups=3)
    resize(nn.Sequential(again), {f"0.{k}": v for k, v in small.state_dict().items()})
    again.load_state_dict(small.state_dict())
    x = torch.rand(1, 2, 5, 5)
    found = kind_of(again)
    assert found is not None
    if found.reads_width(again):
        found.follow_input(again, x)
    assert again.groups == small.groups == 2
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("name", [n for n in LAYERS if "bottleneck" not in n])
def test_norms_are_of_what_goes_with_a_channel(name: str) -> None:
    layer, kind = make(name)
    widths = kind.widths(layer)
    for axis, width in (
        [("both", widths[0])] if name in BOTH else [("out", widths[0]), ("in", widths[1])]
    ):
        norms = kind.norms(layer, axis)
        assert norms.shape == (width,) and bool((norms > 0).all() or name in UNSCALED + NO_WEIGHTS)
        if axis == "out":
            zero(layer, "out", [3])
            assert kind.norms(layer, axis)[3] == 0 < kind.norms(layer, axis)[2]


@pytest.mark.parametrize("name", [n for n in LAYERS if "parameter" not in n])
def test_other_forms_compute_the_same(name: str) -> None:
    """Its fixed form and each of its other forms, at sizes that strides divide and others."""
    layer, kind = make(name)
    x = inputs(layer, kind)
    for form in (kind.fixed(layer), *kind.forms(layer).values()):
        for part in (x, x[..., 1:]) if kind.channel_axis != -1 else (x,):
            assert torch.allclose(call(form, part), call(layer, part), rtol=0, atol=1e-12)


def test_some_kinds_have_other_forms() -> None:
    made = {name: make(name) for name in LAYERS}
    assert sum(bool(kind.forms(layer)) for layer, kind in made.values()) >= 2
    assert sum(kind.fixed(layer) is not layer for layer, kind in made.values()) >= 2


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in LAYERS
        if "bottleneck" not in n and "parameter" not in n and n not in [*NO_WEIGHTS, "own norm"]
    ],
)
def test_starting_anew_changes_the_values_alone(name: str) -> None:
    layer, kind, less, *_ = smaller(name)
    before = {k: v.clone() for k, v in less.state_dict().items()}
    codec = nn.Sequential(less)
    reinitialise(codec)
    after = less.state_dict()
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert any(not torch.equal(before[k], v) for k, v in after.items())


# -- norms over channels --------------------------------------------------------------------------

KEPT = torch.tensor([True, False, True, True, False, True, False, True])


def by_formula(x: Tensor, dim: int, kept: Tensor, groups: int) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the channels kept of each group, sums over all of them
    weighted with 1 and 0; the others are zero.
    """
    x = x.movedim(dim, 1)
    weight = kept.to(x).view(1, -1, *[1] * (x.dim() - 2))
    over = list(range(2, x.dim())) if dim == 1 else []  # a group norm is over places, too
    found = []
    for one, w in zip(x.chunk(groups, 1), weight.expand(x.shape).chunk(groups, 1), strict=True):
        count = w.sum([1, *over], keepdim=True)
        mean = (w * one).sum([1, *over], keepdim=True) / count
        variance = (w * (one - mean).square()).sum([1, *over], keepdim=True) / count
        found.append(w * (one - mean) / (variance + 1e-5).sqrt())
    return torch.cat(found, 1).movedim(1, dim)


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_statistics_are_those_of_the_channels_that_count(groups: int) -> None:
    layer: nn.Module = nn.GroupNorm(groups, 8) if groups else nn.LayerNorm(8)
    kept = torch.cat((KEPT[:4], KEPT[:4])) if groups == 2 else KEPT
    x = torch.randn(2, 8, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zero(layer.double(), "both", (~kept).nonzero().flatten().tolist())
    expected = by_formula(x, 1 if groups else -1, kept, groups or 1)
    assert torch.allclose(call(layer, x), expected, rtol=0, atol=1e-12)


class ByRootMeanSquare(nn.Module):
    """As several transformers have it: a length of 1, times the root of the width."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = width**0.5
        self.g = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * self.scale


class Function(torch.autograd.Function):
    """NAFNet's way: forward and backward by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        mu = x.mean(1, keepdim=True)
        y = (x - mu) / ((x - mu).pow(2).mean(1, keepdim=True) + eps).sqrt()
        return weight.view(1, -1, 1, 1) * y + bias.view(1, -1, 1, 1)


class ByFunction(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.ones(width)))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return Function.apply(x, self.weight, self.bias, self.eps)


class EitherWay(nn.Module):
    """ConvNeXt's: channels first or last, by an argument; its shape is checked by torch."""

    def __init__(self, width: int, last: bool):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.normalized_shape, self.last = (width,), last

    def forward(self, x: Tensor) -> Tensor:
        if self.last:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-6)
        u = x.mean(1, keepdim=True)
        x = (x - u) / torch.sqrt((x - u).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class BiasFree(nn.Module):
    """Restormer's: divided by the deviation, the mean not taken away; on tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.normalized_shape = torch.Size((width,))
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * self.weight


class Permuted(nn.LayerNorm):
    """Torchvision's: a layer norm on permuted dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class WithDeviation(nn.Module):
    """The Annotated Transformer's: divided by deviation + eps."""

    def __init__(self, width: int):
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + 1e-6) + self.b_2


HAND_WRITTEN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "root mean square": (lambda: ByRootMeanSquare(7), 1),
    "function": (lambda: ByFunction(7), 1),
    "first": (lambda: EitherWay(7, False), 1),
    "last": (lambda: EitherWay(7, True), -1),
    "bias free": (lambda: BiasFree(7), -1),
    "permuted": (lambda: Permuted(7), 1),
    "deviation": (lambda: WithDeviation(7), -1),
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_norms_by_hand_are_recognised(name: str) -> None:
    make_norm, dim = HAND_WRITTEN[name]
    layer = make_norm().double()
    kind: Any = kind_of(layer)
    assert kind is not None and kind.mixes and kind.by_trial and kind.dim == dim
    x = torch.randn(2, 7, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    less = copy.deepcopy(layer)
    remove(less, "both", [1, 4, 5], kind)
    zero(layer, "both", [1, 4, 5])
    stays = torch.tensor([0, 2, 3, 6])
    axis = kind.channel_dim(layer, x)
    found = call(layer, x).index_select(axis, stays)
    assert torch.equal(found, call(less, x.index_select(axis, stays)))
    again = make_norm().double()
    resize(nn.Sequential(again), {f"0.{k}": v for k, v in less.state_dict().items()})
    again.load_state_dict(less.state_dict())
    assert torch.equal(call(again, x.index_select(axis, stays)), found)


class Other(nn.Module):
    """Not a norm, though it has a value for each channel."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight[:, None, None]
        if self.how == "scale":  # no channel sees another
            return x * weight
        if self.how == "order":  # the first channel is another than the rest
            return (x - x[:, :1]) * weight
        if self.how == "halves":  # a number in its code
            return (x - x[:, :4].mean(1, keepdim=True)) * weight
        if self.how == "offset":  # not linear in its parameters
            return (x - x.mean(1, keepdim=True)) * (1 + weight)
        return (x - x.mean(1, keepdim=True) + torch.rand_like(x)) * weight


@pytest.mark.parametrize("how", ["scale", "order", "halves", "offset", "random"])
def test_what_only_looks_like_a_norm_is_not_recognised(how: str) -> None:
    assert kind_of(Other(how)) is None


@pytest.mark.parametrize("how", ["scale", "order", "halves", "offset", "plain"])
def test_a_registered_norm_is_tried_when_it_is_first_met(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nicprune.codecs.layer_kinds.kind.KINDS", dict(KINDS))
    register_kind(Other, OwnNormKind(1, ["weight"]))
    if how != "plain":
        with pytest.raises(CodecError, match="Other is not the norm that its kind says"):
            kind_of(Other(how))
        return
    monkeypatch.setattr(
        Other, "forward", lambda s, x: F.normalize(x, dim=1) * s.weight[:, None, None]
    )
    codec = BlockCodec(Other(how)).eval()
    groups = analyse(codec, "adapt")
    assert groups["g_a.0"].pinned is None
    prune(codec, {"g_a.0": [1, 4, 6]}, groups)


# -- heads ----------------------------------------------------------------------------------------


def attention(batch_first: bool = True, bias: bool = True) -> tuple[Any, Any]:
    """Three heads of four channels, and its projection as a member of groups."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=batch_first, bias=bias)
    if bias:
        nn.init.uniform_(layer.in_proj_bias)
        nn.init.uniform_(layer.out_proj.bias)
    return layer.double().eval(), layers_of(nn.Sequential(layer))["0.out_proj"]


HEAD = [4, 5, 6, 7]
"""Channels of the head that goes, among 12; it goes from queries, keys and values."""
ROWS = [i + 12 * part for part in range(3) for i in HEAD]
STAYS = torch.tensor([i for i in range(12) if i not in HEAD])
OUTPUTS = torch.tensor([0, 2, 3, 9, 10])


def attend(layer: Any, x: Tensor, fused: bool = False) -> Tensor:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with torch.no_grad():
            return layer(x, x, x, need_weights=False)[0]
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("heads", [3, 2])
def test_a_head_goes_with_its_channels(
    batch_first: bool, bias: bool, fused: bool, heads: int
) -> None:
    layer, _ = attention(batch_first, bias)
    less = copy.deepcopy(layer)
    projection = layers_of(nn.Sequential(less))["0.out_proj"]
    kinds = kind_of(less), kind_of(projection)
    gone = HEAD if heads == 2 else []
    rows = ROWS if heads == 2 else []
    stays = STAYS if heads == 2 else torch.arange(12)
    remove(less, "out", rows, kinds[0])
    remove(less, "in", gone, kinds[0])
    remove(projection, "in", gone, kinds[1])
    remove(projection, "out", [i for i in range(12) if i not in OUTPUTS], kinds[1])
    assert (less.num_heads, less.head_dim, less.embed_dim) == (heads, 4, 4 * heads)
    x = torch.randn(5, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    full = x.clone()
    full[..., gone] = 0
    for masked in ("zero", "mask"):
        twin = copy.deepcopy(layer)
        last = layers_of(nn.Sequential(twin))["0.out_proj"]
        if masked == "zero":
            zero(twin, "out", rows)
            zero(last, "out", [i for i in range(12) if i not in OUTPUTS])
        else:
            factor = torch.ones(36, dtype=torch.float64)
            factor[rows] = 0
            factor_out = torch.zeros(12, dtype=torch.float64)
            factor_out[OUTPUTS] = 1.0
            for part, by in ((twin, factor), (last, factor_out)):
                holder(part).__dict__.update(kind_of(part).masked_attributes(part, by))  # type: ignore[union-attr]
        found = attend(twin, full, fused)
        assert not found.index_select(2, torch.tensor([1, 11])).any()
        expected = found.index_select(2, OUTPUTS)
        assert torch.allclose(attend(less, x[..., stays], fused), expected, rtol=0, atol=1e-12)


def test_a_slice_of_attention_is_attention_with_channels_removed() -> None:
    layer, projection = attention()
    less = copy.deepcopy(layer)
    small = layers_of(nn.Sequential(less))["0.out_proj"]
    kinds: Any = kind_of(layer), kind_of(projection)
    for part, kind, axis, gone in (
        (less, kinds[0], "out", ROWS),
        (less, kinds[0], "in", HEAD),
        (small, kinds[1], "in", HEAD),
    ):
        remove(part, axis, gone, kind)
        assert kind.norms(part, axis).shape == (kind.widths(part)[axis == "in"],)
    rows = torch.tensor([i for i in range(36) if i not in ROWS])
    values = kinds[0].sliced(layer, rows, STAYS) | kinds[1].sliced(projection, None, STAYS)
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer.__dict__.update(values)
    assert torch.equal(attend(layer, x), attend(less, x))
    for one, part in ((less, small), (attention()[0], attention()[1])):
        terms = [kinds[0].parameter_terms(one), kinds[1].parameter_terms(part)]
        widths = [kinds[0].widths(one), kinds[1].widths(part)]
        counted = sum(t[0] * o * i + t[1] * o for t, (o, i) in zip(terms, widths, strict=True))
        assert counted == sum(p.numel() for p in one.parameters())
    before = {k: v.shape for k, v in less.state_dict().items()}
    reinitialise(nn.Sequential(less))
    assert {k: v.shape for k, v in less.state_dict().items()} == before
    assert not less.out_proj.bias.any() and not less.in_proj_bias.any()


class OwnConvolution(nn.Conv2d):
    """A layer of somebody else's, unknown until it is registered: it may compute anything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_kind_of_ones_own_is_registered_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressai.models import FactorizedPrior

    class Codec(FactorizedPrior):
        def __init__(self) -> None:
            super().__init__(8, 12)
            self.g_a[2] = OwnConvolution(8, 8, 5, 2, 2)

    monkeypatch.setattr("nicprune.codecs.layer_kinds.kind.KINDS", dict(KINDS))
    codec = Codec().eval()
    before = {g.name for g in find_groups(codec).prunable()}
    register_kind(OwnConvolution, Convolution())
    after = {g.name for g in find_groups(codec).prunable()}
    assert "g_a.2" in after - before
    assert measure(codec).macs == measure(FactorizedPrior(8, 12)).macs


class Unlike(nn.Conv2d):
    """A convolution that does something else with its bias, or its weight, or its input."""

    how = "plain"

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "scaled":
            return F.conv2d(x, self.weight, None if self.bias is None else 2 * self.bias)
        if self.how == "first":
            return F.conv2d(x + 1, self.weight, self.bias)
        if self.how == "standardised":
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)
        if self.how == "activated":
            return F.relu(super().forward(x) - 50)
        if self.how == "second":
            return self.missing(x)
        return super().forward(x)


class Apart(Convolution):
    mask_on_weight = False


@pytest.mark.parametrize("how", ["scaled", "first", "standardised", "activated", "second"])
def test_a_kind_that_says_too_much_is_refused_when_it_is_first_met(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nicprune.codecs.layer_kinds.kind.KINDS", dict(KINDS))
    register_kind(Unlike, Convolution())
    for bias in (True, False):
        monkeypatch.setattr(Unlike, "how", "plain")
        assert kind_of(Unlike(5, 7, 1, bias=bias)) is not None
    monkeypatch.setattr(Unlike, "how", how)
    codec = BlockCodec(Unlike(8, 8, 1)).eval()
    with pytest.raises(CodecError, match="mask_on_weight is False") as error:
        find_groups(codec)
    assert "\n" not in str(error.value)
    register_kind(Unlike, Apart())
    assert kind_of(codec.g_a[1]) is not None
    register_kind(Unlike, Convolution())
    with pytest.raises(CodecError):
        kind_of(codec.g_a[1])


def test_bottlenecks_of_ones_own_are_known_by_what_they_derive_from() -> None:
    class Own(EntropyBottleneck):
        pass

    assert is_bottleneck(Own(3)) and not is_bottleneck(nn.Conv2d(1, 1, 1))
