"""Rewritten layers compute what the original computes, for every kernel, stride and padding."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from nicprune.codecs.layer_kinds.rewrites import pointwise, shuffled, unshuffled


def difference(layer: nn.Module, rewritten: nn.Module, size: tuple[int, int]) -> float:
    x = torch.randn(2, layer.in_channels, *size, dtype=torch.float64)  # type: ignore[arg-type]
    with torch.no_grad():
        first, second = layer(x), rewritten(x)
    assert first.shape == second.shape
    return float((first - second).abs().max())


TRANSPOSED = [
    (kernel, stride, padding, stride - kernel + 2 * padding)
    for kernel, stride, padding in product(range(2, 8), (2, 3, 4), range(4))
    if 0 <= stride - kernel + 2 * padding < stride and padding < kernel
]
STRIDED = [
    (kernel, stride, padding)
    for kernel, stride, padding in product(range(1, 8), (2, 3, 4), range(4))
    if 1 <= kernel - 2 * padding <= stride
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", TRANSPOSED, ids=str)
def test_a_transposed_convolution(settings: tuple[int, int, int, int], bias: bool) -> None:
    kernel, stride, padding, extra = settings
    layer = nn.ConvTranspose2d(3, 5, kernel, stride, padding, extra, bias=bias).double()
    rewritten = shuffled(layer)
    assert rewritten is not None
    assert difference(layer, rewritten, (4, 6)) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", STRIDED, ids=str)
def test_a_strided_convolution(settings: tuple[int, int, int], bias: bool) -> None:
    kernel, stride, padding = settings
    layer = nn.Conv2d(3, 5, kernel, stride, padding, bias=bias).double()
    rewritten = unshuffled(layer)
    assert rewritten is not None
    assert difference(layer, rewritten, (12, 24)) < 1e-12
    assert difference(layer, rewritten, (13, 15)) < 1e-12  # sizes that the stride does not divide


@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_convolution(bias: bool) -> None:
    layer = nn.Conv2d(3, 5, 1, bias=bias).double()
    rewritten = pointwise(layer)
    assert rewritten is not None
    assert difference(layer, rewritten, (5, 7)) < 1e-12


OTHERS = {
    "groups": nn.Conv2d(4, 4, 3, 2, 1, groups=2),
    "dilation": nn.Conv2d(4, 4, 3, 2, 1, dilation=2),
    "reflect": nn.Conv2d(4, 4, 3, 2, 1, padding_mode="reflect"),
    "same": nn.Conv2d(4, 4, 1, padding="same"),
    "unequal strides": nn.Conv2d(4, 4, 3, (2, 1), 1),
    "more outputs": nn.Conv2d(4, 4, 3, 2, 3),
    "fewer outputs": nn.Conv2d(4, 4, 5, 2, 0),
    "a wider output": nn.ConvTranspose2d(4, 4, 4, 2, 0),
    "transposed without stride": nn.ConvTranspose2d(4, 4, 3, 1, 1),
    "transposed with groups": nn.ConvTranspose2d(4, 4, 5, 2, 2, 1, groups=2),
    "a subclass": type("Own", (nn.Conv2d,), {"forward": lambda self, x: x})(4, 4, 1),
    "an activation": nn.ReLU(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_stay(name: str) -> None:
    assert all(rewrite(OTHERS[name]) is None for rewrite in (pointwise, shuffled, unshuffled))


def test_a_layer_with_hooks_stays() -> None:
    layer = nn.ConvTranspose2d(4, 4, 5, 2, 2, 1)
    layer.register_forward_hook(lambda module, args, out: out * 2)
    assert shuffled(layer) is None
