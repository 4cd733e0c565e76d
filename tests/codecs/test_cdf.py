"""CDF tables: made anew where the entropy bottlenecks changed, and nowhere else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.models import FactorizedPrior
from compressai.models.base import get_scale_table
from helpers import built, image

from nicprune.codecs import fast_coding
from nicprune.codecs.cdf import note_tables, refresh_tables
from nicprune.codecs.fast_coding import fast_indexes
from nicprune.common.errors import CodecError
from nicprune.evaluation.evaluate import evaluate
from nicprune.methods import attach
from nicprune.storage.checkpoint import load, save
from nicprune.storage.named import load_codec


def marked(bottleneck: Any) -> None:
    """Tables that nobody would make: what is left of them shows."""
    bottleneck._offset -= 1000


def test_tables_of_methods_stand_like_those_of_the_codec() -> None:
    model = attach(
        load_codec("demo-hyperprior", 1), "slimmable", widths=[1.0, 0.5], round_to=8, latents="slim"
    )
    refresh_tables(model)
    own: list[Any] = list(model.methods[0].bottlenecks.values())  # type: ignore[union-attr,operator]
    for bottleneck in (*own, model.codec.entropy_bottleneck):
        marked(bottleneck)
    refresh_tables(model)
    assert all(int(m._offset.max()) < -500 for m in (*own, model.codec.entropy_bottleneck))
    with torch.no_grad():
        own[0].quantiles[:, :, 1] += 1
    refresh_tables(model)
    assert (
        int(own[0]._offset.max()) > -500
        and int(model.codec.entropy_bottleneck._offset.max()) < -500
    ), "each for itself"  # type: ignore[union-attr]


def test_files_bring_the_tables_of_methods(tmp_path: Path) -> None:
    model = attach(
        load_codec("demo-hyperprior", 1), "slimmable", widths=[1.0, 0.5], round_to=8, latents="slim"
    )
    with torch.no_grad():
        for bottleneck in model.methods[0].bottlenecks.values():  # type: ignore[union-attr,operator]
            bottleneck.quantiles[:, :, 1] += 3
    again: Any = load(save(model, tmp_path / "a.safetensors"))
    tables = [m._offset.clone() for m in again.methods[0].bottlenecks.values()]
    fresh = copy.deepcopy(again)
    fresh.methods[0].update(force=True)
    assert all(
        torch.equal(a, m._offset)
        for a, m in zip(tables, fresh.methods[0].bottlenecks.values(), strict=True)
    ), "saved with tables of what it is now"
    for bottleneck in again.methods[0].bottlenecks.values():
        marked(bottleneck)
    third: Any = load(save(again, tmp_path / "b.safetensors"))
    assert all(int(m._offset.max()) < -500 for m in third.methods[0].bottlenecks.values())


def test_scales_that_were_chosen_stay(tmp_path: Path) -> None:
    codec: Any = load_codec("demo-hyperprior", 1)
    codec.update(scale_table=get_scale_table(levels=32), force=True)
    with torch.no_grad():
        codec.entropy_bottleneck.quantiles += 0.5
    again: Any = load(save(codec, tmp_path / "a.safetensors"))
    assert len(again.gaussian_conditional.scale_table) == 32
    assert evaluate(again, "samples").mean("bpp") == pytest.approx(
        evaluate(codec, "samples").mean("bpp")
    )


class Scalar(EntropyBottleneck):
    """A bottleneck with a parameter of no dimensions."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.extra = torch.nn.Parameter(torch.tensor(1.0))


def test_parameters_of_no_dimensions_do_no_harm() -> None:
    codec: Any = built("bmshj2018-factorized")[0]
    codec.entropy_bottleneck = Scalar(codec.M)
    refresh_tables(codec)
    before = codec.entropy_bottleneck._quantized_cdf
    refresh_tables(codec)
    assert codec.entropy_bottleneck._quantized_cdf is before
    with torch.no_grad():
        codec.entropy_bottleneck.extra.add_(1)
    refresh_tables(codec)
    assert codec.entropy_bottleneck._quantized_cdf is not before


class Plain(FactorizedPrior):
    def update(self, scale_table: Any = None) -> bool:  # type: ignore[override]
        return bool(super().update())


def test_an_update_without_force_is_named_in_one_line() -> None:
    with pytest.raises(CodecError, match="Plain: its update.. takes no force") as error:
        refresh_tables(Plain(8, 12).eval())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_has_tables(dtype: torch.dtype) -> None:
    codec: Any = load_codec("demo-hyperprior", 1)
    note_tables(codec)
    refresh_tables(codec.to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("bound", [0.11, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_indexes_by_bisection_are_those_by_comparison(dtype: torch.dtype, bound: float) -> None:
    conditional = GaussianConditional(get_scale_table().tolist(), scale_bound=bound).to(dtype)
    table = conditional.scale_table
    drawn = torch.exp(
        torch.empty(2, 3, 8, 5).uniform_(-4, 7, generator=torch.Generator().manual_seed(0))
    ).to(dtype)
    near = torch.cat(
        [table, torch.nextafter(table, torch.zeros_like(table)), torch.nextafter(table, table * 2)]
    )
    odd = torch.tensor([0.0, -1.0, 1e9, -1e9], dtype=dtype)
    for scales in (
        drawn,
        drawn.to(memory_format=torch.channels_last),
        near,
        odd,
        drawn.to(torch.float32),
        drawn[:0],
    ):
        compared = conditional.build_indexes(scales)
        with fast_indexes():
            found = conditional.build_indexes(scales)
        assert torch.equal(compared, found) and compared.dtype == found.dtype
    indexes = conditional.build_indexes(drawn)
    assert len(indexes.unique()) > 30 and int(indexes.max()) == 63


def test_scales_of_another_type_than_the_table_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast_coding, "_COMPARED", lambda self, scales: "compared")
    conditional = GaussianConditional(get_scale_table().tolist())
    assert (
        fast_coding._bisected(conditional, torch.ones(3, dtype=torch.bfloat16))
        == "compared"
        != fast_coding._bisected(conditional, torch.ones(3))
    )


@torch.no_grad()
def test_streams_are_the_same_with_fast_indexes(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec: Any = built(architecture)[0]
    codec.update(force=True)
    x, own, calls, bisected = (
        image(codec, 2),
        GaussianConditional.build_indexes,
        [],
        fast_coding._bisected,
    )
    monkeypatch.setattr(
        fast_coding, "_bisected", lambda self, scales: calls.append(1) or bisected(self, scales)
    )
    sent = codec.compress(x)
    decoded = codec.decompress(sent["strings"], sent["shape"])["x_hat"]
    assert not calls
    with fast_indexes():
        with fast_indexes():
            again = codec.compress(x)
        before = len(calls)
        assert torch.equal(codec.decompress(again["strings"], again["shape"])["x_hat"], decoded)
        assert len(calls) > before > 0 or "factorized" in architecture, "the outer one goes on"
    assert sent["strings"] == again["strings"] and GaussianConditional.build_indexes is own


def test_an_own_way_to_the_indexes_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(self: Any, scales: Any) -> Any:
        return scales

    monkeypatch.setattr(GaussianConditional, "build_indexes", own)
    with fast_indexes():
        assert GaussianConditional.build_indexes is own
    with pytest.raises(KeyError), fast_indexes():
        raise KeyError
    assert GaussianConditional.build_indexes is own


def test_what_codes_here_codes_with_fast_indexes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation, files, times, and codecs with methods on them."""
    from nicprune.evaluation.evaluate import evaluate_image
    from nicprune.evaluation.stage_times import stage_times
    from nicprune.storage import container

    codec: Any = built("bmshj2018-hyperprior")[0]
    codec.update(force=True)
    masked = attach(
        built("bmshj2018-hyperprior")[0], "mask_decay", budget={"macs": 0.5}, round_to=1
    )
    masked.update(force=True)
    picture = (image(codec, 2)[0] * 255).byte()
    calls: list[int] = []
    monkeypatch.setattr(
        fast_coding,
        "_bisected",
        lambda self, scales: calls.append(1) or torch.zeros_like(scales, dtype=torch.int32),
    )
    data = container.encode(codec, picture)
    for code, times in (
        # A tile is encoded and decoded twice before, in float32 and as the image will be.
        (lambda: container.encode(codec, picture), 5),
        (lambda: container.decode(codec, data), 5),
        (lambda: evaluate_image(codec, picture, "a"), 2),
        (lambda: stage_times(codec, image(codec, 2)), 2),
        (lambda: masked.decompress(*masked.compress(image(codec, 2)).values()), 2),
    ):
        calls.clear()
        code()  # type: ignore[no-untyped-call]
        assert len(calls) == times
