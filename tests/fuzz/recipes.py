"""Recipes: the shipped ones with some values changed, as text and as content.

Their codec is a small one, which takes a hundredth of the time. What is accepted must be able to
begin: every phase of training is started up to its first step.
"""

from __future__ import annotations

import os
import random
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from compressai.models import FactorizedPrior

from nicprune.data.images import write_png
from nicprune.data.patches import mix
from nicprune.experiments.base_codec import load_base_codec
from nicprune.experiments.plan import Run, fit_settings, phases_of
from nicprune.experiments.recipe import Recipe
from nicprune.experiments.recipe_files import read_recipe, recipe_names
from nicprune.experiments.resolve import resolve
from nicprune.experiments.run import prepare
from nicprune.methods import METHODS, attach
from nicprune.storage.checkpoint import save
from nicprune.training.loop import fit
from nicprune.training.run import TrainingRun
from nicprune.training.settings import learning_rate

from .damage import damaged
from .values import change, nudge, pool_of


class Begun(Exception):
    """Training reached its first step."""


def small() -> FactorizedPrior:
    """The codec of every recipe."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FactorizedPrior(8, 12)


class Inputs:
    """Recipes."""

    lines = 20  # all that is missing is listed

    def __init__(self) -> None:
        sys.modules["small_codecs"] = types.ModuleType("small_codecs")
        vars(sys.modules["small_codecs"])["make"] = small
        for folder in ("kodak", "train", "val/cid22"):
            for number in range(2):
                write_png(torch.rand(3, 128, 128), Path("data", folder, f"{number}.png"))
        os.environ["NICPRUNE_DATA"] = str(Path("data").absolute())
        Path("start.safetensors").touch()
        save(small(), "small.safetensors", factory=small)
        self.contents = {
            name: self._made_small(yaml.safe_load(path.read_text(encoding="utf-8")))
            for name, path in recipe_names().items()
        }
        self.pool = pool_of(self.contents.values())

    def _made_small(self, content: dict[str, Any]) -> dict[str, Any]:
        """The same recipe with a small codec, few qualities and small images."""
        content["codec"], content["weights"] = "small_codecs:make", "none"
        if "transforms" in content:
            content["transforms"] = "small.safetensors"
        content["methods"] = content.get("methods", [])
        for arm in content["methods"]:
            for part in arm.get("stack", [arm]):
                if "round_to" in METHODS[part.get("name", "none")].Config.model_fields:
                    part["round_to"] = 1
                if part.get("name") == "channel_gating" and "budget" in part:
                    part["budget"] = {"macs": 0.7}
        names = {
            part.get("name", "none")
            for arm in content["methods"]
            for part in arm.get("stack", [arm])
        }
        many = any(METHODS[name].rates_field for name in names)
        content["qualities"] = content["qualities"][-2:] if many else content["qualities"][-1:]
        lambdas = content.get("lambdas", {})
        content["lambdas"] = {k: v for k, v in lambdas.items() if k in content["qualities"]}
        content.setdefault("training", {}).update(patch_size=64, batch_size=1)
        content["seeds"], content["control"] = [0], len(content["methods"]) > 2
        content.pop("chain", None)
        content.pop("per_quality", None)
        for folder, place in (("train", "train"), ("test", "kodak"), ("validation", "val/cid22")):
            if folder != "validation" or "validation" in content["photographs"]:
                content["photographs"][folder] = f"${{NICPRUNE_DATA}}/{place}"
        if content.get("task") == "train":
            del content["methods"]
        return content

    def make(self, draw: random.Random) -> tuple[str, Any]:
        name = draw.choice([*self.contents])
        text = yaml.safe_dump(self.contents[name], sort_keys=False)
        if draw.random() < 0.15:
            how, data = damaged(text.encode(), draw)
            return f"{name}: {how}", data
        content, told = yaml.safe_load(text), []
        if "methods" in content:  # one at a time, and what it refers to
            arms = content["methods"]
            arm = draw.choice(arms)
            content["methods"] = [
                a for a in arms if a is arm or a.get("label") == arm.get("scratch")
            ]
        for _ in range(draw.choice((1, 1, 2))):
            far = draw.random() < 0.3
            told.append(change(content, draw) if far else nudge(content, self.pool, draw))
        # A tree with a value in two places is written with anchors, as YAML allows.
        text = yaml.safe_dump(content, sort_keys=False)
        return f"{name}: {'; '.join(told)}", text.encode("utf-8", "surrogateescape")

    def use(self, given: Any) -> None:
        path = Path("recipe.yaml")
        path.write_bytes(given)
        recipe, _ = read_recipe(str(path))
        jobs = resolve(recipe, Path("runs"))
        with mock.patch.object(TrainingRun, "resume", begin):
            for job in jobs:
                start(recipe, job)


def begin(run: TrainingRun) -> None:
    """What stands before the first step, and takes no time."""
    learning_rate(run.options, 0)
    torch.manual_seed(mix(run.options.seed, 0, 0, 1))
    raise Begun


def start(recipe: Recipe, job: Run) -> None:
    """Do what each phase of a run does before its first step."""
    codec = load_base_codec(recipe, job)
    for name, phase in phases_of(recipe, job).items():
        if not phase.steps:
            continue
        model: Any = codec
        if name == "sparsify" and job.arm.scratch is None:
            model = attach(codec, job.settings)
            prepare(model, recipe, job)
            if model.done:
                model = model.harden()
        try:
            fit(model, recipe.photographs.train, progress=False, **fit_settings(recipe, job, name))
        except Begun:
            codec = load_base_codec(recipe, job)
