"""The bias of transposed convolutions learns by a sum: the same gradients, less asked of torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import ScaleHyperprior
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nicprune.codecs.transposed_bias import BiasBySum
from nicprune.data.images import write_png
from nicprune.training.loop import fit

LAYERS = [
    nn.ConvTranspose2d(3, 4, 5, stride=2, padding=2, output_padding=1),
    nn.ConvTranspose2d(4, 6, 3, stride=(1, 2), padding=(1, 0), groups=2),
    nn.ConvTranspose2d(2, 3, 3, dilation=2),
    nn.ConvTranspose2d(2, 3, 3, bias=False),
    nn.Conv2d(2, 3, 3),
]


class Asked(TorchDispatchMode):
    """Keeps what backward passes of convolutions are asked for: input, weight, bias."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and args[7]:
            self.transposed.append(list(args[10]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_first_and_second_gradients_are_right(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer).double()
    channels: Any = layer.in_channels
    x = torch.rand(2, channels, 5, 6, dtype=torch.float64).requires_grad_()
    parameters = list(layer.parameters())

    def computed(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(dict(layer.named_parameters()), values, strict=True))
        with BiasBySum():
            out: Tensor = torch.func.functional_call(layer, named, (x,))
        return out

    assert torch.equal(computed(x, *parameters), layer(x))
    assert torch.autograd.gradcheck(computed, (x, *parameters))
    assert torch.autograd.gradgradcheck(computed, (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_is_asked_for_no_gradient_of_the_bias(dtype: torch.dtype) -> None:
    layer = copy.deepcopy(LAYERS[0]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    found = []
    for mode in (torch.enable_grad(), BiasBySum()):
        layer.zero_grad()
        with Asked() as asked:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32), mode:
                out = layer(x)
            assert out.dtype == dtype
            out.float().square().sum().backward()
        found.append(([p.grad.clone() for p in layer.parameters()], out, asked.transposed))
    (plain, expected, whole), (summed, out, less) = found
    assert torch.equal(out, expected) and torch.equal(summed[0], plain[0])
    assert torch.allclose(summed[1], plain[1], rtol=1e-5 if dtype == torch.float32 else 2e-2)
    assert [mask[1:] for mask in whole] == [[True, True]]
    assert [mask[1:] for mask in less] == [[True, False]]


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
def test_what_is_frozen_gets_no_gradient(weight: bool, bias: bool) -> None:
    layer: Any = copy.deepcopy(LAYERS[0])
    layer.weight.requires_grad_(weight)
    layer.bias.requires_grad_(bias)
    x = torch.rand(1, 3, 8, 8).requires_grad_()
    with BiasBySum():
        layer(x).sum().backward()
    assert (layer.weight.grad is None, layer.bias.grad is None) == (not weight, not bias)
    assert x.grad is not None


def test_pictures_without_a_batch_are_computed_as_before() -> None:
    with BiasBySum():
        assert torch.equal(LAYERS[0](torch.ones(3, 8, 8)), LAYERS[0](torch.ones(1, 3, 8, 8))[0])


def test_training_asks_for_less(tmp_path: Path) -> None:
    write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    with Asked() as asked:
        fit(
            ScaleHyperprior(8, 8),
            str(tmp_path),
            steps=1,
            batch_size=1,
            patch_size=64,
            progress=False,
            lmbda=0.01,
        )
    assert len(asked.transposed) == 6 and not any(mask[2] for mask in asked.transposed)
