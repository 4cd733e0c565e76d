"""Architectures of CompressAI at widths of one's own, behind their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.registry import MODELS
from helpers import image, same_state, state_of
from torch import nn

from nicprune.codecs.provenance import provenance
from nicprune.codecs.zoo import (
    DEMO,
    UNTRAINED,
    ZOO,
    codec_names,
    own_widths,
    qualities,
    width_arguments,
)
from nicprune.common.errors import CodecError, FileError, RecipeError
from nicprune.experiments.base_codec import load_base_codec
from nicprune.experiments.plan import plan_runs
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.recipe_paths import check_paths
from nicprune.methods import attach
from nicprune.storage.checkpoint import load, save
from nicprune.storage.named import load_codec

NAMES = [name for name in (*ZOO, *UNTRAINED) if not name.startswith("evc")]
SMALL = {"elic2022-official": "32-160", "elic2022-chandelier": "32-160"}
"""Widths of those whose latent has groups of a fixed width."""


def small(name: str) -> str:
    count = len(width_arguments(name))
    return f"{name}-{SMALL.get(name, '-'.join(('16', '24')[:count]))}"


def shapes(codec: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in codec.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_the_widths_are_those_of_the_name(name: str, tmp_path: Path) -> None:
    full = small(name)
    base, widths = own_widths(full)
    assert base == name and 1 <= len(widths) <= 2 and own_widths(name) == (name, ())
    codec = load_codec(full, 2, weights="none")
    meant = MODELS[name](*widths)
    assert type(codec) is type(meant)
    assert shapes(codec) == shapes(meant) != shapes(load_codec(name, 2, weights="none"))
    record = provenance(codec)
    assert (record.name, record.quality) == (full, 2) and not codec.training
    assert qualities(full) == qualities(name)
    again = load(save(codec, tmp_path / "a.safetensors"))
    assert provenance(again).name == full
    with torch.no_grad():
        x = image(codec)
        assert torch.equal(codec(x)["x_hat"], again(x)["x_hat"])
    other = load_codec(full, 2, weights=tmp_path / "a.safetensors")
    assert same_state(state_of(again), state_of(other))


def test_it_is_pruned_as_any_other() -> None:
    codec = load_codec("mbt2018-mean-16-24", 3, weights="none")
    attached = attach(codec, "magnitude", budget={"macs": 0.5}, round_to=1)
    less = attached.harden()
    assert attach(less, "none").cost.totals().macs <= attached.cost.original.macs / 2
    with torch.no_grad():
        x = image(codec)
        assert less(x)["x_hat"].shape == x.shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mbt2018-mean-64", "takes N and M, as in mbt2018-mean-64-96"),
        ("cheng2020-anchor-64-96", "takes N, as in cheng2020-anchor-64 "),
        ("mbt2018-mean-64-96-128", "takes N and M"),
        ("mbt2018-0-96", "widths lie between 1 and 16384"),
        ("mbt2018-99999-96", "widths lie between 1 and 16384"),
        ("mbt2018-mean-16000-16000", "more weights than any codec"),
        ("elic2022-official-64-96", "cannot have the widths .* not above their sum"),
        ("elic2022-chandelier-64-128", "cannot have the widths .* not above their sum"),
        ("evc-s-64", "evc-s takes no widths"),
        ("demo-hyperprior-64-96", "demo-hyperprior takes no widths"),
        ("mbt2018-mean-", "unknown codec"),
        ("mbt2018-mean-64-x", "unknown codec"),
        ("unheard-of-64-96", "unknown codec"),
    ],
)
def test_other_widths_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(CodecError, match=message) as caught:
        load_codec(name, 3, weights="none")
    assert "\n" not in str(caught.value)


def test_there_are_no_official_weights_of_them() -> None:
    with pytest.raises(CodecError, match="official weights of mbt2018-mean at the widths of its"):
        load_codec("mbt2018-mean-64-96", 3)


def test_no_name_says_widths_by_itself() -> None:
    assert all(own_widths(name) == (name, ()) for name in codec_names())


RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "small",
    "task": "train",
    "codec": "mbt2018-mean-64-96",
    "weights": "none",
    "transforms": DEMO,
    "qualities": [3],
    "photographs": {"train": "samples", "test": "samples"},
    "finetune": {"steps": 0},
}


def test_a_recipe_takes_the_transforms_of_the_embedded_codec(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE, "a")
    check_paths(recipe)
    (job,) = plan_runs(recipe, tmp_path)
    codec, demo = load_base_codec(recipe, job), load_codec(DEMO, 3)
    random = load_base_codec(recipe.model_copy(update={"transforms": None}), job)
    taken = 0
    for key, value in codec.named_parameters():
        source: nn.Module = demo if key.startswith(("g_a.", "g_s.")) else random
        assert torch.equal(value, source.get_parameter(key)), key
        taken += source is demo
    assert taken == sum(1 for key, _ in demo.named_parameters() if key[:3] in ("g_a", "g_s"))
    without = plan_runs(parse_recipe(RECIPE | {"transforms": None}, "a"), tmp_path)
    assert without[0].key != job.key


def test_transforms_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE | {"codec": "cheng2020-anchor-16"}, "a")
    with pytest.raises(FileError, match="does not fit") as caught:
        load_base_codec(recipe, plan_runs(recipe, tmp_path)[0])
    assert "\n" not in str(caught.value)
    with pytest.raises(CodecError, match="transforms: demo-hyperprior has no quality 5"):
        check_paths(parse_recipe(RECIPE | {"qualities": [5]}, "a"))
    with pytest.raises(RecipeError, match="takes N and M"):
        parse_recipe(RECIPE | {"codec": "mbt2018-mean-64"}, "a")
