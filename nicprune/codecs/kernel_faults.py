"""Workarounds for faults of torch's CPU kernels.

oneDNN, in torch 2.14.1 on CPU: the backward pass of a 1x1 convolution with a stride and fewer input
channels than a vector register holds writes outside its memory when the input is channels_last
(segmentation faults, aborts, or silent damage). The first skip of every cheng2020-like codec is
such a layer. Reproduction, exit code 139 in one thread:

    layer = torch.nn.Conv2d(3, 64, 1, stride=2).to(memory_format=torch.channels_last)
    image = torch.rand(1, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    for _ in range(25):
        layer(image).sum().backward()

1x1 layers with stride 2 or 4 fail with 2 to 7 input channels, from 16,384 pixels per batch. They do
not fail with 1 or with 8 to 100 input channels. Layers with stride 1 or larger kernels, grouped
convolutions and transposed convolutions do not fail.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

VECTOR = 16
"""Number of float32 values in the largest vector register of a CPU (AVX-512)."""


def _by_slicing(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Return what `torch.conv2d` returns for these arguments, by a convolution without stride on
    every n-th pixel; None where the backward pass of that is safe.
    """
    down, across = (stride, stride) if isinstance(stride, int) else (*stride, *stride)[:2]
    unpadded = padding == "valid" or not any([padding] if isinstance(padding, int) else padding)
    affected = (
        input.dim() == 4
        and input.device.type == "cpu"
        and tuple(weight.shape[2:]) == (1, 1)
        and max(down, across) > 1
        and unpadded
        and weight.shape[1] < VECTOR
    )
    if not affected:
        return None
    taken = input[..., ::down, ::across].contiguous(memory_format=torch.channels_last)
    return torch.conv2d(taken, weight, bias, groups=groups)


class StridedPointwiseBySlicing(TorchFunctionMode):
    """Compute each affected convolution inside the block by an equivalent one: without stride, on
    every n-th pixel. Whatever calls it: a layer, a class of one's own, a method.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        made = _by_slicing(*args, **named) if func is torch.conv2d else None
        return func(*args, **named) if made is None else made
