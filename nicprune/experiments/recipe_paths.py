"""The files and folders that a recipe names: all that is missing is told at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nicprune.codecs.zoo import DEMO, check_name, codec_names
from nicprune.common.errors import FileError, NicpruneError, RecipeError
from nicprune.common.files import check_regular, expand
from nicprune.data.images import SAMPLES, list_images, listed_folder
from nicprune.experiments.recipe import Recipe

SPLITS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "source": "test",
    "replay": "train",
}
"""Photographs of a recipe, and the sub-folder that is listed where their folder has one."""


def check_paths(recipe: Recipe) -> None:
    """Raise unless all files that the recipe reads exist, before any work is done. One error lists
    all that is missing.

    Raises:
        DataError, FileError: images or weights are missing.
    """
    missing: list[NicpruneError] = []

    def collect(where: str, look: Callable[..., object], *arguments: Any) -> None:
        try:
            look(*arguments)
        except NicpruneError as error:
            missing.append(type(error)(f"{where}: {error}"))
        except OSError as error:  # a name that is too long, a folder that may not be read
            path = f"{str(error.filename or arguments[0])[:60]!r}"
            missing.append(FileError(f"{where}: cannot read {path}: {error.strerror or error}"))

    for split, inside in SPLITS.items():
        if (folder := getattr(recipe.photographs, split)) is not None:
            collect(f"photographs.{split}", list_images, folder, inside)
    for quality in recipe.qualities:
        if recipe.before(quality) is None:
            if (weights := recipe.weights_for(quality)) not in ("official", "none"):
                collect("weights", _check_exists, weights)
            transforms = recipe.transforms_for(quality)
            if transforms == DEMO:
                collect("transforms", check_name, DEMO, quality, "mse")
            elif transforms is not None:
                collect("transforms", _check_exists, transforms)
    if recipe.codec.endswith(".safetensors"):
        collect("codec", _check_exists, recipe.codec, f" (known names: {', '.join(codec_names())})")
    if missing:
        raise type(missing[0])("\n".join(dict.fromkeys(map(str, missing))))


def check_outside_images(recipe: Recipe, written: Path, what: str, option: str) -> None:
    """Raise RecipeError if what a run writes would lie in a folder of images: the next run would
    learn from its plots and crops, or be tested on them.

    Args:
        written: the folder that is written into.
        what, option: name of what is written, and the option that names another folder.
    """
    for split, inside in SPLITS.items():
        given = getattr(recipe.photographs, split)
        for folder in [given] if isinstance(given, (str, Path)) else given or ():
            if str(folder) == SAMPLES:
                continue
            root = listed_folder(expand(folder), inside)
            if written.resolve().is_relative_to(root.resolve()):
                raise RecipeError(
                    f"{what} would be written into {written}, among photographs.{split} ({root}),"
                    f" and taken for images: choose another folder ({option})"
                )


def _check_exists(path: str, hint: str = "") -> None:
    file = expand(path)
    if not file.exists():
        raise FileError(f"no such file: {path}{hint}")
    check_regular(file, "weights")
