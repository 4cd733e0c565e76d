"""The runs of a recipe: one for each codec to be trained and measured, in a folder named by what
its result depends on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nicprune.codecs.zoo import DEMO, embedded_file
from nicprune.common.errors import RecipeError
from nicprune.common.files import content_digest, expand
from nicprune.common.wording import counted
from nicprune.data.images import list_images
from nicprune.experiments.own_code import codec_digest, method_digests
from nicprune.experiments.recipe import MethodSpec, Phase, Recipe, Variant, slug_of
from nicprune.experiments.recipe_paths import SPLITS
from nicprune.methods.contract import METHODS
from nicprune.pruning.latency_table import Runtime


@dataclass(frozen=True)
class Run:
    """One codec to be trained and measured."""

    quality: int
    seed: int
    role: str
    arm: Variant
    folder: Path
    key: str
    lmbda: float

    @property
    def settings(self) -> list[tuple[str, dict[str, Any]]]:
        """Methods to attach, with their settings. A setting `seed` or `lmbda` of a method is the
        run's own unless the recipe gives it.
        """
        own: dict[str, Any] = {"seed": self.seed, "lmbda": self.lmbda}
        return [
            (
                part.name,
                {
                    **{k: v for k, v in own.items() if k in METHODS[part.name].Config.model_fields},
                    **part.settings,
                },
            )
            for part in self.arm.stack
        ]


def _bare(label: str) -> Variant:
    return Variant(label=label, stack=[MethodSpec(name="none")])


def plan_runs(recipe: Recipe, runs: Path) -> list[Run]:
    """List the runs of a recipe, in order.

    The name of each run's folder ends with a hash of all that its result depends on. A codec of
    `package.module:factory` is built for it.

    Raises:
        CodecError: such a codec cannot be built.
    """
    listed = []
    train, test, validation, source, replay = (
        _photographs(recipe, split) for split in ("train", "test", "validation", "source", "replay")
    )
    trained: dict[int | None, str] = {}
    for quality in recipe.qualities:
        codec_code = codec_digest(recipe, quality)
        arms = [("original", recipe.seeds[0], _bare("original"))]
        if recipe.task == "prune":
            for seed in recipe.seeds:
                if recipe.control:
                    arms.append(("control", seed, _bare("control")))
                # A codec for all rates starts from the codec of the highest quality.
                run = [
                    arm
                    for arm in recipe.methods
                    if (quality == recipe.top or not arm.modulated)
                    and seed in (arm.seeds or recipe.seeds)
                    and quality in (arm.qualities or recipe.qualities)
                ]
                arms += [("modulated" if arm.modulated else "pruned", seed, arm) for arm in run]
        # Training from scratch depends on the variant whose architecture it takes.
        keys: dict[tuple[str, int], str] = {}
        for role, seed, arm in arms:
            fields = (
                [arm.cache_fields(), keys[arm.scratch, seed]]
                if arm.scratch is not None
                else arm.cache_fields()
            )
            key = digest(
                recipe.task,
                recipe.codec,
                recipe.metric,
                recipe.weights_for(quality),
                quality,
                recipe.lmbda(quality),
                role,
                fields,
                seed,
                train
                + test
                + source
                + (replay if _replays(arm) else [])
                + (validation if any(part.settings.get("schedule") for part in arm.stack) else []),
                file_digests(recipe, quality),
                recipe.training,
                recipe.half,
                # In a chain, a quality depends on the one that it starts from.
                trained.get(recipe.before(quality), ""),
                []
                if role == "original" and recipe.task == "prune"
                else [recipe.sparsify, recipe.finetune, recipe.per_quality.get(quality)],
                [recipe.lambdas, recipe.qualities] if role == "modulated" else [],
                *([runtime_of(recipe).model_dump()] if arm.timed else []),
                # Without code of the user's own, keys are what they were.
                *([own] if (own := codec_code + method_digests(arm)) else []),
            )
            trained[quality] = key
            keys[arm.label, seed] = key
            slug = slug_of(arm.label)
            folder = (
                runs
                / recipe.name
                / f"q{quality}"
                / f"{slug}{f'-s{seed}' if len(recipe.seeds) > 1 else ''}-{key[:8]}"
            )
            like = next((other for other in recipe.methods if other.label == arm.scratch), arm)
            listed.append(
                Run(
                    quality,
                    seed,
                    role,
                    arm,
                    folder,
                    key,
                    arm.lmbda or like.lmbda or recipe.lmbda(quality),
                )
            )
    return listed


def _photographs(recipe: Recipe, split: str) -> list[list[Any]]:
    given = getattr(recipe.photographs, split)
    paths = [] if given is None else list_images(given, SPLITS[split])
    return [[split, path.name, content_digest(path)] for path in paths]


def _replays(arm: Variant) -> bool:
    return any(part.settings.get("replay") for part in arm.stack)


def check_overlap(recipe: Recipe) -> None:
    """Raise RecipeError if test images are training images too, whatever their names, unless the
    recipe allows it: numbers on images that were seen in training are no results.

    Files are compared by their content, which the keys of runs have had read before.
    """
    if recipe.photographs.overlap:
        return
    trained = {
        digest: f"photographs.{split}: {name}"
        for split in ("train", *(["replay"] if any(map(_replays, recipe.methods)) else []))
        for _, name, digest in _photographs(recipe, split)
    }
    for split in ("test", "source"):
        tested = _photographs(recipe, split)
        seen = [f"{name} ({trained[digest]})" for _, name, digest in tested if digest in trained]
        if seen:
            raise RecipeError(
                f"photographs.{split}: {len(seen)} of {counted(len(tested), 'image')} seen in"
                f" training: {', '.join(seen[:3])}{', ...' if len(seen) > 3 else ''}; name"
                " others, or allow it by overlap: true (--set photographs.overlap=true)"
            )


def training_images(recipe: Recipe, job: Run) -> str | list[str]:
    """Return the training images of a run, as `fit` takes them."""
    if job.arm.images is None:
        return recipe.photographs.train
    paths = list_images(recipe.photographs.train, "train")
    count = min(job.arm.images, len(paths))
    return [str(paths[i * len(paths) // count]) for i in range(count)]


def file_digests(recipe: Recipe, quality: int) -> list[str]:
    """Return hashes of the weight files that a quality starts from, since a path may hold another
    file in the next run.
    """
    named = [recipe.codec] if recipe.codec.endswith(".safetensors") else []
    weights = recipe.weights_for(quality)
    named += [weights] if weights not in ("official", "none") else []
    transforms = recipe.transforms_for(quality)
    named += [transforms] if transforms not in (None, DEMO) else []
    if (recipe.codec, weights) == (DEMO, "official") or transforms == DEMO:
        named.append(str(embedded_file(quality)))
    files = [expand(name) for name in named]
    return [
        hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "" for file in files
    ]


def phases_of(recipe: Recipe, job: Run) -> dict[str, Phase]:
    """Return the phases that a run trains, by the names of their folders, in order."""
    if recipe.task == "train":
        return {"train": recipe.phase_of(job.quality)}
    if job.role == "original":
        return {}
    if job.arm.scratch is not None:
        together = recipe.sparsify.steps + recipe.finetune.steps
        return {"finetune": job.arm.phase or recipe.finetune.model_copy(update={"steps": together})}
    return {
        "sparsify": job.arm.sparsify or recipe.sparsify,
        "finetune": job.arm.phase or recipe.finetune,
    }


def fit_settings(recipe: Recipe, job: Run, name: str) -> dict[str, Any]:
    """Return the settings of `fit` for the phase `name` of a run."""
    # The two phases of pruning, and all seeds of a recipe, get different crops.
    seed = job.seed if recipe.task == "train" else 2 * job.seed + (name == "finetune")
    phase = phases_of(recipe, job)[name]
    settings = recipe.train_settings(phase, job.quality, seed, job.arm)
    return {**settings, "lmbda": job.lmbda}


def runtime_of(recipe: Recipe) -> Runtime:
    """Return the runtime whose times the budgets of a recipe limit."""
    return recipe.latency or Runtime()


def report_name(recipe: Recipe, job: Run) -> str:
    """Return the name of a run's codec beside the report."""
    level = "" if job.role == "modulated" else f"-q{job.quality}"
    codec = Path(recipe.codec).stem.replace(":", "-")
    return f"{codec}{level}-{job.folder.name.rsplit('-', 1)[0]}.safetensors"


def digest(*parts: Any) -> str:
    """Return a hash of anything that JSON can write, for cache keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
