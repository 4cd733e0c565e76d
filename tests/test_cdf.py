"""CDF tables: made anew where the entropy bottlenecks changed, and nowhere else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models.base import get_scale_table

from nicprune.cdf import note_tables, refresh_tables
from nicprune.checkpoint import load, load_codec, save
from nicprune.evaluation import evaluate
from nicprune.methods import attach


def marked(bottleneck: Any) -> None:
    """Tables that nobody would make: what is left of them shows."""
    bottleneck._offset -= 1000


def test_tables_of_methods_stand_like_those_of_the_codec() -> None:
    model = attach(load_codec("demo-hyperprior", 1), "slimmable", widths=[1.0, 0.5], round_to=8, latents="slim")
    refresh_tables(model)
    own: list[Any] = list(model.methods[0].bottlenecks.values())  # type: ignore[union-attr,operator]
    for bottleneck in (*own, model.codec.entropy_bottleneck):
        marked(bottleneck)
    refresh_tables(model)
    assert all(int(m._offset.max()) < -500 for m in (*own, model.codec.entropy_bottleneck))
    with torch.no_grad():
        own[0].quantiles[:, :, 1] += 1
    refresh_tables(model)
    assert int(own[0]._offset.max()) > -500 and int(model.codec.entropy_bottleneck._offset.max()) < -500, "each for itself"  # type: ignore[union-attr]


def test_files_bring_the_tables_of_methods(tmp_path: Path) -> None:
    model = attach(load_codec("demo-hyperprior", 1), "slimmable", widths=[1.0, 0.5], round_to=8, latents="slim")
    with torch.no_grad():
        for bottleneck in model.methods[0].bottlenecks.values():  # type: ignore[union-attr,operator]
            bottleneck.quantiles[:, :, 1] += 3
    again: Any = load(save(model, tmp_path / "a.safetensors"))
    tables = [m._offset.clone() for m in again.methods[0].bottlenecks.values()]
    fresh = copy.deepcopy(again)
    fresh.methods[0].update(force=True)
    assert all(torch.equal(a, m._offset) for a, m in zip(tables, fresh.methods[0].bottlenecks.values(), strict=True)), "saved with tables of what it is now"
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
    assert evaluate(again, "samples").mean("bpp") == pytest.approx(evaluate(codec, "samples").mean("bpp"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_has_tables(dtype: torch.dtype) -> None:
    codec: Any = load_codec("demo-hyperprior", 1)
    note_tables(codec)
    refresh_tables(codec.to(dtype))
