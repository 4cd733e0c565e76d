"""Entropy models: bottlenecks with a distribution for each channel, Gaussian conditionals, and the
lower bounds beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch_pruning as tp
from compressai.entropy_models import (
    EntropyBottleneck,
    EntropyBottleneckVbr,
    EntropyModel,
    EntropyModelVbr,
    GaussianConditional,
)
from compressai.ops import LowerBound
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import KINDS, LayerKind, kept_indices, kind_of, zero_or_one

QUANTILES = "quantiles"


class EntropyBottleneckPruner(tp.BasePruningFunc):
    """Entropy bottlenecks: the network of each channel, its quantiles, and its rows of the CDF
    tables.
    """

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        kept = kept_indices(layer.channels, idxs)
        if hasattr(layer, "matrices"):
            for parameters in (layer.matrices, layer.biases, layer.factors):
                for i in range(len(parameters)):
                    parameters[i] = self._prune_parameter_and_grad(parameters[i], kept, 0)
        else:  # EntropyBottleneckVbr registers them one by one
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if name.startswith(("_matrix", "_factor", "_bias")):
                    setattr(layer, name, self._prune_parameter_and_grad(parameter, kept, 0))
        layer.quantiles = self._prune_parameter_and_grad(layer.quantiles, kept, 0)
        if layer._quantized_cdf.numel():
            for name in ("_quantized_cdf", "_cdf_length", "_offset"):
                setattr(layer, name, getattr(layer, name)[kept].clone())
        layer.channels = len(kept)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        return layer.channels

    get_in_channels = get_out_channels


class Bottleneck(LayerKind):
    """An entropy bottleneck. Where its input is zero, its output is the channel's median: a removed
    latent needs a median of zero too.
    """

    flow = "coupled"
    codes = True
    inherited = True
    pruner = EntropyBottleneckPruner()

    def widths(self, layer: Any) -> tuple[int, int]:
        return layer.channels, layer.channels

    def exposed(self, layer: Any) -> list[Tensor]:
        # Straight-through quantisers read medians outside the bottleneck's call.
        return [layer.quantiles]

    def masked(self, axis: str) -> bool:
        return axis == "both"

    def is_product(self, layer: Any) -> bool:
        return False

    def parameter_terms(self, layer: Any) -> tuple[int, int]:
        return 0, sum(p.numel() for p in layer.parameters()) // int(layer.channels)

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        self.pruner(layer, list(removed), to_output=axis != "in")

    def zero(self, layer: Any, channels: Tensor) -> None:
        layer.quantiles[channels.to(layer.quantiles.device), :, 1] = 0.0

    def follow_shapes(self, layer: Any) -> None:
        layer.channels = layer.quantiles.shape[0]

    def on_output(self, factor: Tensor) -> Tensor:
        # Its input is masked already; what is left of a removed latent is its median.
        return zero_or_one(factor)

    def norms(self, layer: Any, axis: str) -> Tensor:
        # The shape of a distribution says nothing of its importance.
        return layer.quantiles.new_zeros(layer.channels)

    def reinitialise(self, layer: Any) -> None:
        fresh = type(layer)(layer.channels, init_scale=layer.init_scale, filters=layer.filters)
        for parameter, value in zip(layer.parameters(), fresh.parameters(), strict=True):
            parameter.copy_(value)


class Conditional(LayerKind):
    """A Gaussian conditional: scales and means come from outside, nothing of it belongs to a
    channel.
    """

    flow = "conditional"
    inherited = True

    @property
    def has_channels(self) -> bool:
        return False


class Bounded(LayerKind):
    """CompressAI's lower bound: zero does not stay zero."""

    flow = "bounded"

    @property
    def has_channels(self) -> bool:
        return False


KINDS[EntropyBottleneck] = KINDS[EntropyBottleneckVbr] = Bottleneck()
KINDS[GaussianConditional] = Conditional()
KINDS[LowerBound] = Bounded()


def is_bottleneck(module: nn.Module) -> bool:
    """Return whether the module is an entropy bottleneck: a learned distribution per channel."""
    kind = kind_of(module)
    return kind is not None and kind.codes


def entropy_models(codec: nn.Module) -> list[nn.Module]:
    """Return all entropy models of a codec."""
    return [m for m in codec.modules() if isinstance(m, (EntropyModel, EntropyModelVbr))]


def is_quantile(parameter_name: str) -> bool:
    """Return whether a parameter is one of those that learn from the auxiliary loss alone."""
    return parameter_name.endswith(QUANTILES)
