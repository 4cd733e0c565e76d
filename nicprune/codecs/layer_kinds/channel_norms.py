"""Norms over channels: LayerNorm, RMSNorm, GroupNorm, and modules that compute one themselves.

Without some of its channels such a layer computes other statistics, and so something else. The
masked form that equals the pruned layer is the layer on the channels that count alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nicprune.codecs.copying import copy_codec
from nicprune.codecs.layer_kinds.kind import (
    KINDS,
    RECOGNISERS,
    Index,
    LayerKind,
    cut,
    kept_indices,
    take,
)
from nicprune.codecs.layer_kinds.norms import ChannelNorm, PerChannel, UnscaledNorm
from nicprune.codecs.trusted import of_a_library
from nicprune.common.errors import CodecError


class OnSome:
    """Takes the place of a norm's `forward`, with some of its channels alone.

    Attributes:
        layer: the norm.
        counted: which channels count, shape (C,).
    """

    def __init__(self, kind: MixingNorm, layer: Any, counted: Tensor):
        self.kind, self.layer, self.counted = kind, layer, counted

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the pruned norm returns, and zero for channels that do not count."""
        return self.kind.on_some(self.layer, x, self.counted)


class MixingNorm(PerChannel):
    """A norm over channels, with parameters of shape (C,) that its output is linear in, or without
    any.
    """

    needs_zero = False
    absorbs = True
    mixes = True

    def masked(self, axis: str) -> bool:
        return axis == "both"

    def masked_attributes(self, layer: Any, factor: Tensor) -> dict[str, Tensor] | None:
        values = {name: getattr(layer, name, None) for name in self.tensors}
        found = {name: self._times(v, factor) for name, v in values.items() if v is not None}
        return found or None

    def _times(self, value: Tensor, factor: Tensor) -> Tensor:
        return value * factor

    def on_some(self, layer: Any, x: Tensor, counted: Tensor) -> Tensor:
        dim, index = self.channel_dim(layer, x), counted.nonzero().flatten().to(x.device)
        values, own = self.sliced(layer, index, index), layer.__dict__
        before = {name: own[name] for name in values if name in own}
        own.update(values)
        try:
            found = type(layer).forward(layer, x.index_select(dim, index))
        finally:
            for name in values:
                del own[name]
            own.update(before)
        shape = list(found.shape)
        shape[dim] = len(counted)
        return found.new_zeros(shape).index_copy(dim, index, found)

    def zero(self, layer: Any, channels: Tensor) -> None:
        counted = self._counted(layer)
        counted[channels] = False
        layer.__dict__["forward"] = OnSome(self, layer, counted)

    def _counted(self, layer: Any) -> Tensor:
        known = layer.__dict__.get("forward")
        if isinstance(known, OnSome):
            return known.counted.clone()
        return torch.ones(self.widths(layer)[0], dtype=torch.bool)

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        kept = kept_indices(self.widths(layer)[0], removed)
        counted = self._counted(layer)[kept]
        super().remove(layer, axis, removed)
        if isinstance(layer.__dict__.pop("forward", None), OnSome) and not bool(counted.all()):
            layer.__dict__["forward"] = OnSome(self, layer, counted)


class LayerNorm(MixingNorm):
    """`nn.LayerNorm` and `nn.RMSNorm` over the last dimension."""

    tensors: tuple[str, ...] = ("weight", "bias")
    channel_axis = -1

    def traceable(self, layer: Any) -> bool:
        return len(layer.normalized_shape) == 1 and super().traceable(layer)

    def channel_dim(self, layer: Any, x: Tensor) -> int:
        return x.dim() - 1

    def widths(self, layer: Any) -> tuple[int, int]:
        return layer.normalized_shape[0], layer.normalized_shape[0]

    def width_attributes(self, layer: Any, width: int) -> dict[str, Any]:
        return {"normalized_shape": (width,)}

    def follow_shapes(self, layer: Any) -> None:
        if layer.weight is not None:  # of several dimensions where the norm is not over channels
            layer.normalized_shape = tuple(layer.weight.shape)


class RootMeanSquare(LayerNorm):
    """`nn.RMSNorm`, which has no bias."""

    tensors = ("weight",)


class GroupNorm(MixingNorm):
    """`nn.GroupNorm`: channels go in equal numbers from every group. Where each channel is a group
    of its own it is an instance norm.
    """

    tensors = ("weight", "bias")
    width = "num_channels"

    def of(self, layer: Any) -> LayerKind:
        if layer.num_groups < layer.num_channels:
            return self
        return SINGLE_GROUPS if layer.affine else UNSCALED_SINGLE_GROUPS

    def equal_parts(self, layer: Any) -> int:
        return int(layer.num_groups)

    def width_attributes(self, layer: Any, width: int) -> dict[str, Any]:
        # With fewer channels than groups, it was pruned to one of each, and then group by group.
        return {"num_channels": width, "num_groups": min(layer.num_groups, width)}


class SingleGroups(ChannelNorm):
    """A group norm whose groups are single channels."""

    adapts = False
    tensors: tuple[str, ...] = ("weight", "bias")
    width = "num_channels"

    def of(self, layer: Any) -> LayerKind:
        return self

    def width_attributes(self, layer: Any, width: int) -> dict[str, Any]:
        return {"num_channels": width, "num_groups": width}


class UnscaledSingleGroups(UnscaledNorm):
    """The same without weight and bias."""

    adapts = False
    tensors: tuple[str, ...] = ("weight", "bias")
    width = "num_channels"

    def width_attributes(self, layer: Any, width: int) -> dict[str, Any]:
        return {"num_channels": width, "num_groups": width}


SINGLE_GROUPS, UNSCALED_SINGLE_GROUPS = SingleGroups(), UnscaledSingleGroups()
KINDS[nn.LayerNorm], KINDS[nn.RMSNorm] = LayerNorm(), RootMeanSquare()
KINDS[nn.GroupNorm] = GroupNorm()


class OwnNorm(MixingNorm):
    """A module that computes a norm over channels in a forward pass of its own.

    Register a class of yours with it, or leave it to nicprune to recognise:

        register_kind(MyNorm, OwnNorm(1, ("weight", "bias")))

    Args:
        dim: the dimension of channels: 1, or -1 for the last.
        tensors: names of its parameters, with a value for each channel; its output has to be linear
            in them.
        follows: names of attributes that repeat the width, as a number or a tuple of one.
    """

    def __init__(self, dim: int, tensors: Sequence[str], follows: Sequence[str] = ()):
        self.dim, self.tensors, self.follows = dim, tuple(tensors), tuple(follows)

    def traceable(self, layer: Any) -> bool:
        return all(isinstance(getattr(layer, name, None), Tensor) for name in self.tensors)

    def channel_dim(self, layer: Any, x: Tensor) -> int:
        return self.dim % x.dim()

    def widths(self, layer: Any) -> tuple[int, int]:
        width = getattr(layer, self.tensors[0]).numel()
        return width, width

    def width_attributes(self, layer: Any, width: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in self.follows:
            value = getattr(layer, name)
            found[name] = width if isinstance(value, int) else type(value)((width,))
        return found

    def _dim_of(self, value: Tensor) -> int:
        return max(range(value.dim()), key=lambda d: value.shape[d])

    def _times(self, value: Tensor, factor: Tensor) -> Tensor:
        shape = [1] * value.dim()
        shape[self._dim_of(value)] = -1
        return value * factor.view(shape)

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        kept = kept_indices(self.widths(layer)[0], removed)
        counted = self._counted(layer)[kept]
        for name in self.tensors:
            cut(layer, name, kept, self._dim_of(getattr(layer, name)))
        self.set_width(layer, len(kept))
        if isinstance(layer.__dict__.pop("forward", None), OnSome) and not bool(counted.all()):
            layer.__dict__["forward"] = OnSome(self, layer, counted)

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        values = {name: getattr(layer, name) for name in self.tensors}
        found: dict[str, Any] = {n: take(v, self._dim_of(v), out) for n, v in values.items()}
        return found | self.width_attributes(layer, next(iter(found.values())).numel())

    def norms(self, layer: Any, axis: str) -> Tensor:
        squares = [getattr(layer, name).flatten().square() for name in self.tensors]
        return torch.stack(squares).sum(0)

    def check(self, layer: Any) -> None:
        if self.widths(layer)[0] > 1 and not _is_norm(layer, self):
            raise CodecError(
                f"{type(layer).__name__} is not the norm that its kind says: over the channels of"
                f" dimension {self.dim}, whatever their order and number, linear in"
                f" {', '.join(self.tensors)}; see OwnNorm for its arguments, or do not register it"
            )

    def starts_anew(self, layer: Any) -> bool:
        return hasattr(layer, "reset_parameters")


class RecognisedNorm(OwnNorm):
    """The same, of a class that nobody registered."""

    by_trial = True


TOLERANCE = 1e-10
"""Largest difference in a trial in float64; values are about 1."""


def recognise_norm(layer: nn.Module) -> LayerKind | None:
    """Return the kind of a module that turns out to be a norm over channels, None for any other.

    It has to have vectors of one length as its only tensors, and no parts. Tried in float64, each
    output channel has to depend on others, in whatever order they come; the output has to be linear
    in the parameters; and it has to run on some of its channels alone.
    """
    if (known := layer.__dict__.get("forward")) is not None:
        return known.kind if isinstance(known, OnSome) else None
    values = {name: value for name, value in layer._parameters.items() if value is not None}
    sizes = {value.numel() for value in values.values()}
    vectors = all(v.dim() and v.numel() == max(v.shape) for v in values.values())
    if (
        of_a_library(type(layer))
        or not vectors
        or len(sizes) != 1
        or layer._modules
        or layer._buffers
    ):
        return None
    (width,) = sizes
    if width < 2:
        return None
    place = next(iter(values.values()))
    if place.device.type == "meta" or not place.is_floating_point():
        return None
    follows = [
        name
        for name, value in layer.__dict__.items()
        if not name.startswith("_") and (value == width or value in ((width,), [width]))
    ]
    # Modules of one class with the same settings compute the same.
    settings = {k: v for k, v in layer.__dict__.items() if k not in INTERNAL}
    key = repr([(name, value.shape) for name, value in values.items()]) + repr(settings)
    tried = _tried.setdefault(type(layer), {})
    if key not in tried or not all(_plain(value) for value in settings.values()):
        tried[key] = _try_as_norm(layer, tuple(values), follows)
    return tried[key]


INTERNAL = set(nn.Module().__dict__)


def _plain(value: Any) -> bool:
    """Return whether `repr` tells a value from every other."""
    if isinstance(value, (tuple, list)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


_tried: WeakKeyDictionary[type, dict[str, LayerKind | None]] = WeakKeyDictionary()


def _try_as_norm(
    layer: nn.Module, tensors: tuple[str, ...], follows: list[str]
) -> RecognisedNorm | None:
    attributes: list[list[str]] = [[], follows] if follows else [[]]
    for dim in (1, -1):
        for names in attributes:
            kind = RecognisedNorm(dim, tensors, names)
            if _is_norm(layer, kind):
                return kind
    return None


def _is_norm(layer: nn.Module, kind: OwnNorm) -> bool:
    """Return whether a module computes a norm over channels, on images or tokens."""
    width = kind.widths(layer)[0]
    twin = copy_codec(layer).cpu().double().eval()
    a, b = (3, 4) if width not in (3, 4) else (5, 6)
    shapes: list[tuple[int, ...]] = [(2, a, b, width), (2, a, width)]
    if kind.dim == 1:
        shapes = [(2, width, a, b)]
    return any(_acts_as_norm(twin, kind, shape) for shape in shapes)


@torch.no_grad()
def _acts_as_norm(layer: Any, kind: OwnNorm, shape: tuple[int, ...]) -> bool:
    """Return whether a module, in float64, computes a norm over channels on inputs of a shape."""
    generator = torch.Generator().manual_seed(0)

    def rand(shape: Sequence[int]) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    for name in kind.tensors:
        getattr(layer, name).copy_(rand(getattr(layer, name).shape) + 0.5)
    x = rand(shape) * 3 - 1
    dim, width = kind.dim % x.dim(), kind.widths(layer)[0]
    order = torch.randperm(width, generator=generator)
    one = torch.zeros(width, dtype=torch.bool)
    one[: max(1, width // 2)] = True
    changed = x.clone()
    changed.select(dim, 0).mul_(-1.5)
    factor = rand((width,))
    try:
        y = layer(x)
        if not isinstance(y, Tensor) or y.shape != x.shape or not bool(torch.isfinite(y).all()):
            return False
        mixes = not torch.equal(layer(changed).select(dim, 1), y.select(dim, 1))
        again = copy_codec(layer)
        for name, value in kind.sliced(layer, order, order).items():
            again.__dict__[name] = value
        moved = again(x.index_select(dim, order))
        some = kind.on_some(layer, x, one)
        scaled = copy_codec(layer)
        scaled.__dict__.update(kind.masked_attributes(layer, factor) or {})
        view = [1] * x.dim()
        view[dim] = -1
        return (
            mixes
            and bool(torch.isfinite(some).all())
            and some.shape == x.shape
            and _close(moved, y.index_select(dim, order))
            and _close(scaled(x), y * factor.view(view))
        )
    except Exception:  # a foreign module's own code may raise anything
        return False


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool((first - second).abs().max() <= TOLERANCE)


RECOGNISERS.append(recognise_norm)
