"""Checking a recipe finds what running it would refuse, in one line."""

from __future__ import annotations

import copy
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import offer_tiny_codecs
from helpers_cli import call, fails

from nicprune.common.errors import DataError, NicpruneError, RecipeError, TrainingError
from nicprune.data.images import write_png
from nicprune.data.patches import mix
from nicprune.experiments.base_codec import load_base_codec
from nicprune.experiments.plan import Run, fit_settings, phases_of
from nicprune.experiments.recipe import LARGEST_SEED
from nicprune.experiments.recipe_files import read_recipe
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.experiments.recipe_paths import check_outside_images
from nicprune.experiments.resolve import resolve
from nicprune.experiments.run import plan, prepare, run_recipe
from nicprune.methods import attach
from nicprune.training.loop import fit
from nicprune.training.run import TrainingRun
from nicprune.training.settings import TrainSettings, learning_rate


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("a.png", "b.png"):
        write_png(torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0)), folder / name)
    return folder


@pytest.fixture
def content(photos: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A valid recipe with a method of each kind."""
    offer_tiny_codecs(monkeypatch)
    return {
        "version": 1,
        "name": "tiny",
        "codec": "tiny_codecs:make",
        "qualities": [1],
        "lambdas": {1: 0.01},
        "photographs": {"train": str(photos), "test": [str(photos)], "overlap": True},
        "seeds": [0],
        "training": {"batch_size": 1, "patch_size": 64, "precision": "32"},
        "sparsify": {"steps": 4, "lr": 1e-4},
        "finetune": {"steps": 2},
        "methods": [
            {"name": "mask_decay", "budget": {"macs": 0.5}, "round_to": 1},
            {
                "name": "random",
                "label": "one-shot",
                "budget": {"macs": 0.5},
                "round_to": 1,
                "seed": 1,
            },
        ],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": [{"name": "none", "label": "a" * 250}]}, "makes a file name of"),
        ({"methods": [{"name": "none", "label": "a\nb"}]}, "a label is a line of text"),
        ({"training": {"accelerator": "abc"}}, "cannot train on 1 x 'abc'"),
        ({"training": {"patch_size": 128}}, "photographs.train: no usable image"),
        ({"training": {"accelerator": "tpu"}}, "cannot train on 1 x 'tpu'"),
        ({"training": {"batch_size": 10**9, "patch_size": 64}}, "a batch of 1000000000 patches"),
        ({"training": {"lr": 1e300}}, "lr: input should be less than or equal to"),
        ({"finetune": {"steps": 2, "lr": 1e300}}, "lr: input should be less than or equal to"),
        ({"qualities": [10**30], "lambdas": {10**30: 0.01}}, "qualities.0: input should be less"),
        ({"photographs": {"train": [], "test": "samples"}}, "name a folder of images"),
        ({"photographs": {"train": "", "test": "samples"}}, "name a folder of images"),
        ({"seeds": [10**30]}, "seeds.0: input should be less than or equal to"),
        (
            {"methods": [{"name": "random", "budget": {"macs": 0.5}, "seed": 10**30}]},
            f"seed: input should be at most {LARGEST_SEED}",
        ),
        ({"name": "n" * 300}, "name: string should have at most 100 characters"),
        ({"codec": "nowhere:make"}, "cannot import 'nowhere:make'"),
        ({"weights": "/dev/zero"}, "it is a device, not a regular file"),
        (
            {"methods": [{"name": "mask_decay", "widths": {"nowhere": 4}}]},
            "q1 mask_decay: ",
        ),
    ],
)
def test_what_training_would_refuse_is_found(
    content: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(NicpruneError) as caught:
        resolve(parse_recipe(content | change, "recipe.yaml"), tmp_path)
    assert message.lower() in str(caught.value).lower() and "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_images_that_are_all_broken_are_found(
    content: dict[str, Any], split: str, tmp_path: Path
) -> None:
    photo = write_png(torch.rand(3, 96, 96), tmp_path / "broken" / "a.png")
    photo.write_bytes(photo.read_bytes()[:900])  # a whole header
    content["photographs"] = content["photographs"] | {split: str(photo.parent)}
    with pytest.raises(DataError, match=f"photographs.{split}: no usable image: every one of 1"):
        resolve(parse_recipe(content, "a"), tmp_path)


@pytest.mark.parametrize("steps", [4, 4.0, "4"])
def test_steps_count_as_they_are_parsed(content: dict[str, Any], steps: Any) -> None:
    recipe = parse_recipe(content | {"sparsify": {"steps": steps}}, "a")
    assert recipe.methods[0].stack[0].settings["decay_steps"] == recipe.sparsify.steps == 4


def test_tensorboard_is_looked_for(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match="tensorboard is not installed"):
        resolve(parse_recipe(content | {"training": {"tensorboard": True}}, "a"), tmp_path)


@pytest.mark.parametrize("command", [["check"], ["run", "--dry-run"], ["run"]])
def test_commands_check_the_same(
    content: dict[str, Any],
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(content | {"training": {"accelerator": "abc"}}))
    err = fails(monkeypatch, capsys, *command, str(recipe))
    assert "'abc'" in err and err.startswith("nicprune: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [recipe], "nothing was begun"
    if command != ["run"]:
        recipe.write_text(yaml.safe_dump(content))
        call(*command, str(recipe))
        assert list(tmp_path.iterdir()) == [recipe], "nothing was written"


def test_a_pipe_or_a_device_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    for path, kind in ((tmp_path / "recipe.yaml", "a pipe"), ("/dev/zero", "a device")):
        with pytest.raises(NicpruneError, match=f"as recipe: it is {kind}"):
            read_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version: 2001-99-99", "a value cannot be read"),
        ("a: " + "9" * 5000, "a value cannot be read"),
        ("[" * 5000, "nested too deep"),
    ],
    ids=["date", "number", "nested"],
)
def test_text_that_yaml_cannot_build_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(RecipeError, match=said) as caught:
        read_recipe(str(tmp_path / "a.yaml"))
    assert "\n" not in str(caught.value)


def test_two_runs_of_one_recipe_do_not_meet(content: dict[str, Any], tmp_path: Path) -> None:
    from nicprune.common.lock import locked

    recipe = parse_recipe(content, "a")
    first = resolve(recipe, tmp_path / "runs")[0]
    with locked(first.folder), pytest.raises(NicpruneError, match="is in use by process"):
        run_recipe(
            recipe, runs=tmp_path / "runs", reports=tmp_path / "reports", say=lambda line: None
        )


def test_a_photograph_exchanged_for_one_of_the_same_size_is_another_run(
    content: dict[str, Any], tmp_path: Path
) -> None:
    from PIL import Image

    photo = tmp_path / "photos" / "a.bmp"
    photo.parent.mkdir()
    keys = []
    for blue in (30, 31):
        Image.new("RGB", (96, 96), (10, 20, blue)).save(photo)
        recipe = parse_recipe(
            content
            | {"photographs": {"train": content["photographs"]["train"], "test": str(photo)}},
            "a",
        )
        keys.append({job.key for job in resolve(recipe, tmp_path / "runs")})
    assert not keys[0] & keys[1]


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 4.0, 0.5, -0.5, 1e308, 1e-320, float("inf"), float("nan"),
    10**30, -(10**30), 2**63, "", " ", "4", "a", "a/b", "..", "ü" * 200, "a\0b", "a\nb", "\ud800",
    "${NOWHERE}", "~nobody/x", "/dev/zero", "abc", "none", "auto", [], [[]], [0], [1, 1], ["a"],
    [None], [10**30], {}, {"a": 1}, {1: 1}, {"steps": 3}, {"name": "none"},
    [{"name": "magnitude", "budget": {"macs": 0.5}}], [{"name": "none", "label": "x" * 230}],
]  # fmt: skip
"""Values that stand in the place of valid ones."""

KEYS = {
    "training": [*TrainSettings.model_fields],
    "sparsify": ["steps", "lr", "schedule", "warmup", "optimizer"],
    "finetune": ["steps", "lr", "schedule", "warmup", "optimizer"],
    "photographs": ["train", "test", "validation", "crops", "overlap"],
    "": [*parse_recipe.__globals__["Recipe"].model_fields],
    "arm": ["name", "label", "between", "lmbda", "seeds", "scratch", "phase", "training", "stack",
            "budget", "widths", "decay_steps", "round_to", "seed", "side", "only", "mask_lr"],
}  # fmt: skip


def mutate(content: dict[str, Any], draw: random.Random) -> str:
    """Put one odd value into a recipe, in place; return what was changed."""
    section = draw.choice([*KEYS])
    key, value = draw.choice(KEYS[section]), copy.deepcopy(draw.choice(ODD))
    target = content
    if section == "arm":
        target = draw.choice(content["methods"])
    elif section:
        target = content[section]
    target[key] = value
    return f"{section}.{key} = {ascii(value)[:80]}"


def start_each_phase(recipe: Any, job: Run) -> None:
    """What each phase does before its first step; a phase ends there."""
    codec = load_base_codec(recipe, job)
    for name, phase in phases_of(recipe, job).items():
        if not phase.steps:
            continue
        model = codec
        if name == "sparsify" and job.arm.scratch is None:
            model = attach(codec, job.settings)
            prepare(model, recipe, job)
            if model.done:
                codec = model = model.harden()
        with pytest.raises(_Begun):
            fit(model, recipe.photographs.train, progress=False, **fit_settings(recipe, job, name))
        codec = load_base_codec(recipe, job)


class _Begun(Exception):
    pass


def test_what_is_accepted_can_begin_and_what_is_refused_is_one_line(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(run: TrainingRun) -> None:
        learning_rate(run.options, 0)
        torch.manual_seed(mix(run.options.seed, 0, 0, 1))
        raise _Begun

    monkeypatch.setattr(TrainingRun, "resume", begin)
    draw, verdicts, faults = random.Random(0), {True: 0, False: 0}, []
    for _ in range(int(os.environ.get("NICPRUNE_MUTATIONS", 100))):
        changed = copy.deepcopy(content)
        what = mutate(changed, draw)
        stage = "check"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                recipe = parse_recipe(changed, "recipe.yaml")
                jobs = resolve(recipe, tmp_path / "runs")
                stage = "plan"
                verdicts[True] += 1
                for job in jobs:
                    start_each_phase(recipe, job)
                    job.folder.mkdir(parents=True, exist_ok=True)
                f"{jobs}".encode()
        except NicpruneError as error:
            verdicts[False] += stage == "check"
            if stage != "check" or "\n" in str(error):
                faults.append(f"{what}: {stage}: {error}")
        except Exception as error:
            faults.append(f"{what}: {stage}: unexpected {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)
    assert min(verdicts.values()) >= 3, verdicts


def test_the_plan_is_made_of_what_was_resolved(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(content, "a")
    assert len(plan(recipe)) == len(resolve(recipe, tmp_path))


@pytest.mark.parametrize(
    ("split", "among"),
    [("train", "photos"), ("train", "photos/train"), ("test", "photos/test"), ("replay", "photos")],
)
def test_a_report_among_the_images_is_refused(
    content: dict[str, Any], tmp_path: Path, split: str, among: str
) -> None:
    """Its plots would be images of the next run."""
    for name in (among, "photos/elsewhere"):
        write_png(torch.rand(3, 64, 64), tmp_path / name / "a.png")
    if split == "replay":
        adaptation = {"domain": "screen", "form": "finetune_decoder", "replay": 0.5}
        content["methods"] = [{"name": "adaptation", **adaptation}]
        content["photographs"]["source"] = content["photographs"]["test"]
    content["photographs"][split] = str(tmp_path / "photos")
    recipe = parse_recipe(content, "recipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecipeError, match=f"among photographs.{split}"):
        run_recipe(recipe, reports=tmp_path / among, runs=tmp_path / "runs", say=lambda line: None)
    assert sorted(tmp_path.rglob("*")) == before
    if among != "photos":  # of a folder with a `train`, the rest is not listed
        check_outside_images(recipe, tmp_path / "photos" / "elsewhere", "a", "b")
