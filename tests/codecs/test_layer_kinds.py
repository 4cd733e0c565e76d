"""Every kind of layer by the same properties: less of it is what is left of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import GDN, GDN1, CheckerboardMaskedConv2d, MaskedConv2d
from compressai.models.vbr import ScaleHyperpriorVbr
from compressai.ops import LowerBound
from helpers import make_telling
from torch import Tensor, nn

from nicprune.channels.groups import find_groups
from nicprune.codecs.layer_kinds import (
    KINDS,
    Convolution,
    holder,
    index_of,
    is_bottleneck,
    kind_of,
    register_kind,
)
from nicprune.codecs.layer_kinds.parameters import OwnParameter
from nicprune.codecs.layer_operations import reinitialise, remove, resize, zero
from nicprune.common.errors import SurgeryError
from nicprune.pruning.cost import measure

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
}
"""Channels that can stay of layers where not any can: outputs and inputs."""
NO_WEIGHTS = ["instance norm without scale"]
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
    found, expected = call(less, x.index_select(dim, torch.tensor(inn))), call(layer, masked)
    axis = dim_of(kind, layer, expected)
    kept = expected.index_select(axis, torch.tensor(out))
    assert torch.allclose(found, kept, rtol=0, atol=1e-12)
    gone = [i for i in range(kind.widths(layer)[0]) if i not in out]
    zeroed = copy.deepcopy(layer)
    zero(zeroed, "both" if name in BOTH else "out", gone)
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
            if values is None:
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
        whole = call(layer, x).index_select(dim, stays)
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
    for axis, width in [("both", 7)] if name in BOTH else [("out", widths[0]), ("in", widths[1])]:
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
    [n for n in LAYERS if "bottleneck" not in n and "parameter" not in n and n not in NO_WEIGHTS],
)
def test_starting_anew_changes_the_values_alone(name: str) -> None:
    layer, kind, less, *_ = smaller(name)
    before = {k: v.clone() for k, v in less.state_dict().items()}
    codec = nn.Sequential(less)
    reinitialise(codec)
    after = less.state_dict()
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert any(not torch.equal(before[k], v) for k, v in after.items())


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


def test_bottlenecks_of_ones_own_are_known_by_what_they_derive_from() -> None:
    class Own(EntropyBottleneck):
        pass

    assert is_bottleneck(Own(3)) and not is_bottleneck(nn.Conv2d(1, 1, 1))
