"""3x3 convolutions in float64 by Winograd's algorithm compute what torch computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressai.models import ScaleHyperprior
from helpers import make_telling

from nicprune.codecs import winograd
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.float64_coding import Coder
from nicprune.codecs.rans import recorded_symbols
from nicprune.codecs.winograd import Winograd


def operands(*size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (size, (64, size[1], 3, 3), (64,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("padding", [0, 1, (1, 0), (2, 3)])
@pytest.mark.parametrize("size", [(1, 48, 16, 16), (2, 33, 17, 23), (3, 64, 9, 40), (1, 64, 4, 99)])
def test_it_is_torchs_convolution(size: tuple[int, ...], padding: Any) -> None:
    x, weight, bias = operands(*size)
    for given in (x, x.to(memory_format=torch.channels_last)):
        for b in (bias, None):
            expected = torch.conv2d(given, weight, b, padding=padding)
            found = Winograd().convolve(given, weight, b, padding=padding)
            assert found is not None and found.shape == expected.shape
            assert (found - expected).abs().max() <= 1e-13 * expected.abs().max()


@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 2},
        {"stride": (1, 2)},
        {"dilation": 2},
        {"padding": "same"},
        {"groups": 2},
        {"weight": torch.ones(64, 64, 5, 5, dtype=torch.float64)},
        {"weight": torch.ones(8, 64, 3, 3, dtype=torch.float64)},
        {"weight": torch.ones(64, 63, 3, 3, dtype=torch.float64)},
        {"weight": torch.ones(64, 64, 3, 3)},
        {"input": torch.ones(1, 64, 8, 8, dtype=torch.float64)},
        {"input": torch.ones(1, 64, 1, 200, dtype=torch.float64)},
        {"input": torch.ones(64, 32, 32, dtype=torch.float64)},
    ],
    ids=str,
)
def test_any_other_is_left_to_torch(arguments: dict[str, Any]) -> None:
    x, weight, _ = operands(1, 64, 32, 32)
    assert Winograd().convolve(x, weight, padding=1) is not None
    assert Winograd().convolve(**({"input": x, "weight": weight, "padding": 0} | arguments)) is None


def test_a_weight_that_changes_is_transformed_anew() -> None:
    x, weight, _ = operands(1, 64, 32, 32)
    kept = Winograd()
    first = kept.convolve(x, weight)
    with torch.no_grad():
        weight.mul_(2)
    second = kept.convolve(x, weight)
    assert first is not None and second is not None and torch.allclose(second, 2 * first)
    del weight
    assert not len(kept._kernels), "kernels live no longer than weights"


def test_a_weight_that_is_written_to_past_autograd_is_transformed_anew() -> None:
    """As a codec does that sets its weights for each image."""
    x, weight, _ = operands(1, 48, 16, 16)
    convolve = Winograd().convolve
    convolve(x, weight)
    weight.data.mul_(2)
    found = convolve(x, weight)
    assert found is not None and torch.allclose(found, torch.conv2d(x, weight), atol=1e-10)


def test_codecs_use_it_and_write_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec: Any = make_telling(ScaleHyperprior(48, 64))
    refresh_tables(codec.eval())
    x = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    shapes: list[Any] = []
    real = Winograd.convolve

    def counted(self: Winograd, *args: Any, **kwargs: Any) -> Any:
        out = real(self, *args, **kwargs)
        shapes.extend([] if out is None else [tuple(out.shape)])
        return out

    monkeypatch.setattr(Winograd, "convolve", counted)
    with recorded_symbols() as first:
        sent = Coder(copy_codec(codec)).compress(x)
    assert (1, 64, 16, 16) in shapes, "h_s ends with such a convolution"
    shapes.clear()
    monkeypatch.setattr(winograd, "SMALLEST_TILES", 1 << 30)
    with recorded_symbols() as second:
        again = Coder(copy_codec(codec)).compress(x)
    assert not shapes and again["strings"] == sent["strings"]
    assert first.digest(sent["strings"]) == second.digest(sent["strings"])
