"""Transposed convolutions on a CPU whose bias learns by a sum over pixels.

torch computes the gradient of their bias along with that of the weight, by a loop that takes as
long as both other gradients in channels_last: half of the backward pass of a decoder's layers
(torch 2.14.1). The sum is the same gradient but for rounding; the forward pass and the other
gradients are the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair
from torch.overrides import TorchFunctionMode


class _BiasBySum(torch.autograd.Function):
    """`torch.conv_transpose2d` with another gradient of the bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, settings: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        made: Tensor = torch.ops.aten.convolution(x, weight, bias, *settings)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *ctx.settings, [*ctx.needs_input_grad[:2], False]
        )
        return of_x, of_weight, grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None


def _by_sum(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor | None:
    """Return what `torch.conv_transpose2d` returns for these arguments; None where its own gradient
    is as fast.
    """
    if bias is None or not bias.requires_grad or input.device.type != "cpu" or input.dim() != 4:
        return None
    tensors = [input, weight, bias]
    if torch.is_autocast_enabled("cpu"):
        tensors = [tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors]
    settings = (*map(_pair, (stride, padding, dilation)), True, _pair(output_padding), groups)
    made: Tensor = _BiasBySum.apply(*tensors, settings)
    return made


class BiasBySum(TorchFunctionMode):
    """Compute the gradient of the bias of transposed convolutions by a sum, of those whose forward
    pass is inside the block.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        made = _by_sum(*args, **named) if func is torch.conv_transpose2d else None
        return func(*args, **named) if made is None else made
