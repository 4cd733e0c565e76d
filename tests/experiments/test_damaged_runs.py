"""Runs whose folders hold damaged files: what is damaged is never used, and never a dead end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import offer_tiny_codecs

from nicprune.common.errors import FileError
from nicprune.data.images import write_png
from nicprune.experiments import run as running
from nicprune.experiments.plan import Run
from nicprune.experiments.recipe import Recipe
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.resolve import finished, resolve
from nicprune.experiments.run import run_recipe


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and what a recipe has left."""
    folder = tmp_path_factory.mktemp("done")
    write_png(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), folder / "a.png")
    with pytest.MonkeyPatch.context() as patch:
        offer_tiny_codecs(patch)
        go(recipe_of(folder), folder)
    return folder


@pytest.fixture
def folder(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
    """A copy of it."""
    offer_tiny_codecs(monkeypatch)
    shutil.copytree(done / "runs", tmp_path / "runs")
    return tmp_path


def recipe_of(images: Path, **changes: Any) -> Recipe:
    content = {
        "version": 1,
        "name": "tiny",
        "codec": "tiny_codecs:make",
        "qualities": [1],
        "lambdas": {1: 0.01},
        "photographs": {
            "train": str(images / "a.png"),
            "test": str(images / "a.png"),
            "overlap": True,
        },
        "control": False,
        "training": {"batch_size": 1, "patch_size": 64, "precision": "32"},
        "sparsify": {"steps": 2},
        "finetune": {"steps": 2},
        "methods": [{"name": "mask_decay", "budget": {"macs": 0.5}, "round_to": 1}],
    }
    return parse_recipe(content | changes, "recipe.yaml")


def go(recipe: Recipe, folder: Path) -> None:
    run_recipe(
        recipe,
        runs=folder / "runs",
        reports=folder / "reports",
        say=lambda line: None,
        progress=False,
    )


def pruned(recipe: Recipe, folder: Path) -> Run:
    return next(job for job in resolve(recipe, folder / "runs") if job.role == "pruned")


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)


def test_a_damaged_codec_is_not_copied_into_a_report(done: Path, folder: Path) -> None:
    recipe = recipe_of(done)
    job = pruned(recipe, folder)
    damage(job.folder / "codec.safetensors")
    told = "codec.safetensors is damaged.*; the report is without it. To train it again, remove"
    with pytest.warns(UserWarning, match=told):
        go(recipe, folder)
    assert not list((folder / "reports").rglob("*.safetensors"))
    records = json.loads((folder / "reports" / "tiny" / "records.json").read_text())
    assert [record["file"] for record in records if record["role"] == "pruned"] == [None]
    whole = (pruned(recipe, done).folder / "codec.safetensors").read_bytes()
    shutil.rmtree(job.folder)  # as it says
    go(recipe, folder)
    assert (job.folder / "codec.safetensors").read_bytes() == whole


@pytest.mark.parametrize("also", ["hardened", "its checkpoint"])
def test_damaged_files_of_a_run_that_goes_on(
    also: str, done: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of a run that was not damaged."""
    recipe = recipe_of(done)
    job = pruned(recipe, folder)
    shutil.rmtree(job.folder)
    train = running._fit

    def stop(model: Any, recipe: Any, job: Any, name: str, progress: bool) -> None:
        if name == "finetune":
            raise KeyboardInterrupt
        train(model, recipe, job, name, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "_fit", stop)
        go(recipe, folder)
    damage(job.folder / "hardened.safetensors")
    if also == "its checkpoint":
        (job.folder / "sparsify" / "checkpoint.pt").unlink()
    with pytest.warns(UserWarning, match="hardened.safetensors is damaged.*; it is made again"):
        go(recipe, folder)
    again, whole = (
        (pruned(recipe, place).folder / "codec.safetensors").read_bytes()
        for place in (folder, done)
    )
    assert again == whole


@pytest.mark.parametrize(
    "change",
    [
        lambda record: "",
        lambda record: json.dumps(record)[:-40],
        lambda record: json.dumps([]),
        lambda record: json.dumps({"key": record["key"]}),
        lambda record: json.dumps(record | {"widths": 3}),
        lambda record: json.dumps(record | {"psnr_db": "x"}),
        lambda record: json.dumps([record, record | {"bpp": "x"}]),
        lambda record: json.dumps(record | {"key": "another"}),
    ],
)
def test_a_damaged_record_is_measured_again(change: Any, done: Path, folder: Path) -> None:
    job = pruned(recipe_of(done), folder)
    path = job.folder / "record.json"
    assert finished(job)
    path.write_text(change(json.loads(path.read_text())))
    assert not finished(job)


def test_a_codec_that_others_start_from_says_how_it_is_made_again(done: Path, folder: Path) -> None:
    arms = [
        {"name": "mask_decay", "budget": {"macs": 0.5}, "round_to": 1},
        {"scratch": "mask_decay", "label": "scratch"},
    ]
    recipe = recipe_of(done, methods=arms)
    job = pruned(recipe, folder)
    damage(job.folder / "codec.safetensors")
    with pytest.raises(FileError, match=r"is damaged: .* To train it again, remove .*mask_decay-"):
        go(recipe, folder)


def test_images_whose_names_are_not_utf8(done: Path, folder: Path) -> None:
    name = os.fsencode(folder) + b"/caf\xe9.png"
    shutil.copy(done / "a.png", name)
    recipe = recipe_of(
        done, photographs={"train": str(done / "a.png"), "test": os.fsdecode(name), "overlap": True}
    )
    go(recipe, folder)
    assert "caf\\udce9" in (folder / "reports" / "tiny" / "records.json").read_text("utf-8")
    go(recipe, folder)
