"""Exact rewrites of convolutions: other layers with the same function, that some processors run
faster.

A transposed convolution with stride s computes each of the s·s phases of its output by a small
convolution of its input; all phases together are one convolution without stride, followed by a
pixel shuffle (Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016,
arXiv 1609.07009). A convolution with stride s is, likewise, one without stride behind a pixel
unshuffle. A pointwise convolution is a matrix product. All run more multiply-adds than the original
or as many; which is faster depends on the processor and on the widths, so it is measured
(`nicprune.runtime.layer_forms`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ShuffledConvolution(nn.Sequential):
    """A transposed convolution as padding, a convolution without stride, and a pixel shuffle."""


class UnshuffledConvolution(nn.Module):
    """A strided convolution as a pixel unshuffle, padding, and a convolution without stride.

    Inputs whose height or width the stride does not divide go through the original layer.
    """

    def __init__(self, original: nn.Conv2d, rewritten: nn.Sequential):
        super().__init__()
        self.original, self.rewritten = original, rewritten

    def forward(self, x: Tensor) -> Tensor:
        stride = self.original.stride[0]
        if x.shape[-2] % stride or x.shape[-1] % stride:
            return self.original(x)
        return self.rewritten(x)


class PointwiseProduct(nn.Module):
    """A 1x1 convolution as a matrix product over channels_last memory."""

    def __init__(self, original: nn.Conv2d):
        super().__init__()
        self.weight = nn.Parameter(original.weight.detach()[:, :, 0, 0].clone())
        bias = original.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


def _same(values: tuple[int, ...]) -> int | None:
    """Return the one value of both axes, None if they differ."""
    return values[0] if len(set(values)) == 1 else None


def plain(layer: nn.Conv2d | nn.ConvTranspose2d, kind: type[nn.Module]) -> bool:
    """Return whether a layer is exactly of this class, without hooks, groups or dilation, padded
    with zeros.
    """
    return (
        type(layer) is kind
        and layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def _padded(layers: list[nn.Module], first: int, last: int) -> nn.Sequential:
    """Pad for a kernel that reaches from offset `first` to offset `last`."""
    before, after = -first, last
    if before == 0 == after:
        return nn.Sequential(*layers)
    return nn.Sequential(nn.ZeroPad2d((before, after, before, after)), *layers)


@torch.no_grad()
def shuffled(layer: nn.Module) -> nn.Module | None:
    """Return a transposed convolution as a convolution and a pixel shuffle; None where it has no
    such form.

    Output (s·i + r) gets input j by kernel position k if s·j - p + k = s·i + r, so that
    j - i = (r + p - k) / s.
    """
    if not isinstance(layer, nn.ConvTranspose2d) or not plain(layer, nn.ConvTranspose2d):
        return None
    kernel, stride, padding, extra = (
        _same(value)  # type: ignore[arg-type]
        for value in (layer.kernel_size, layer.stride, layer.padding, layer.output_padding)
    )
    if kernel is None or stride is None or padding is None or extra is None:
        return None
    if stride == 1 or kernel - 2 * padding + extra != stride:
        return None  # not an output of s·H x s·W
    taps = [
        (phase, position, (phase + padding - position) // stride)
        for phase in range(stride)
        for position in range(kernel)
        if (phase + padding - position) % stride == 0
    ]
    first = min(0, *(offset for _, _, offset in taps))
    last = max(0, *(offset for _, _, offset in taps))
    size = last - first + 1
    inputs, outputs = layer.in_channels, layer.out_channels
    weight = layer.weight.new_zeros(outputs, stride, stride, inputs, size, size)
    for phase_y, y, offset_y in taps:
        for phase_x, x, offset_x in taps:
            weight[:, phase_y, phase_x, :, offset_y - first, offset_x - first] = layer.weight[
                :, :, y, x
            ].T
    return ShuffledConvolution(
        *_with_weight(
            layer, weight.reshape(outputs * stride**2, inputs, size, size), stride**2, first, last
        ),
        nn.PixelShuffle(stride),
    )


@torch.no_grad()
def unshuffled(layer: nn.Module) -> nn.Module | None:
    """Return a strided convolution as a pixel unshuffle and a convolution; None where it has no
    such form.

    Kernel position k reads input s·i + k - p, phase (k - p) mod s of pixel i + floor((k - p) / s).
    """
    if not isinstance(layer, nn.Conv2d) or not plain(layer, nn.Conv2d):
        return None
    kernel, stride, padding = (
        _same(value)  # type: ignore[arg-type]
        for value in (layer.kernel_size, layer.stride, layer.padding)
    )
    if kernel is None or stride is None or padding is None or stride == 1:
        return None
    if kernel - 2 * padding > stride or kernel - 2 * padding < 1:
        return None  # fewer or more than H/s x W/s outputs
    taps = [(k, *divmod(k - padding, stride)) for k in range(kernel)]
    first = min(0, *(offset for _, offset, _ in taps))
    last = max(0, *(offset for _, offset, _ in taps))
    size = last - first + 1
    inputs, outputs = layer.in_channels, layer.out_channels
    weight = layer.weight.new_zeros(outputs, inputs, stride, stride, size, size)
    for y, offset_y, phase_y in taps:
        for x, offset_x, phase_x in taps:
            weight[:, :, phase_y, phase_x, offset_y - first, offset_x - first] = layer.weight[
                :, :, y, x
            ]
    convolution = _with_weight(
        layer, weight.reshape(outputs, inputs * stride**2, size, size), 1, first, last
    )
    return UnshuffledConvolution(layer, nn.Sequential(nn.PixelUnshuffle(stride), *convolution))


def _with_weight(
    layer: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor, repeats: int, first: int, last: int
) -> nn.Sequential:
    """Return a convolution with this weight, and with each bias of `layer` `repeats` times."""
    symmetric = -first == last
    convolution = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        weight.shape[-1],
        padding=last if symmetric else 0,
        bias=layer.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    convolution.weight.copy_(weight)
    if layer.bias is not None and convolution.bias is not None:
        convolution.bias.copy_(layer.bias.repeat_interleave(repeats))
    return nn.Sequential(convolution) if symmetric else _padded([convolution], first, last)


def pointwise(layer: nn.Module) -> nn.Module | None:
    """Return a 1x1 convolution as a matrix product; None for any other layer."""
    if not isinstance(layer, nn.Conv2d) or not plain(layer, nn.Conv2d):
        return None
    if layer.kernel_size != (1, 1) or layer.stride != (1, 1) or layer.padding != (0, 0):
        return None
    return PointwiseProduct(layer)
