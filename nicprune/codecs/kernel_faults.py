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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VECTOR = 16
"""Number of float32 values in the largest vector register of a CPU (AVX-512)."""


def is_affected(layer: nn.Module) -> bool:
    """Return whether the backward pass of a layer may write outside its memory."""
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer)._conv_forward is nn.Conv2d._conv_forward
        and max(layer.kernel_size) == 1
        and max(layer.stride) > 1
        and layer.padding in (0, (0, 0), "valid")
        and layer.in_channels // layer.groups < VECTOR
    )


def _sliced(layer: nn.Conv2d) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    down, across = layer.stride

    def convolve(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taken = image[..., ::down, ::across].contiguous(memory_format=torch.channels_last)
        return F.conv2d(taken, weight, bias, groups=layer.groups)

    return convolve


@contextmanager
def strided_pointwise_by_slicing(codec: nn.Module) -> Iterator[None]:
    """Replace each affected layer of `codec` by an equivalent convolution inside the block: without
    stride, on every n-th pixel. What a class of one's own does before and after stays.
    """
    changed: list[Any] = []
    try:
        layer: Any
        for layer in filter(is_affected, codec.modules()):
            layer._conv_forward = _sliced(layer)
            changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer._conv_forward
