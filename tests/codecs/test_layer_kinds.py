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
    index_of,
    is_bottleneck,
    kind_of,
    register_kind,
)
from nicprune.codecs.layer_kinds.operations import reinitialise, remove, zero
from nicprune.common.errors import SurgeryError
from nicprune.pruning.cost import measure

KEPT_OUT, KEPT_IN = [0, 2, 3, 6], [1, 2, 4]


def _vbr_bottleneck() -> nn.Module:
    return ScaleHyperpriorVbr(7, 7, vr_entbttlnck=True).entropy_bottleneck


LAYERS: dict[str, Callable[[], Any]] = {
    "convolution": lambda: nn.Conv2d(5, 7, 3, 2, 1),
    "convolution without bias": lambda: nn.Conv2d(5, 7, 1, bias=False),
    "transposed convolution": lambda: nn.ConvTranspose2d(5, 7, 3, 2, 1),
    "masked convolution": lambda: MaskedConv2d(5, 7, 5, padding=2),
    "checkerboard convolution": lambda: CheckerboardMaskedConv2d(5, 7, 5, padding=2),
    "depthwise convolution": lambda: nn.Conv2d(7, 7, 3, padding=1, groups=7),
    "linear": lambda: nn.Linear(5, 7),
    "GDN": lambda: GDN(7),
    "IGDN": lambda: GDN(7, inverse=True),
    "GDN1": lambda: GDN1(7),
    "entropy bottleneck": lambda: EntropyBottleneck(7),
    "variable-rate entropy bottleneck": _vbr_bottleneck,
}
BOTH = [name for name in LAYERS if "GDN" in name or "bottleneck" in name or "depthwise" in name]


def make(name: str) -> tuple[Any, Any]:
    """A layer in float64 with weights that let no mistake hide, and its kind."""
    torch.manual_seed(0)
    layer = make_telling(nn.Sequential(LAYERS[name]()))[0].double()
    kind = kind_of(layer)
    assert kind is not None
    return layer, kind


def inputs(layer: Any, kind: Any) -> Tensor:
    channels = kind.widths(layer)[1]
    shape = (2, 4, channels) if kind.channel_axis == -1 else (2, channels, 6, 6)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, dtype=torch.float64, generator=generator) * 3


def call(layer: Any, x: Tensor) -> Tensor:
    """What a layer makes of x; of an entropy model, likelihoods."""
    layer.eval()
    with torch.no_grad():
        out = layer(x)
    return torch.stack(out) if isinstance(out, tuple) else out


def smaller(name: str) -> tuple[Any, Any, Any, list[int], list[int]]:
    """A layer, its kind, the layer with some channels removed, and those that stay."""
    layer, kind = make(name)
    less = copy.deepcopy(layer)
    widths = kind.widths(layer)
    axes = [("both", KEPT_OUT, widths[0])]
    if name not in BOTH:
        axes = [("out", KEPT_OUT, widths[0]), ("in", KEPT_IN, widths[1])]
    for axis, kept, width in axes:
        remove(less, axis, [i for i in range(width) if i not in kept])
    return layer, kind, less, KEPT_OUT, KEPT_OUT if name in BOTH else KEPT_IN


def test_every_kind_is_tried() -> None:
    tried = {type(make()) for make in LAYERS.values()}
    without = {GaussianConditional, LowerBound}
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
    dim = x.dim() + kind.channel_axis
    masked = torch.zeros_like(x).index_copy(
        dim, torch.tensor(inn), x.index_select(dim, torch.tensor(inn))
    )
    found, expected = call(less, x.index_select(dim, torch.tensor(inn))), call(layer, masked)
    axis = expected.dim() + kind.channel_axis
    kept = expected.index_select(axis, torch.tensor(out))
    assert torch.allclose(found, kept, rtol=0, atol=1e-12)
    gone = [i for i in range(kind.widths(layer)[0]) if i not in out]
    zeroed = copy.deepcopy(layer)
    zero(zeroed, "both" if name in BOTH else "out", gone)
    silent = call(zeroed, masked).index_select(axis, torch.tensor(gone))
    if kind.codes:  # the value that is coded; likelihoods are another matter
        silent = silent[0]
    if kind.masked("out") or kind.masked("both") or kind.pools:
        assert not silent.any()


@pytest.mark.parametrize("name", [n for n in LAYERS if "bottleneck" not in n])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_slice_is_the_layer_with_channels_removed(name: str, contiguous: bool) -> None:
    layer, kind = make(name)
    out = [0, 1, 2, 3] if contiguous else KEPT_OUT
    inn = out if name in BOTH else ([0, 1, 2] if contiguous else KEPT_IN)
    less = copy.deepcopy(layer)
    widths = kind.widths(layer)
    for axis, kept, width in (
        [("both", out, widths[0])]
        if name in BOTH
        else [
            ("out", out, widths[0]),
            ("in", inn, widths[1]),
        ]
    ):
        remove(less, axis, [i for i in range(width) if i not in kept])
    sliced = kind.sliced(
        layer, index_of(np.array(out), widths[0]), index_of(np.array(inn), widths[1])
    )
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(getattr(less, k)))
        for k, v in sliced.items()
    )
    assert all(
        torch.equal(v, getattr(layer, k))
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
        assert terms[0] * out * inn + terms[1] * out == sum(p.numel() for p in one.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_are_followed_when_parameters_are_replaced(name: str) -> None:
    layer, kind, less, *_ = smaller(name)
    for (key, parameter), other in zip(
        list(layer.named_parameters()), less.parameters(), strict=True
    ):
        owner = layer.get_submodule(key.rpartition(".")[0])
        if isinstance(owner, nn.ParameterList):
            owner[int(key.rpartition(".")[2])] = nn.Parameter(other.detach().clone())
        else:
            setattr(owner, key.rpartition(".")[2], nn.Parameter(other.detach().clone()))
        del parameter
    kind.follow_shapes(layer)
    assert kind.widths(layer) == kind.widths(less)


@pytest.mark.parametrize("name", [n for n in LAYERS if "bottleneck" not in n])
def test_norms_are_of_what_goes_with_a_channel(name: str) -> None:
    layer, kind = make(name)
    for axis, width in [("both", 7)] if name in BOTH else [("out", 7), ("in", 5)]:
        norms = kind.norms(layer, axis)
        assert norms.shape == (width,) and bool((norms > 0).all())
        if axis == "out":
            zero(layer, "out", [3])
            assert kind.norms(layer, axis)[3] == 0 < kind.norms(layer, axis)[2]


@pytest.mark.parametrize("name", [n for n in LAYERS if "bottleneck" not in n])
def test_starting_anew_changes_the_values_alone(name: str) -> None:
    layer, kind, less, *_ = smaller(name)
    before = {k: v.clone() for k, v in less.state_dict().items()}
    codec = nn.Sequential(less)
    reinitialise(codec)
    after = less.state_dict()
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert any(not torch.equal(before[k], v) for k, v in after.items())


class OwnConvolution(nn.Conv2d):
    """A layer of somebody else's, unknown until it is registered."""


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
