"""Layers with a value for each channel: batch and instance norms, and PReLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import (
    KINDS,
    Index,
    LayerKind,
    cut,
    kept_indices,
    kind_of,
    take,
    zero_or_one,
)


class PerChannel(LayerKind):
    """A layer that changes each channel by itself, with parameters (and buffers) of shape (C,).

    Attributes:
        tensors: names of those parameters and buffers; they may be None.
        width: name of the attribute that repeats their length.
    """

    flow = "coupled"
    tensors: tuple[str, ...] = ()
    width = ""

    def traceable(self, layer: Any) -> bool:
        return set(layer._parameters) <= set(self.tensors)

    def channel_dim(self, layer: Any, x: Tensor) -> int:
        return 1

    def widths(self, layer: Any) -> tuple[int, int]:
        return getattr(layer, self.width), getattr(layer, self.width)

    def is_product(self, layer: Any) -> bool:
        return False

    def parameter_terms(self, layer: Any) -> tuple[int, int]:
        return 0, sum(p.numel() for p in layer.parameters()) // self.widths(layer)[0]

    def masked(self, axis: str) -> bool:
        return False

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        kept = kept_indices(self.widths(layer)[0], removed)
        for name in self.tensors:
            cut(layer, name, kept)
        self.set_width(layer, len(kept))

    def width_attributes(self, layer: Any, width: int) -> dict[str, Any]:
        """Return the attributes that repeat the width, for another width."""
        return {self.width: width}

    def set_width(self, layer: Any, width: int) -> None:
        """Set the attributes that repeat the width."""
        for name, value in self.width_attributes(layer, width).items():
            setattr(layer, name, value)

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: take(getattr(layer, name), 0, out)
            for name in self.tensors
            if getattr(layer, name) is not None
        }
        length = len(take(torch.arange(self.widths(layer)[0]), 0, out))
        return found | self.width_attributes(layer, length)

    def follow_shapes(self, layer: Any) -> None:
        for name in self.tensors:
            if getattr(layer, name) is not None:
                self.set_width(layer, getattr(layer, name).numel())

    def reads_width(self, layer: Any) -> bool:
        return all(getattr(layer, name) is None for name in self.tensors)

    def follow_input(self, layer: Any, x: Tensor) -> None:
        self.set_width(layer, x.shape[self.channel_dim(layer, x)])

    def norms(self, layer: Any, axis: str) -> Tensor:
        total = torch.zeros(self.widths(layer)[0])
        for name, parameter in layer.named_parameters(recurse=False):
            if name in self.tensors:
                total = total.to(parameter) + parameter.square()
        return total

    def reinitialise(self, layer: Any) -> None:
        layer.reset_parameters()


STATISTICS = {"running_mean", "running_var", "_u", "_v", "weight_u", "weight_v"}
"""Buffers that layers change while they run in training mode: running statistics of norms, and
singular vectors of spectral normalisation, in both of PyTorch's forms.
"""


def learns_by_running(layer: nn.Module) -> bool:
    """Return whether a layer changes in training mode whether or not its parameters are trained."""
    kind = kind_of(layer)
    return (kind is not None and kind.adapts) or any(
        name in STATISTICS for name, _ in layer.named_buffers(recurse=False)
    )


class ChannelNorm(PerChannel):
    """Batch and instance norms: (x - mean) / sqrt(variance + eps) * weight + bias, by channel. A
    mask stands behind them too: what the running mean and the bias make of a zero goes with the
    channel.
    """

    needs_zero = False
    absorbs = True
    adapts = True
    tensors: tuple[str, ...] = ("weight", "bias", "running_mean", "running_var")
    width = "num_features"

    def of(self, layer: Any) -> LayerKind:
        return self if layer.affine else UNSCALED

    def masked(self, axis: str) -> bool:
        return axis == "both"

    def zero(self, layer: Any, channels: Tensor) -> None:
        for value in (layer.weight, layer.bias):
            value.index_fill_(0, channels.to(value.device), 0.0)

    def masked_attributes(self, layer: Any, factor: Tensor) -> dict[str, Tensor] | None:
        return {"weight": layer.weight * factor, "bias": layer.bias * factor}


class UnscaledNorm(ChannelNorm):
    """A norm without weight and bias: a zero is shifted by the running mean alone."""

    absorbs = False

    def of(self, layer: Any) -> LayerKind:
        return self

    def zero(self, layer: Any, channels: Tensor) -> None:
        mean = getattr(layer, "running_mean", None)
        if mean is not None:
            mean.index_fill_(0, channels.to(mean.device), 0.0)

    def masked_attributes(self, layer: Any, factor: Tensor) -> dict[str, Tensor] | None:
        return None

    def on_output(self, factor: Tensor) -> Tensor:
        return zero_or_one(factor)


class Slope(PerChannel):
    """PReLU with a slope for each channel: zero stays zero."""

    needs_zero = False
    tensors = ("weight",)
    width = "num_parameters"

    def of(self, layer: Any) -> LayerKind:
        return self if layer.num_parameters > 1 else SINGLE_SLOPE


class Through(LayerKind):
    """A layer without channels of its own that leaves zero zero, on any dimension."""

    flow = "through"

    @property
    def has_channels(self) -> bool:
        return False


SINGLE_SLOPE, UNSCALED = Through(), UnscaledNorm()
KINDS[nn.PReLU] = Slope()
for norm in (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.InstanceNorm2d,
):
    KINDS[norm] = ChannelNorm()
