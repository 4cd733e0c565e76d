"""Faults of CPU kernels are gone around, with the same result."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from helpers import METHOD_SETTINGS, QUICK_FIT, built, image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nicprune.codecs.anatomy import forward_for_analysis
from nicprune.codecs.kernel_faults import VECTOR, StridedPointwiseBySlicing
from nicprune.data.images import write_png
from nicprune.methods import METHODS, attach
from nicprune.pruning.masks import importance
from nicprune.training.loop import fit


class Convolutions(TorchDispatchMode):
    """Counts the convolutions whose backward pass is affected, and keeps the strides of all."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: list[list[int]] = []
        self.affected = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and not args[6]:
            weight, stride = args[1], list(args[3])
            self.strides.append(stride)
            small = tuple(weight.shape[2:]) == (1, 1) and weight.shape[1] < VECTOR
            self.affected += torch.is_grad_enabled() and small and max(stride) > 1
        return func(*args, **(kwargs or {}))


def test_the_first_skip_of_cheng2020_is_affected(architecture: str) -> None:
    codec = built(architecture)[0]
    with Convolutions() as plain:
        forward_for_analysis(codec, image(codec))
    with StridedPointwiseBySlicing(), Convolutions() as sliced:
        forward_for_analysis(codec, image(codec))
    assert plain.affected == architecture.startswith("cheng2020") and not sliced.affected


@pytest.mark.parametrize(("layer", "affected"), [
    (nn.Conv2d(3, 8, 1, stride=2), True),
    (nn.Conv2d(2, 8, 1, stride=(1, 4)), True),
    (nn.Conv2d(6, 8, 1, stride=2, groups=2), True),
    (nn.Conv2d(3, 8, 1, stride=2, padding="valid"), True),
    (nn.Conv2d(32, 8, 1, stride=2), False),
    (nn.Conv2d(3, 8, 1), False),
    (nn.Conv2d(3, 8, 1, stride=2, padding=1), False),
    (nn.Conv2d(3, 8, 3, stride=2, padding=1), False),
    (nn.ConvTranspose2d(3, 8, 1, stride=2), False),
], ids=str)  # fmt: skip
def test_layers_computed_by_slicing_are_the_same(layer: nn.Module, affected: bool) -> None:
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
    with StridedPointwiseBySlicing(), Convolutions() as asked:
        out = layer(mine)
    with Convolutions() as before:
        expected = other(plain)
    assert (asked.strides != before.strides) == affected
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


class Unnamed(nn.Module):
    """A convolution with a parameter that is no layer's."""

    def __init__(self, *_: int, **__: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(16, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.kernel, stride=[2], padding=[0])


@pytest.mark.parametrize("own", [Blurred, Standardised, Unnamed])
def test_a_class_of_ones_own_computes_what_it_did(own: type[nn.Conv2d]) -> None:
    layer, x = own(3, 16, 1, stride=2), torch.rand(1, 3, 64, 64)
    expected = layer(x)
    with StridedPointwiseBySlicing(), Convolutions() as asked:
        assert torch.allclose(layer(x), expected, atol=1e-6)
        assert torch.allclose(layer(x[0]), expected[0], atol=1e-6)
    assert asked.strides[0] == [1, 1]
    assert max(asked.strides[1]) == 2  # pictures without a batch are never channels_last


ON_CHENG2020 = [(name, METHOD_SETTINGS.get(name, {})) for name in sorted(METHODS)]
ON_CHENG2020 += [
    ("adaptation", {"form": "grow", "grow": 0.5, "round_to": 4}),
    ("adaptation", {"form": "grow", "grow": 0.5, "round_to": 4, "into_old": True}),
    ("adaptation", {"form": "decoder_adapter"}),
]


@pytest.mark.parametrize(("method", "settings"), ON_CHENG2020, ids=str)
def test_training_never_asks_for_an_affected_convolution(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    for frame in range(3):
        write_png(torch.rand(3, 64, 64), tmp_path / "clip" / f"{frame}.png")
    stack = [(method, settings)]
    if method == "distillation":
        stack.insert(0, ("mask_decay", METHOD_SETTINGS["mask_decay"]))
    attached = attach(built("cheng2020-anchor")[0], stack)
    with Convolutions() as asked, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that the method still needs
        given = {} if METHODS[method].rates_field else {"lmbda": 0.01}
        quick = {name: value for name, value in QUICK_FIT.items() if name != "lmbda"}
        folder = tmp_path if method == "temporal_entropy_model" else tmp_path / "clip"
        fit(attached, str(folder), steps=2, **quick, **given)
    assert asked.strides and not asked.affected


def test_importance_never_asks_for_an_affected_convolution() -> None:
    codec, groups = built("cheng2020-anchor")
    with Convolutions() as asked:
        importance(codec, groups, groups[:3], [image(codec)], 0.01, "mse")
    assert asked.strides and not asked.affected


EVERY = """
from helpers import ARCHITECTURES, built
from nicprune.training.loop import fit
for name in ARCHITECTURES:
    codec = built(name)[0]
    steps = 12 if name.startswith('cheng2020') else 2
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
