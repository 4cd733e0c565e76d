"""Faults of CPU kernels are gone around, with the same result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from helpers import built, image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nicprune.codecs.kernel_faults import is_affected, strided_pointwise_by_slicing
from nicprune.data.images import write_png


def test_the_first_skip_of_cheng2020_is_affected(architecture: str) -> None:
    names = [name for name, module in built(architecture)[0].named_modules() if is_affected(module)]
    assert names == (["g_a.0.skip"] if architecture.startswith("cheng2020") else [])


@pytest.mark.parametrize(("layer", "affected"), [
    (nn.Conv2d(3, 8, 1, stride=2), True),
    (nn.Conv2d(2, 8, 1, stride=(1, 4)), True),
    (nn.Conv2d(6, 8, 1, stride=2, groups=2), True),
    (nn.Conv2d(32, 8, 1, stride=2), False),
    (nn.Conv2d(3, 8, 1), False),
    (nn.Conv2d(3, 8, 3, stride=2, padding=1), False),
    (nn.ConvTranspose2d(3, 8, 1, stride=2), False),
], ids=str)  # fmt: skip
def test_layers_computed_by_slicing_are_the_same(layer: nn.Module, affected: bool) -> None:
    assert is_affected(layer) == affected
    layer = layer.double()
    other = copy.deepcopy(layer)
    pictures = torch.rand(
        2,
        layer.in_channels,
        11,
        14,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )  # type: ignore[call-overload]
    mine, plain = (pictures.clone().requires_grad_() for _ in range(2))
    with strided_pointwise_by_slicing(layer):
        assert ("forward" in vars(layer)) == affected
        out = layer(mine)
    expected = other(plain)
    weight = torch.linspace(0, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(out, expected, rtol=0, atol=1e-12) and torch.allclose(
        mine.grad, plain.grad, rtol=0, atol=1e-12
    )
    assert all(
        torch.allclose(a.grad, b.grad, rtol=0, atol=1e-12)
        for a, b in zip(layer.parameters(), other.parameters(), strict=True)
    )


class Blurred(nn.Conv2d):
    """A layer that looks at more pixels than it convolves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.avg_pool2d(x, 3, 1, 1)) + 1


class Standardised(nn.Conv2d):
    """A layer that calls the convolution by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean()
        return nn.functional.conv2d(x, weight, bias=self.bias, stride=self.stride)


class Padded(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, padding=1)


def asked_of_torch(layer: nn.Module, x: torch.Tensor) -> list[list[int]]:
    """Return the strides of the convolutions that are computed."""
    found = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.convolution.default:
                found.append(list(args[3]))
            return func(*args, **(kwargs or {}))

    with Seen():
        layer(x)
    return found


@pytest.mark.parametrize("own", [Blurred, Standardised, Padded])
def test_a_class_of_ones_own_computes_what_it_did(own: type[nn.Conv2d]) -> None:
    layer, x = own(3, 16, 1, stride=2), torch.rand(1, 3, 64, 64)
    expected = layer(x)
    with strided_pointwise_by_slicing(layer):
        assert is_affected(layer) and torch.allclose(layer(x), expected, atol=1e-6)
        strides = asked_of_torch(layer, x)
    assert strides == ([[2, 2]] if own is Padded else [[1, 1]])
    assert torch.equal(layer(x), expected)


def test_layers_are_as_before_whatever_happens() -> None:
    codec = built("cheng2020-anchor")[0]
    before = codec(image(codec))["x_hat"]
    with pytest.raises(RuntimeError, match="stop"), strided_pointwise_by_slicing(codec):
        assert "forward" in vars(codec.g_a[0].skip)
        raise RuntimeError("stop")
    assert "forward" not in vars(codec.g_a[0].skip)
    assert torch.equal(codec(image(codec))["x_hat"], before)


EVERY = """
from helpers import ARCHITECTURES, built
from nicprune.codecs.kernel_faults import is_affected
from nicprune.training.loop import fit
for name in ARCHITECTURES:
    codec = built(name)[0]
    steps = 12 if any(map(is_affected, codec.modules())) else 2
    fit(codec, {photos!r}, steps=steps, batch_size=1, patch_size=128, lmbda=0.01, progress=False)
    print(name, flush=True)
"""


def test_every_architecture_trains_at_128_pixels(tmp_path: Path) -> None:
    """In a process of its own, since the fault ends the process: every layer of every architecture,
    in channels_last.
    """
    write_png(
        torch.rand(3, 140, 160, generator=torch.Generator().manual_seed(0)), tmp_path / "a.png"
    )
    done = elsewhere.run(EVERY.format(photos=str(tmp_path)))
    assert done.returncode == 0, (
        f"ended with {done.returncode} after {done.stdout.split()}: {done.stderr[-1000:]}"
    )
