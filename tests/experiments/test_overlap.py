"""Test images that are training images too are refused, whatever they are called."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cli import fails

from nicprune.common.errors import RecipeError
from nicprune.data import images
from nicprune.data.images import write_png
from nicprune.experiments.plan import plan_runs
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.resolve import resolve


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe, of which five training images are among seven test images."""
    for number in range(6):
        write_png(torch.rand(3, 64, 64), tmp_path / "train" / f"{number}.png")
    for number in range(5):
        target = tmp_path / "test" / "inside" / f"other{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "train" / f"{number}.png", target)
    for number in range(2):
        write_png(torch.rand(3, 64, 64), tmp_path / "test" / f"{number}.png")
    return {
        "version": 1,
        "name": "own",
        "codec": "demo-hyperprior",
        "qualities": [1],
        "photographs": {"train": str(tmp_path / "train"), "test": str(tmp_path / "test")},
        "training": {"batch_size": 1, "patch_size": 64},
        "methods": [{"name": "magnitude", "budget": {"macs": 0.5}}],
    }


def refused(content: dict[str, Any], folder: Path, match: str) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        resolve(parse_recipe(content, "a"), folder / "runs")
    assert "\n" not in str(caught.value)


def test_copies_under_other_names_are_refused(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "read_image", None)  # nothing is decoded
    refused(
        content,
        tmp_path,
        r"photographs.test: 5 of 7 images seen in training: other0.png"
        r" \(photographs.train: 0.png\), other1.png .*, other2.png \(photographs.train: 2.png\),"
        r" ...; name others, or allow it by overlap: true",
    )


def test_a_recipe_may_allow_it_and_its_keys_stay(content: dict[str, Any], tmp_path: Path) -> None:
    without = parse_recipe(content, "a")
    content["photographs"]["overlap"] = True
    allowed = parse_recipe(content, "a")
    keys = [[run.key for run in plan_runs(recipe, tmp_path)] for recipe in (without, allowed)]
    assert keys[0] == keys[1] == [run.key for run in resolve(allowed, tmp_path / "runs")]
    assert "overlap" not in without.model_dump()["photographs"]  # recipes' digests stay


def test_images_of_the_other_domain_count_where_they_are_used(
    content: dict[str, Any], tmp_path: Path
) -> None:
    one = str(tmp_path / "train" / "5.png")
    train = str(tmp_path / "train" / "0.png")
    test = str(tmp_path / "test" / "1.png")
    content["photographs"] = {"train": train, "test": test, "replay": one, "source": one}
    content["sparsify"] = {"steps": 1}
    method = {"name": "adaptation", "domain": "screen", "form": "finetune_decoder"}
    content["methods"] = [method]
    assert resolve(parse_recipe(content, "a"), tmp_path / "runs")  # nothing replays
    content["methods"] = [method | {"replay": 0.5}]
    refused(content, tmp_path, r"photographs.source: 1 of 1 image .*5.png \(photographs.replay: 5")
    content["methods"] = [method]
    content["photographs"]["source"] = train
    refused(content, tmp_path, r"photographs.source: 1 of 1 image .*0.png \(photographs.train: 0")


def test_the_command_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_png(torch.rand(3, 256, 256), tmp_path / "a.png")
    settings = [f"photographs.{split}={tmp_path / 'a.png'}" for split in ("train", "test")]
    options = [word for one in settings for word in ("--set", one)]
    error = fails(monkeypatch, capsys, "check", "quickstart", *options)
    assert "1 of 1 image seen in training: a.png" in error and error.count("\n") == 1
