"""Context models that predict the latents of a position from those before it: a masked convolution,
then pointwise layers (Minnen et al., NeurIPS 2018).

Recognised in the form that CompressAI's codecs have, pruned or not, so that `context_coding` can
compute them position by position without calling layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compressai.entropy_models import GaussianConditional
from compressai.layers import MaskedConv2d
from compressai.ops import LowerBound
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.rewrites import plain

DECIDES = ("build_indexes", "quantize", "dequantize", "compress", "decompress")
"""Methods of a Gaussian conditional that an object may have of its own."""


@dataclass(frozen=True)
class PixelContext:
    """Arithmetic of a context model at each position.

    Attributes:
        reach: p, of a convolution of (2 p + 1) x (2 p + 1).
        context: its weight with the mask, shape (O, C, 2 p + 1, 2 p + 1), and bias, shape (O,).
        layers: weight, shape (outputs, inputs), and bias of each pointwise layer. The first reads
            parameters of the hyperprior, then the O outputs of the convolution; the last one gives
            C scales, then C means.
        slopes: of the leaky ReLU before each pointwise layer but the first.
        bound: smaller scales count as this.
        scale_table: scales of the CDF tables.
    """

    reach: int
    context: tuple[Tensor, Tensor]
    layers: list[tuple[Tensor, Tensor]]
    slopes: list[float]
    bound: float
    scale_table: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All weights and biases, and the scale table."""
        return [*self.context, *(t for layer in self.layers for t in layer), self.scale_table]


def pixel_context(convolution: Any, pointwise: Any, conditional: Any) -> PixelContext | None:
    """Return what three modules of a codec compute at a position; None where they have another
    form, or hooks.

    Args:
        convolution: `context_prediction`.
        pointwise: `entropy_parameters`.
        conditional: `gaussian_conditional`.
    """
    context = _masked(convolution)
    stack = _stack(pointwise)
    if context is None or stack is None or not _usual(conditional):
        return None
    (weight, _), (layers, slopes) = context, stack
    outputs, channels = weight.shape[:2]
    if layers[0][0].shape[1] < outputs or layers[-1][0].shape[0] != 2 * channels:
        return None
    bound, table = conditional.lower_bound_scale.bound, conditional.scale_table
    if table.dim() != 1 or len(table) < 2 or not bool(table.diff().ge(0).all()):
        return None
    return PixelContext(weight.shape[-1] // 2, context, layers, slopes, float(bound), table)


def _masked(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Return weight and bias of a masked convolution that sees what comes before a position."""
    if not isinstance(layer, MaskedConv2d) or not plain(layer, MaskedConv2d):
        return None
    weight = layer.weight * layer.mask
    side = weight.shape[-1]
    middle = side // 2
    if weight.shape[-2] != side or side % 2 == 0 or layer.stride != (1, 1):
        return None
    if weight[..., middle, middle:].any() or weight[..., middle + 1 :, :].any():
        return None  # its decoder would have to know what it decodes
    return weight, _bias(layer, weight)


def _stack(pointwise: Any) -> tuple[list[tuple[Tensor, Tensor]], list[float]] | None:
    """Return the layers of 1x1 convolutions with leaky ReLUs between them."""
    if type(pointwise) is not nn.Sequential or _has_own_call(pointwise):
        return None
    layers: list[tuple[Tensor, Tensor]] = []
    slopes: list[float] = []
    for place, layer in enumerate(pointwise):
        if place % 2:
            if not isinstance(layer, (nn.LeakyReLU, nn.ReLU)) or _has_own_call(layer):
                return None
            if type(layer) not in (nn.LeakyReLU, nn.ReLU):
                return None
            slopes.append(float(getattr(layer, "negative_slope", 0.0)))
            continue
        if not isinstance(layer, nn.Conv2d) or not plain(layer, nn.Conv2d) or _has_own_call(layer):
            return None
        if layer.stride != (1, 1) or layer.padding != (0, 0) or layer.weight.shape[2:] != (1, 1):
            return None
        weight = layer.weight[:, :, 0, 0]
        if layers and layers[-1][0].shape[0] != weight.shape[1]:
            return None
        layers.append((weight, _bias(layer, weight)))
    return (layers, slopes) if len(layers) == len(slopes) + 1 else None


def _bias(layer: Any, weight: Tensor) -> Tensor:
    bias: Tensor = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    return bias


def _has_own_call(module: nn.Module) -> bool:
    """Return whether a module does something else than its class, or more."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _usual(conditional: Any) -> bool:
    """Return whether a Gaussian conditional is CompressAI's, with a lower bound of its own."""
    return (
        type(conditional) is GaussianConditional
        and not set(DECIDES) & set(vars(conditional))
        and type(conditional.lower_bound_scale) is LowerBound
        and not _has_own_call(conditional.lower_bound_scale)
    )
