"""Convolutions: plain, transposed, masked, and with groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch_pruning as tp
from compressai.layers import CheckerboardMaskedConv2d, MaskedConv2d
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import KINDS, Index, LayerKind, kept_indices, take


class MaskedConvPruner(tp.pruner.function.ConvPruner):
    """Masked convolutions: weight, bias, and the mask buffer, which torch-pruning leaves as it
    was.
    """

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        kept = kept_indices(layer.out_channels, idxs)
        super().prune_out_channels(layer, idxs)
        layer.mask = layer.mask[kept].clone()
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        kept = kept_indices(layer.in_channels, idxs)
        super().prune_in_channels(layer, idxs)
        layer.mask = layer.mask[:, kept].clone()
        return layer


class Convolution(LayerKind):
    """`nn.Conv2d` and layers that keep weight and bias as it does: weight (out, in, H, W)."""

    flow = "dense"
    convolution = True
    mask_on_weight = True
    rows = 0
    """The dimension of the weight that holds output channels; inputs are on the other."""
    pruner: Any = tp.pruner.function.ConvPruner()

    def of(self, layer: Any) -> LayerKind:
        return GROUPED if getattr(layer, "groups", 1) > 1 else self

    def traceable(self, layer: Any) -> bool:
        return set(layer._parameters) == {"weight", "bias"}

    def widths(self, layer: Any) -> tuple[int, int]:
        return layer.out_channels, layer.in_channels

    def parameter_terms(self, layer: Any) -> tuple[int, int]:
        out, inn = self.widths(layer)
        return layer.weight.numel() // (out * inn), int(layer.bias is not None)

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        self.pruner(layer, list(removed), to_output=axis != "in")

    def zero(self, layer: Any, channels: Tensor) -> None:
        layer.weight.index_fill_(self.rows, channels.to(layer.weight.device), 0.0)
        if layer.bias is not None:
            layer.bias.index_fill_(0, channels.to(layer.bias.device), 0.0)

    def _cut(self, value: Tensor, out: Index, inn: Index) -> Tensor:
        return take(take(value, self.rows, out), 1 - self.rows, inn)

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        found: dict[str, Any] = {"weight": self._cut(layer.weight, out, inn)}
        if layer.bias is not None:
            found["bias"] = take(layer.bias, 0, out)
        return found

    def follow_shapes(self, layer: Any) -> None:
        shape = layer.weight.shape
        layer.out_channels, layer.in_channels = shape[self.rows], shape[1 - self.rows]

    def along(self, layer: Any, axis: str, factor: Tensor) -> Tensor:
        first = self.rows == (0 if axis != "in" else 1)
        return factor.view(-1, 1, 1, 1) if first else factor.view(1, -1, 1, 1)

    def narrowed_weight(self, layer: Any, index: Tensor) -> Tensor:
        """Return the weight for some of the input channels."""
        return layer.weight.index_select(1 - self.rows, index)

    def _effective_weight(self, layer: Any) -> Tensor:
        return layer.weight

    def norms(self, layer: Any, axis: str) -> Tensor:
        dim = self.rows if axis != "in" else 1 - self.rows
        weight = self._effective_weight(layer)
        norms = weight.movedim(dim, 0).flatten(1).square().sum(1)
        return norms + layer.bias.square() if axis != "in" and layer.bias is not None else norms


class TransposedConvolution(Convolution):
    """`nn.ConvTranspose2d`: weight (in, out, H, W)."""

    rows = 1


class MaskedConvolution(Convolution):
    """CompressAI's masked convolutions: a buffer `mask` of the weight's shape is multiplied onto it
    in place at every call, so a channel's mask goes on the output.
    """

    mask_on_weight = False
    pruner = MaskedConvPruner()

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        return super().sliced(layer, out, inn) | {"mask": self._cut(layer.mask, out, inn)}

    def _effective_weight(self, layer: Any) -> Tensor:
        return layer.weight * layer.mask


class GroupedConvolution(Convolution):
    """A convolution with groups. Where each channel is a group of its own (depthwise), output
    channels are the input's; others are marked unprunable by the tracer.
    """

    flow = "grouped"
    mask_on_weight = False
    pruner = tp.pruner.function.DepthwiseConvPruner()

    def of(self, layer: Any) -> LayerKind:
        return self

    def masked(self, axis: str) -> bool:
        return False

    def is_depthwise(self, layer: Any) -> bool:
        """Whether each channel is a group of its own."""
        return bool(layer.groups == layer.in_channels == layer.out_channels)

    def is_product(self, layer: Any) -> bool:
        return False

    def parameter_terms(self, layer: Any) -> tuple[int, int]:
        out = layer.out_channels
        return 0, layer.weight.numel() // out + int(layer.bias is not None)

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        found: dict[str, Any] = {"weight": take(layer.weight, 0, out)}
        if layer.bias is not None:
            found["bias"] = take(layer.bias, 0, out)
        found["groups"] = len(found["weight"])
        return found

    def follow_shapes(self, layer: Any) -> None:
        layer.groups = layer.in_channels = layer.out_channels = layer.weight.shape[0]

    def norms(self, layer: Any, axis: str) -> Tensor:
        norms = layer.weight.flatten(1).square().sum(1)
        return norms if layer.bias is None else norms + layer.bias.square()


GROUPED = GroupedConvolution()
KINDS[nn.Conv2d] = Convolution()
KINDS[nn.ConvTranspose2d] = TransposedConvolution()
KINDS[MaskedConv2d] = KINDS[CheckerboardMaskedConv2d] = MaskedConvolution()
