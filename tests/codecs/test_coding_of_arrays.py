"""Entropy models that code arrays: what CompressAI's lists give, and its own code where another
coder is in its place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressai.entropy_models import GaussianConditional, entropy_models, entropy_models_vbr
from compressai.models.base import get_scale_table
from helpers import built
from torch import Tensor

from nicprune.codecs import kernels
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.fast_coding import fast_indexes
from nicprune.common.errors import CodecError

needs_numba = pytest.mark.skipif(not kernels.COMPILED, reason="numba is not installed")


@pytest.fixture(params=[pytest.param(True, marks=needs_numba), False])
def without_lists(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without numba; CompressAI's own path to its coder is closed while coding."""
    monkeypatch.setattr(kernels, "COMPILED", request.param)


def close(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (entropy_models, entropy_models_vbr):
        for name in ("encode_with_indexes", "decode_with_indexes"):
            monkeypatch.setattr(module._EntropyCoder, name, None)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 6 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditional() -> Any:
    model = GaussianConditional(get_scale_table().tolist())
    model.update()
    return model


@pytest.mark.usefixtures("without_lists")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("means", ["none", "all", "channels"])
def test_gaussian_conditionals_code_the_same(
    means: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, y = conditional().to(dtype), drawn(2, 5, 4, 6).to(dtype)
    y = y.contiguous(memory_format=torch.channels_last)
    indexes = model.build_indexes(drawn(2, 5, 4, 6, seed=1).abs().to(dtype))
    indexes = indexes.contiguous(memory_format=torch.channels_last)
    mean = {"none": None, "all": drawn(*y.shape).to(dtype), "channels": None}[means]
    strings = model.compress(y, indexes, mean)
    if means == "channels":
        mean = drawn(2, 5, 1, 1).to(dtype)
    x = model.decompress(strings, indexes, torch.float64, mean)
    close(monkeypatch)
    with fast_indexes():
        assert model.compress(y, indexes, *([] if means != "all" else [mean])) == strings
        found = model.decompress(strings, indexes, torch.float64, means=mean)
    assert torch.equal(found, x) and found.dtype == x.dtype and len(set(strings[0])) > 20


@pytest.mark.usefixtures("without_lists")
@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "bmshj2018-hyperprior-vbr-eb"])
def test_bottlenecks_code_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec: Any = built(name)[0]
    refresh_tables(codec)
    model, z = codec.entropy_bottleneck, drawn(2, codec.N, 3, 2)
    steps = (torch.tensor(0.7),) if name.endswith("eb") else ()
    if steps:
        model.update_variable(force=True, qs=steps[0])
    strings = model.compress(z, *steps)
    x = model.decompress(strings, (3, 2), *steps)
    close(monkeypatch)
    with fast_indexes():
        assert model.compress(z, *steps) == strings
        assert torch.equal(model.decompress(strings, (3, 2), *steps), x)
    with pytest.raises(TypeError):
        model.compress(z, *steps)  # by lists again


class Coder:
    """Somebody's own."""

    name = "ans"
    calls = 0

    def encode_with_indexes(self, symbols: list[int], *args: Any) -> bytes:
        Coder.calls += 1
        return bytes(len(symbols))

    def decode_with_indexes(self, string: bytes, *args: Any) -> list[int]:
        Coder.calls += 1
        return [1] * len(string)


def test_another_coder_codes() -> None:
    model, y = conditional(), drawn(1, 2, 2, 2)
    indexes = model.build_indexes(y.abs())
    model.entropy_coder = Coder()
    with fast_indexes():
        assert model.compress(y, indexes) == [bytes(8)]
        assert torch.equal(model.decompress([bytes(8)], indexes), torch.ones(y.shape))
    assert Coder.calls == 2
    model = conditional()
    model.entropy_coder.name = "rangecoder"
    model.entropy_coder._encoder = model.entropy_coder._decoder = Coder()
    with fast_indexes():
        assert model.compress(y, indexes) == [bytes(8)]
    assert Coder.calls == 3


@pytest.mark.usefixtures("without_lists")
def test_what_compressai_refuses_is_refused_alike() -> None:
    model, y = conditional(), drawn(2, 2, 2, 2)
    indexes = model.build_indexes(y.abs())
    strings = model.compress(y, indexes)
    empty = GaussianConditional(get_scale_table().tolist())
    for work in (
        lambda: empty.compress(y, indexes),
        lambda: empty.decompress(strings, indexes),
        lambda: model.compress(y, indexes[:1]),
        lambda: model.compress(y[0, 0, 0], indexes[0, 0, 0]),
        lambda: model.decompress(strings[:1], indexes),
        lambda: model.decompress(strings[0], indexes),
        lambda: model.decompress(strings, indexes, means=y[:, :1]),
        lambda: model.decompress(strings, indexes, means=y[..., :1]),
    ):
        with pytest.raises(ValueError) as own:
            work()  # type: ignore[no-untyped-call]
        with fast_indexes(), pytest.raises(ValueError) as here:
            work()  # type: ignore[no-untyped-call]
        assert str(here.value) == str(own.value)


@pytest.mark.usefixtures("without_lists")
def test_tables_that_lack_a_row_are_refused() -> None:
    model, y = conditional(), drawn(1, 2, 2, 2)
    indexes = model.build_indexes(y.abs())
    strings = model.compress(y, indexes)
    for change in (lambda m: m._cdf_length.add_(9999), lambda m: m._offset.resize_(3)):
        model = conditional()
        change(model)
        with fast_indexes():
            for work in (
                lambda m=model: m.compress(y, indexes),
                lambda m=model: m.decompress(strings, indexes),
            ):
                with pytest.raises(CodecError, match="CDF tables of this codec are damaged"):
                    work()
