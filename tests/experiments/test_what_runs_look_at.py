"""A run sees the images, lambdas, metric and widths that its recipe says, in training, in pruning
and in calibration, and its key is of these.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compressai.models import ScaleHyperprior
from helpers import offer_tiny_codecs
from helpers_cli import fails

from nicprune.codecs.provenance import provenance
from nicprune.common.errors import CodecError, RecipeError
from nicprune.data.images import list_images, write_png
from nicprune.experiments.base_codec import load_base_codec
from nicprune.experiments.plan import plan_runs
from nicprune.experiments.recipe_files import read_recipe
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.recipe_paths import check_paths
from nicprune.experiments.resolve import resolve
from nicprune.experiments.run import run_recipe
from nicprune.storage.checkpoint import save
from nicprune.storage.named import load_codec

QUICK = {"batch_size": 1, "patch_size": 64, "precision": "32"}


def pictures(folder: Path, *names: str) -> str:
    for name in names:
        write_png(torch.rand(3, 80, 80), folder / name)
    return str(folder)


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    offer_tiny_codecs(monkeypatch)
    train = pictures(tmp_path / "photos", *[f"{i}.png" for i in range(6)])
    test = pictures(tmp_path / "test", "a.png")
    return {
        "version": 1,
        "name": "tiny",
        "codec": "tiny_codecs:make",
        "qualities": [1],
        "lambdas": {1: 0.01},
        "photographs": {"train": train, "test": test, "crops": False},
        "training": QUICK,
        "finetune": {"steps": 1},
        "control": False,
        "methods": [{"name": "fisher", "budget": {"macs": 0.5}, "round_to": 1}],
    }


# -- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_runs_among_the_images_are_refused(
    split: str, content: dict[str, Any], tmp_path: Path
) -> None:
    """Crops of what was decoded would be images of the next run."""
    folder = Path(content["photographs"][split])
    recipe = parse_recipe(content, "a")
    for begin in (
        lambda: resolve(recipe, folder / "runs"),
        lambda: run_recipe(recipe, runs=folder / "runs", reports=tmp_path / "reports"),
    ):
        with pytest.raises(RecipeError, match=rf"runs would .* photographs\.{split}.*\(--runs\)"):
            begin()
    assert not (folder / "runs").exists() and resolve(recipe, tmp_path / "runs")


def test_runs_beside_the_images_that_are_listed_are_not_refused(
    content: dict[str, Any], tmp_path: Path
) -> None:
    """Of a folder for validation without a sub-folder of its own, the one named train is listed."""
    root = tmp_path / "all"
    pictures(root, "train/a.png", "test/b.png")
    content["photographs"]["validation"] = str(root)
    recipe = parse_recipe(content, "a")
    assert resolve(recipe, root / "runs")
    with pytest.raises(RecipeError, match=r"runs would .* photographs\.validation"):
        resolve(recipe, root / "train" / "runs")


def test_a_codec_file_may_be_named_by_a_variable(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(ScaleHyperprior(8, 12), tmp_path / "codecs" / "own.safetensors")
    monkeypatch.setenv("CODECS", str(tmp_path / "codecs"))
    recipe = parse_recipe(content | {"codec": "${CODECS}/own.safetensors"}, "a")
    check_paths(recipe)
    (first, *_) = resolve(recipe, tmp_path / "runs")
    assert load_base_codec(recipe, first).M == 12


@pytest.mark.parametrize("split", ["train", "test", "validation", "source", "replay"])
def test_keys_are_of_the_images_that_are_used(
    split: str, content: dict[str, Any], tmp_path: Path
) -> None:
    """A folder with sub-folders for each split: another image in the one that is listed is another
    run, another one elsewhere is not.
    """
    names = ("train", "test", "validation", "source", "replay")
    root = pictures(tmp_path / "all", *[f"{name}/a.png" for name in names])
    content["photographs"][split] = root
    if split == "validation":
        content["methods"] = [
            {
                "name": "slimmable",
                "widths": [1.0, 0.5],
                "lambdas": [0.01, 0.01],
                "schedule": {"first": 1, "every": 1},
            }
        ]
        content["sparsify"] = {"steps": 2}
    if split in ("source", "replay"):
        content["photographs"]["source"] = root
        adaptation = {"form": "finetune_decoder", "domain": "screen", "replay": 0.5}
        content["photographs"]["replay"] = root
        content["methods"] = [{"name": "adaptation", **adaptation}]
        content["sparsify"] = {"steps": 2}

    def key() -> str:
        return plan_runs(parse_recipe(content, "a"), tmp_path)[-1].key

    listed = {"test", "train"} if split in ("source", "replay") else {split}
    before = key()
    for name in names:
        write_png(torch.rand(3, 80, 80), tmp_path / "all" / name / "a.png")
        assert (key() != before) is (name in listed), name
        before = key()


def test_validation_images_have_a_sub_folder_of_their_own(tmp_path: Path) -> None:
    root = pictures(tmp_path / "all", "train/a.png", "test/b.png")
    assert [path.name for path in list_images(root, "validation")] == ["a.png"]
    pictures(tmp_path / "all", "validation/c.png")
    assert [path.name for path in list_images(root, "validation")] == ["c.png"]
    pytest.importorskip("skimage", reason="the sample photographs are scikit-image's")
    assert list_images("samples", "validation") == list_images("samples", "train")


def test_an_arm_of_few_images_is_pruned_by_these_alone(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(folder: Any, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        seen.append(folder)
        return real(folder, *args, **kwargs)

    import nicprune.experiments.run as module

    real = module.calibration_images
    monkeypatch.setattr(module, "calibration_images", spy)
    content["methods"][0]["images"] = 2
    recipe = parse_recipe(content, "a")
    folders = {"reports": tmp_path / "reports", "runs": tmp_path / "runs"}
    run_recipe(recipe, **folders, say=lambda line: None, progress=False)
    assert seen and all([Path(path).name for path in one] == ["0.png", "3.png"] for one in seen)


# -- qualities ------------------------------------------------------------------------------------


@pytest.fixture
def two_widths(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    made = {1: (8, 12), 2: (16, 20)}
    module = types.SimpleNamespace(make=lambda quality: ScaleHyperprior(*made[quality]))
    monkeypatch.setitem(sys.modules, "two_widths", module)
    left_out = ("methods", "control", "lambdas")
    return {k: v for k, v in content.items() if k not in left_out} | {
        "task": "train",
        "codec": "two_widths:make",
        "qualities": [1, 2],
    }


def test_a_chain_from_one_width_to_another_is_refused(
    two_widths: dict[str, Any], tmp_path: Path
) -> None:
    assert len(resolve(parse_recipe(two_widths, "a"), tmp_path)) == 2
    with pytest.raises(RecipeError, match="chain: q2 has other widths than q1"):
        resolve(parse_recipe(two_widths | {"chain": True}, "a"), tmp_path)


def test_a_quality_differs_from_finetune_where_it_says_so(two_widths: dict[str, Any]) -> None:
    two_widths["finetune"] = {"steps": 5, "lr": 2e-4, "schedule": "linear", "warmup": 3}
    recipe = parse_recipe(two_widths | {"per_quality": {2: {"steps": 8, "warmup": 0}}}, "a")
    assert recipe.phase_of(1) == recipe.finetune
    expected = {"steps": 8, "lr": 2e-4, "schedule": "linear", "warmup": 0}
    assert {k: getattr(recipe.phase_of(2), k) for k in expected} == expected


def test_fewer_qualities_leave_out_what_is_stated_for_the_others(
    two_widths: dict[str, Any], tmp_path: Path
) -> None:
    two_widths |= {
        "lambdas": {1: 0.01, 2: 0.02},
        "per_quality": {2: {"steps": 3}},
        "chain": {2: 1},
    }
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(two_widths))
    recipe, _ = read_recipe(str(file), ["qualities=[1]"])
    assert recipe.lambdas == {1: 0.01} and not recipe.per_quality and not recipe.chain
    recipe, _ = read_recipe(str(file), ["qualities=[2]"])
    assert recipe.lambdas == {2: 0.02} and recipe.phase_of(2).steps == 3 and not recipe.chain


def test_recipes_of_the_package_run_at_any_of_their_qualities() -> None:
    for name in ("base_evc", "mask_decay_evc", "evidence_hyperprior"):
        whole, _ = read_recipe(name)
        for quality in whole.qualities:
            assert read_recipe(name, [f"qualities=[{quality}]"])[0].qualities == [quality]


# -- lambdas and metrics --------------------------------------------------------------------------


def test_a_codec_of_another_metric_is_pruned_by_the_recipes(
    content: dict[str, Any], tmp_path: Path
) -> None:
    file = save(ScaleHyperprior(8, 12), tmp_path / "own.safetensors")
    content |= {"codec": str(file), "metric": "ms-ssim", "lambdas": {1: 8.73}}
    recipe = parse_recipe(content | {"training": QUICK | {"patch_size": 192}}, "a")
    codec = load_base_codec(recipe, plan_runs(recipe, tmp_path)[-1])
    assert provenance(codec).metric == "ms-ssim"


@pytest.mark.parametrize(
    "arm",
    [
        {"name": "bit_rate_modulator", "lambdas": [0.01, 0.02]},
        {"name": "slimmable", "widths": [1.0, 0.5], "lambdas": [0.01, 0.005]},
    ],
)
def test_a_lambda_beside_lambdas_is_refused(arm: dict[str, Any], content: dict[str, Any]) -> None:
    content |= {"methods": [arm], "sparsify": {"steps": 2}}
    assert parse_recipe(content, "a")
    with pytest.raises(RecipeError, match=f"lmbda: {arm['name']} trains by lambdas of its own"):
        parse_recipe(content | {"methods": [arm | {"lmbda": 0.5}]}, "a")


def test_no_seeds_are_not_all_seeds(content: dict[str, Any]) -> None:
    content["methods"][0]["seeds"] = []
    with pytest.raises(RecipeError, match="seeds"):
        parse_recipe(content, "a")


@pytest.mark.parametrize("name", ["demo-hyperprior", "bmshj2018-hyperprior"])
def test_a_quality_is_a_whole_number(name: str) -> None:
    quality: Any = 3.0
    with pytest.raises(CodecError, match="has no quality 3.0; it has 1 to"):
        load_codec(name, quality, weights="none")


def test_check_says_so_too(
    content: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content["photographs"]["train"] = str(tmp_path)
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    assert "runs would be written into" in fails(monkeypatch, capsys, "check", str(file))
