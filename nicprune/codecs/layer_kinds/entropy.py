"""Entropy models: bottlenecks with a distribution for each channel, Gaussian conditionals, and the
lower bounds beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
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
from nicprune.codecs.layer_kinds.layout import Layout

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

    def grown(self, layer: Any, inputs: int, outputs: int) -> nn.Module | None:
        if type(layer) is not EntropyBottleneck:
            return None
        made = EntropyBottleneck(outputs, init_scale=layer.init_scale, filters=layer.filters)
        return made.to(layer.quantiles.device, layer.quantiles.dtype)

    def beside(self, layer: Any, new: Any, layout: Layout) -> Any:
        return JoinedBottleneck(layer, new, layout)

    def reinitialise(self, layer: Any) -> None:
        fresh = type(layer)(layer.channels, init_scale=layer.init_scale, filters=layer.filters)
        for parameter, value in zip(layer.parameters(), fresh.parameters(), strict=True):
            parameter.copy_(value)


class JoinedBottleneck:
    """Two entropy bottlenecks in place of one: each models its own channels, and one bitstream
    holds the symbols of both.
    """

    def __init__(self, old: Any, new: Any, layout: Layout):
        self.old, self.new, self.layout = old, new, layout

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return latents with noise, or rounded, and their likelihoods, (B, C, H, W) each."""
        parts = self.layout.old(x), self.layout.new(x)
        first, second = self.old(parts[0], *args, **kwargs), self.new(parts[1], *args, **kwargs)
        return (
            self.layout.join(first[0], second[0]),
            self.layout.join(first[1], second[1]),
        )

    def _get_medians(self) -> Tensor:
        """Return the medians, which codecs read outside the bottleneck's call."""
        return self.layout.join(self.old._get_medians(), self.new._get_medians(), 0)

    def compress(self, x: Tensor) -> list[bytes]:
        """Return one string for each image."""
        found: list[bytes] = self._one().compress(x)
        return found

    def decompress(self, strings: list[bytes], size: Any) -> Tensor:
        """Return what `compress` wrote, (B, C, H, W), `size` being (H, W)."""
        found: Tensor = self._one().decompress(strings, size)
        return found

    def _one(self) -> Any:
        """Return an entropy bottleneck with the CDF tables and medians of both."""
        one = copy.copy(self.new)
        old, new = self.old._quantized_cdf, self.new._quantized_cdf
        longest = max(old.shape[1], new.shape[1])
        old, new = (F.pad(table, (0, longest - table.shape[1])) for table in (old, new))
        own = one.__dict__
        own["_quantized_cdf"] = self.layout.join(old, new, 0)
        for name in ("_cdf_length", "_offset", QUANTILES):
            own[name] = self.layout.join(getattr(self.old, name), getattr(self.new, name), 0)
        own["channels"] = self.layout.width
        return one


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


def quantile_gaps(bottleneck: Any) -> Tensor:
    """Return the distances of an entropy bottleneck's quantiles, which its CDF tables span, for
    each channel: (C, 2).
    """
    gaps: Tensor = bottleneck.quantiles.detach()[:, 0].diff(dim=1).abs()
    return gaps


def learns_density(layer: nn.Module) -> bool:
    """Return whether a layer learns a density of its own for each channel."""
    return isinstance(layer, EntropyBottleneck)


def is_quantile(parameter_name: str) -> bool:
    """Return whether a parameter is one of those that learn from the auxiliary loss alone."""
    return parameter_name.endswith(QUANTILES)
