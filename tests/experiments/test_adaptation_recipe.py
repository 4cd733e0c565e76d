"""Recipes that adapt a codec to another domain, and what their reports say of both domains."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import offer_tiny_codecs
from torch import nn

from nicprune.common.errors import DataError, FileError, RecipeError
from nicprune.data.images import write_png
from nicprune.experiments.plan import plan_runs, training_images
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.recipe_paths import check_paths
from nicprune.experiments.run import run_recipe
from nicprune.report.markdown import markdown
from nicprune.report.record_files import read


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A tiny recipe with images of two domains."""
    for folder, size in (("target", 12), ("source", 5)):
        for i in range(2):
            small = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(i + size))
            write_png(
                nn.functional.interpolate(small, size=(80, 96), mode="bicubic")[0],
                tmp_path / folder / f"{i}.png",
            )
    offer_tiny_codecs(monkeypatch)
    target, source = str(tmp_path / "target"), str(tmp_path / "source")
    adaptation = {"name": "adaptation", "domain": "screen"}
    return {
        "version": 1,
        "name": "tiny",
        "codec": "tiny_codecs:make",
        "qualities": [1],
        "photographs": {
            "train": target,
            "test": target,
            "source": source,
            "replay": source,
            "overlap": True,
        },
        "training": {"batch_size": 2, "patch_size": 64, "precision": "32", "log_every": 1},
        "sparsify": {"steps": 4, "lr": 1e-3},
        "methods": [
            {**adaptation, "label": "low rank", "form": "low_rank", "training": {"lr": 3e-3}},
            {**adaptation, "label": "decoder", "form": "finetune_decoder", "replay": 0.5},
            {**adaptation, "label": "one image", "form": "finetune_all", "images": 1},
        ],
    }


@pytest.mark.usefixtures("undrawn")
def test_a_report_says_what_a_codec_gains_and_forgets(
    content: dict[str, Any], tmp_path: Path
) -> None:
    page = run_recipe(
        parse_recipe(content, "test"),
        reports=tmp_path / "reports",
        runs=tmp_path / "runs",
        say=lambda line: None,
        progress=False,
    )
    folder = page.parent
    rows = {
        row["label"]: row
        for row in csv.DictReader((folder / "table.csv").read_text("utf-8").splitlines())
    }
    original, low = rows["original"], rows["low rank"]
    assert low["source_bpp"] == original["source_bpp"] != original["bpp"]
    assert low["source_psnr_db"] == original["source_psnr_db"]
    assert {label: row["old_files"] for label, row in rows.items()} == {
        "original": "bit-exact",
        "low rank": "bit-exact",
        "control": "refused",
        "decoder": "refused",
        "one image": "refused",
    }
    forgets = {label: float(row["forgetting_pct"]) for label, row in rows.items()}
    assert forgets["low rank"] == forgets["original"] == 0
    assert all(forgets[label] != 0 for label in ("control", "decoder", "one image"))
    assert float(rows["one image"]["train_images"]) == 1 and low["train_images"] == ""
    # Trained alike but for the images.
    assert rows["control"]["bpp_estimated"] != rows["one image"]["bpp_estimated"]
    assert math.isfinite(float(low["cost_change_pct"]))
    records = read(folder / "records.json")
    text = markdown(records)
    assert "**Two domains**" in text and "Forgetting" in text
    line = next(line for line in text.splitlines() if "low rank" in line and "bit-exact" in line)
    assert "+0.00 %" in line and "1.00×" in line
    assert "Two domains" in page.read_text("utf-8")
    made = json.loads((folder / "records.json").read_text("utf-8"))
    own = next(r for r in made if r["label"] == "low rank")
    assert own["cost"]["params"] > own["original_cost"]["params"]
    assert [image["name"] for image in own["source"]["images"]] == ["0.png", "1.png"]
    assert own["source"]["test"] == "source", "the name of the folder, not its path"


def test_images_of_both_domains_are_looked_for(content: dict[str, Any], tmp_path: Path) -> None:
    content["photographs"]["source"] = str(tmp_path / "none")
    with pytest.raises((DataError, FileError), match="photographs.source"):
        check_paths(parse_recipe(content, "test"))
    del content["photographs"]["replay"]
    with pytest.raises(RecipeError, match=r"replay takes images of the source domain"):
        parse_recipe(content, "test")


def test_what_an_arm_is_trained_on_is_part_of_its_key(
    content: dict[str, Any], tmp_path: Path
) -> None:
    def keys(changed: dict[str, Any]) -> dict[str, str]:
        runs = plan_runs(parse_recipe(changed, "test"), tmp_path)
        return {run.arm.label: run.key for run in runs}

    before = keys(content)
    recipe = parse_recipe(content, "test")
    job = next(j for j in plan_runs(recipe, tmp_path) if j.arm.label == "one image")
    assert training_images(recipe, job) == [str(tmp_path / "target" / "0.png")]
    content["methods"][2]["images"] = 2
    after = keys(content)
    assert [label for label in before if before[label] != after[label]] == ["one image"]
    content["photographs"]["replay"] = str(tmp_path / "target")
    assert [k for k, key in keys(content).items() if after[k] != key] == ["decoder"]
    content["photographs"]["source"] = str(tmp_path / "target")
    assert set(keys(content).values()).isdisjoint(after.values())
