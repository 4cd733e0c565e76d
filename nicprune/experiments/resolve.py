"""From a recipe to its runs, after all has been checked that can be checked without training.
`nicprune check`, `--dry-run` and `run` all begin here.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from nicprune.codecs.anatomy import CDF_BUFFERS
from nicprune.codecs.example import size_multiple
from nicprune.codecs.zoo import DEMO, check_official
from nicprune.common.config import parse
from nicprune.common.errors import DataError, FileError, NicpruneError, RecipeError
from nicprune.data.images import list_images, readable, usable_images
from nicprune.experiments.base_codec import architecture, load_base_codec
from nicprune.experiments.plan import (
    Run,
    check_overlap,
    fit_settings,
    phases_of,
    plan_runs,
    report_name,
)
from nicprune.experiments.recipe import Recipe
from nicprune.experiments.recipe_paths import SPLITS, check_outside_images, check_paths
from nicprune.experiments.times import latency_of
from nicprune.methods.attaching import attach
from nicprune.report.record_files import read as read_records
from nicprune.storage.checkpoint import check_savable
from nicprune.training.environment import check_environment
from nicprune.training.settings import TrainSettings, check_patch_size

LONGEST = 255
"""Largest length of a file name in bytes, on all common file systems."""


def resolve(recipe: Recipe, runs: Path) -> list[Run]:
    """Return the runs of a recipe after checking what they need.

    Checked are paths, images, file names, training settings, this machine's devices, that each
    codec can be saved and loaded again, and each method on each codec; of runs that are finished,
    only the first three. Nothing is trained or written.

    Args:
        recipe: as `read_recipe` returns it.
        runs: folder of the runs.

    Raises:
        NicpruneError: something is missing, or does not fit together.
    """
    check_paths(recipe)
    check_outside_images(recipe, runs / recipe.name, "runs", "--runs")
    check_overlap(recipe)
    listed = plan_runs(recipe, runs)
    for job in listed:
        _check_names(recipe, job)
    left = [job for job in listed if not finished(job)]
    patch_sizes = {settings.patch_size for job in left for settings in _phases(recipe, job)}
    if left:
        _check_images(recipe, max(patch_sizes, default=1))
    for job in {job.quality: job for job in left}.values():
        _check_chain(recipe, job)
        check_savable(architecture(recipe, job), partial(architecture, recipe, job))
    checked = set()
    for job in left:
        # Seeds make no difference to what fits.
        if (job.quality, job.arm.label) not in checked:
            checked.add((job.quality, job.arm.label))
            try:
                _check_codec(recipe, job)
            except NicpruneError as error:
                raise type(error)(f"q{job.quality} {job.arm.label}: {error}") from None
    return listed


def finished(job: Run) -> bool:
    """Return whether a run's result exists, is whole, and has the run's key."""
    try:
        records = read_records(job.folder / "record.json")
        return bool(records) and all(record.key == job.key for record in records)
    except FileError:
        return False


def load_for_check(recipe: Recipe, job: Run) -> nn.Module:
    """Return the codec that a run starts from, or one of random weights where these would be
    downloaded, or come from another run.
    """
    download = recipe.weights_for(job.quality) == "official" and ":" not in recipe.codec
    download = download and recipe.codec != DEMO and not recipe.codec.endswith(".safetensors")
    chained = recipe.before(job.quality) is not None
    if download and not chained:
        check_official(recipe.codec, job.quality, recipe.metric)
    if download or chained:
        recipe = recipe.model_copy(update={"weights": "none"})
    return load_base_codec(recipe, job)


def _phases(recipe: Recipe, job: Run) -> list[TrainSettings]:
    """Return the settings of each phase that a run trains, as `fit` checks them."""
    found = []
    for name, phase in phases_of(recipe, job).items():
        if phase.steps:
            where = f"q{job.quality} {job.arm.label}: {name}"
            found.append(parse(TrainSettings, fit_settings(recipe, job, name), where))
            check_environment(found[-1])
    return found


def _check_names(recipe: Recipe, job: Run) -> None:
    for name in (job.folder.name, report_name(recipe, job)):
        if (length := len(name.encode())) > LONGEST:
            raise RecipeError(
                f"the label {job.arm.label[:40]!r}... makes a file name of {length} bytes; a file"
                f" name has at most {LONGEST}"
            )


def _check_images(recipe: Recipe, patch_size: int) -> None:
    given = recipe.photographs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # images that are left out are named when they are used
        smallest = {"train": patch_size, "replay": patch_size, "validation": 64}
        for split, inside in SPLITS.items():
            minimum = smallest.get(split, 1)
            if (folder := getattr(given, split)) is not None:
                try:
                    # Headers of all; of one at least, what follows.
                    next(readable(usable_images(list_images(folder, inside), minimum)))
                except DataError as error:
                    raise DataError(f"photographs.{split}: {error}") from None


def _check_chain(recipe: Recipe, job: Run) -> None:
    """Raise RecipeError if a quality is of other widths than the one that it starts from: it would
    take these.
    """
    before = recipe.before(job.quality)
    if before is None:
        return
    own, other = (
        architecture(recipe, replace(job, quality=quality)).state_dict()
        for quality in (job.quality, before)
    )
    differ = [
        key
        for key in own
        if key.rpartition(".")[2] not in CDF_BUFFERS
        and (key not in other or own[key].shape != other[key].shape)
    ]
    if differ:
        raise RecipeError(
            f"chain: q{job.quality} has other widths than q{before}, which it would start from"
            f" ({differ[0]}): leave it out of the chain"
        )


def _check_codec(recipe: Recipe, job: Run) -> None:
    with torch.random.fork_rng(devices=[]):
        codec = load_for_check(recipe, job)
        for settings in _phases(recipe, job):
            check_patch_size(settings.patch_size, size_multiple(codec))
        if job.arm.scratch is None and job.role in ("pruned", "modulated", "control"):
            attach(codec, job.settings, latency=latency_of(recipe, job, codec))
