"""Convolutions: plain, transposed, masked, and with groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from compressai.layers import CheckerboardMaskedConv2d, MaskedConv2d
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import (
    KINDS,
    Index,
    LayerKind,
    cut,
    index_of,
    kept_indices,
    take,
    zero_or_one,
)
from nicprune.codecs.layer_kinds.layout import Layout
from nicprune.codecs.layer_kinds.rewrites import pointwise, shuffled, unshuffled


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
    family: Any = nn.Conv2d
    settings: tuple[str, ...] = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    """Arguments of the constructor that are attributes of the layer."""

    def of(self, layer: Any) -> LayerKind:
        groups = getattr(layer, "groups", 1)
        if groups == 1:
            return self
        if groups == layer.in_channels == layer.out_channels:
            return DEPTHWISE
        return GROUPED_TRANSPOSED if self.rows == 1 else GROUPED

    def traceable(self, layer: Any) -> bool:
        return set(layer._parameters) == {"weight", "bias"}

    def widths(self, layer: Any) -> tuple[int, int]:
        return layer.out_channels, layer.in_channels

    def forms(self, layer: Any) -> dict[str, nn.Module]:
        forms = {
            "matrix product": pointwise(layer),
            "pixel unshuffle and convolution": unshuffled(layer),
        }
        return {name: form for name, form in forms.items() if form is not None}

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

    def masked_attributes(self, layer: Any, factor: Tensor) -> dict[str, Tensor] | None:
        if not self.mask_on_weight:
            return None
        found = {"weight": layer.weight * self.along(layer, "out", factor)}
        return found if layer.bias is None else found | {"bias": layer.bias * factor}

    def narrowed_weight(self, layer: Any, index: Tensor) -> Tensor:
        return layer.weight.index_select(1 - self.rows, index)

    def _effective_weight(self, layer: Any) -> Tensor:
        return layer.weight

    def grown(self, layer: Any, inputs: int, outputs: int) -> nn.Module | None:
        if layer.groups != 1 or not self.traceable(layer):
            return None
        given = {name: getattr(layer, name) for name in self.settings}
        made = self.family(inputs, outputs, bias=layer.bias is not None, **given)
        return made.to(layer.weight.device, layer.weight.dtype)

    def copy_rows(self, layer: Any, new: Any, rows: Tensor, inputs: Layout) -> None:
        own, columns = layer.weight.index_select(self.rows, rows), 1 - self.rows
        if inputs.added:
            own = inputs.join(own, inputs.new(new.weight, columns), columns)
        new.weight.copy_(own)
        if layer.bias is not None:
            new.bias.copy_(layer.bias.index_select(0, rows))

    def joined(
        self, layer: Any, new: Any, inputs: Layout, outputs: Layout, factor: Tensor | None = None
    ) -> dict[str, Tensor]:
        own = layer.weight
        rows, columns = self.rows, 1 - self.rows
        none = list(own.shape)
        none[columns] = inputs.added
        wide = inputs.join(own, own.new_zeros(none), columns)
        if new is None:
            return {"weight": wide}
        weight, bias = new.weight, new.bias
        if factor is not None:
            weight = weight * self.along(new, "out", factor)
            bias = bias * factor if bias is not None else None
        found = {"weight": outputs.join(wide, weight, rows)}
        if layer.bias is not None:
            found["bias"] = outputs.join(layer.bias, bias, 0)
        return found

    def norms(self, layer: Any, axis: str) -> Tensor:
        dim = self.rows if axis != "in" else 1 - self.rows
        weight = self._effective_weight(layer)
        norms = weight.movedim(dim, 0).flatten(1).square().sum(1)
        return norms + layer.bias.square() if axis != "in" and layer.bias is not None else norms


class TransposedConvolution(Convolution):
    """`nn.ConvTranspose2d`: weight (in, out, H, W)."""

    rows = 1
    family = nn.ConvTranspose2d
    settings = ("kernel_size", "stride", "padding", "output_padding", "dilation")

    def forms(self, layer: Any) -> dict[str, nn.Module]:
        form = shuffled(layer)
        return {} if form is None else {"convolution and pixel shuffle": form}


class MaskedConvolution(Convolution):
    """CompressAI's masked convolutions: a buffer `mask` of the weight's shape is multiplied onto it
    in place at every call, so a channel's mask goes on the output.
    """

    mask_on_weight = False
    pruner = MaskedConvPruner()
    family = MaskedConv2d

    def of(self, layer: Any) -> LayerKind:
        return self

    def traceable(self, layer: Any) -> bool:
        return super().traceable(layer) and layer.groups == 1

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        return super().sliced(layer, out, inn) | {"mask": self._cut(layer.mask, out, inn)}

    def _effective_weight(self, layer: Any) -> Tensor:
        return layer.weight * layer.mask

    def grown(self, layer: Any, inputs: int, outputs: int) -> nn.Module | None:
        new: Any = super().grown(layer, inputs, outputs)
        if new is not None:  # the same places for every pair of channels
            new.register_buffer("mask", layer.mask[:1, :1].expand_as(new.weight).clone())
        return new

    def joined(
        self, layer: Any, new: Any, inputs: Layout, outputs: Layout, factor: Tensor | None = None
    ) -> dict[str, Tensor]:
        found = super().joined(layer, new, inputs, outputs, factor)
        mask = layer.mask[:1, :1].expand_as(found["weight"]).clone()
        return {**found, "weight": found["weight"] * mask, "mask": mask}


class DepthwiseConvolution(Convolution):
    """A convolution whose channels are groups of their own: each output channel is computed from
    the input channel of the same number. Its bias goes with the channel, so a mask stands behind
    it too.
    """

    flow = "coupled"
    needs_zero = False
    absorbs = True
    mask_on_weight = False
    pruner = tp.pruner.function.DepthwiseConvPruner()

    def of(self, layer: Any) -> LayerKind:
        return self

    def masked(self, axis: str) -> bool:
        return axis == "both"

    def is_product(self, layer: Any) -> bool:
        return False

    def parameter_terms(self, layer: Any) -> tuple[int, int]:
        out = layer.out_channels
        return 0, layer.weight.numel() // out + int(layer.bias is not None)

    def zero(self, layer: Any, channels: Tensor) -> None:
        layer.weight.index_fill_(0, channels.to(layer.weight.device), 0.0)
        if layer.bias is not None:
            layer.bias.index_fill_(0, channels.to(layer.bias.device), 0.0)

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        found: dict[str, Any] = {"weight": take(layer.weight, 0, out)}
        if layer.bias is not None:
            found["bias"] = take(layer.bias, 0, out)
        found["groups"] = len(found["weight"])
        return found

    def masked_attributes(self, layer: Any, factor: Tensor) -> dict[str, Tensor] | None:
        # The input is masked already: what is left to multiply is the bias.
        found = {"weight": layer.weight * zero_or_one(factor).view(-1, 1, 1, 1)}
        return found if layer.bias is None else found | {"bias": layer.bias * factor}

    def follow_shapes(self, layer: Any) -> None:
        layer.groups = layer.in_channels = layer.out_channels = layer.weight.shape[0]

    def reads_width(self, layer: Any) -> bool:
        return True

    def follow_input(self, layer: Any, x: Tensor) -> None:
        # By its shape alone, it may be what is left of one with several outputs for each input.
        layer.groups = layer.in_channels = x.shape[self.channel_dim(layer, x)]

    def along(self, layer: Any, axis: str, factor: Tensor) -> Tensor:
        return factor.view(-1, 1, 1, 1)

    def norms(self, layer: Any, axis: str) -> Tensor:
        norms = layer.weight.flatten(1).square().sum(1)
        return norms if layer.bias is None else norms + layer.bias.square()


class GroupedConvolution(Convolution):
    """A convolution with groups: weight (out, in / groups, H, W). Channels go in equal numbers from
    every group: those at the same place in each are one unit. Where each input is a group of its
    own, whole groups go.
    """

    flow = "grouped"

    def of(self, layer: Any) -> LayerKind:
        return self

    def by_group(self, layer: Any) -> bool:
        return bool(layer.in_channels == layer.groups)

    def is_product(self, layer: Any) -> bool:
        return not self.by_group(layer)

    def inputs_at_once(self, layer: Any) -> int:
        return int(layer.groups) if self.is_product(layer) else 1

    def parameter_terms(self, layer: Any) -> tuple[int, int]:
        size, bias = layer.weight[0, 0].numel(), int(layer.bias is not None)
        return (size, bias) if self.is_product(layer) else (0, size + bias)

    def _places(self, layer: Any, width: int, kept: Index) -> Index:
        """Return the places that stay in every group, from the channels that stay."""
        size = width // layer.groups
        indices = np.arange(width)
        if isinstance(kept, slice):
            indices = indices[: kept.stop]
        elif kept is not None:
            indices = kept.numpy()
        return index_of(np.unique(indices % size), size)

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        width = layer.in_channels if axis == "in" else layer.out_channels
        kept = kept_indices(width, removed)
        places = self._places(layer, width, torch.tensor(kept))
        index = (
            list(range(width // layer.groups))
            if places is None
            else (list(range(places.stop)) if isinstance(places, slice) else places.tolist())
        )
        self._cut_weight(layer, axis, kept, index)
        if axis == "in":
            layer.in_channels = len(kept)
        else:
            cut(layer, "bias", kept)
            layer.out_channels = len(kept)

    def _cut_weight(
        self, layer: Any, axis: str, kept: Sequence[int], places: Sequence[int]
    ) -> None:
        if axis != "in":
            cut(layer, "weight", kept)
        elif self.by_group(layer):  # rows go with the outputs
            layer.groups = len(kept)
        else:
            cut(layer, "weight", places, 1)

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        weight = take(layer.weight, 0, out)
        found: dict[str, Any] = {}
        if self.by_group(layer):
            found["groups"] = len(take(torch.arange(layer.in_channels), 0, inn))
        else:
            weight = take(weight, 1, self._places(layer, layer.in_channels, inn))
        if layer.bias is not None:
            found["bias"] = take(layer.bias, 0, out)
        return {"weight": weight} | found

    def follow_shapes(self, layer: Any) -> None:
        layer.out_channels = layer.weight.shape[0]
        layer.in_channels = layer.weight.shape[1] * layer.groups

    def reads_width(self, layer: Any) -> bool:
        return True

    def follow_input(self, layer: Any, x: Tensor) -> None:
        # Whole groups may have gone, which the shape of the weight does not tell.
        layer.in_channels = x.shape[self.channel_dim(layer, x)]
        layer.groups = layer.in_channels // layer.weight.shape[1]

    def along(self, layer: Any, axis: str, factor: Tensor) -> Tensor:
        if axis != "in":
            return factor.view(-1, 1, 1, 1)
        blocks = factor.view(layer.groups, 1, -1)
        rows = layer.out_channels // layer.groups
        return blocks.expand(-1, rows, -1).flatten(0, 1)[..., None, None]

    def norms(self, layer: Any, axis: str) -> Tensor:
        squares = layer.weight.flatten(2).square().sum(2)
        if axis == "in":
            return squares.view(layer.groups, -1, squares.shape[1]).sum(1).flatten()
        norms = squares.sum(1)
        return norms if layer.bias is None else norms + layer.bias.square()


class GroupedTransposedConvolution(GroupedConvolution):
    """A transposed convolution with groups: weight (in, out / groups, H, W)."""

    rows = 1

    def by_group(self, layer: Any) -> bool:
        return False

    def _cut_weight(
        self, layer: Any, axis: str, kept: Sequence[int], places: Sequence[int]
    ) -> None:
        cut(layer, "weight", *((kept, 0) if axis == "in" else (places, 1)))

    def zero(self, layer: Any, channels: Tensor) -> None:
        factor = torch.ones(layer.out_channels, dtype=layer.weight.dtype)
        factor[channels] = 0.0
        factor = factor.to(layer.weight.device)
        layer.weight.mul_(self.along(layer, "out", factor))
        if layer.bias is not None:
            layer.bias.mul_(factor)

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        places = self._places(layer, layer.out_channels, out)
        found: dict[str, Any] = {"weight": take(take(layer.weight, 0, inn), 1, places)}
        if layer.bias is not None:
            found["bias"] = take(layer.bias, 0, out)
        return found

    def follow_shapes(self, layer: Any) -> None:
        layer.in_channels = layer.weight.shape[0]
        # With fewer inputs than groups, it was pruned to one of each, and then group by group.
        layer.groups = min(layer.groups, layer.in_channels)
        layer.out_channels = layer.weight.shape[1] * layer.groups

    def reads_width(self, layer: Any) -> bool:
        return False

    def along(self, layer: Any, axis: str, factor: Tensor) -> Tensor:
        if axis == "in":
            return factor.view(-1, 1, 1, 1)
        blocks = factor.view(layer.groups, 1, -1)
        rows = layer.in_channels // layer.groups
        return blocks.expand(-1, rows, -1).flatten(0, 1)[..., None, None]

    def norms(self, layer: Any, axis: str) -> Tensor:
        squares = layer.weight.flatten(2).square().sum(2)
        if axis == "in":
            return squares.sum(1)
        norms = squares.view(layer.groups, -1, squares.shape[1]).sum(1).flatten()
        return norms if layer.bias is None else norms + layer.bias.square()


DEPTHWISE = DepthwiseConvolution()
GROUPED, GROUPED_TRANSPOSED = GroupedConvolution(), GroupedTransposedConvolution()
KINDS[nn.Conv2d] = Convolution()
KINDS[nn.ConvTranspose2d] = TransposedConvolution()
KINDS[MaskedConv2d] = KINDS[CheckerboardMaskedConv2d] = MaskedConvolution()


def is_convolution_2d(layer: nn.Module) -> bool:
    """Return whether a layer is a 2-D convolution, transposed or not, or of a class of one."""
    return isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
