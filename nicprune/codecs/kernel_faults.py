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
from torch.overrides import TorchFunctionMode

VECTOR = 16
"""Number of float32 values in the largest vector register of a CPU (AVX-512)."""


NO_PADDING = (0, (0, 0), "valid")


def is_affected(layer: nn.Module) -> bool:
    """Return whether the backward pass of a layer may write outside its memory."""
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer)._conv_forward is nn.Conv2d._conv_forward
        and max(layer.kernel_size) == 1
        and max(layer.stride) > 1
        and layer.padding in NO_PADDING
        and layer.in_channels // layer.groups < VECTOR
    )


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
    every n-th pixel; None where that is another one.
    """
    if tuple(weight.shape[2:]) != (1, 1) or padding not in NO_PADDING:
        return None
    down, across = (stride, stride) if isinstance(stride, int) else stride
    taken = input[..., ::down, ::across].contiguous(memory_format=torch.channels_last)
    return torch.conv2d(taken, weight, bias, groups=groups)


class _Slicing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        made = _by_slicing(*args, **named) if func is torch.conv2d else None
        return func(*args, **named) if made is None else made


def _sliced(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return a layer's forward pass, whatever its class makes of it, with convolutions computed by
    slicing.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Slicing():
            return own(*args, **kwargs)

    return forward


@contextmanager
def strided_pointwise_by_slicing(codec: nn.Module) -> Iterator[None]:
    """Compute each affected layer of `codec` by an equivalent convolution inside the block: without
    stride, on every n-th pixel. What a class of one's own does before and after stays.
    """
    layers: list[Any] = [layer for layer in codec.modules() if is_affected(layer)]
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = _sliced(layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if own is not None:
                layer.forward = own
