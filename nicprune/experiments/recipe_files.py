"""Recipes by their names or paths, read from YAML, with overrides."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nicprune.common.config import apply_override, cut, read_yaml
from nicprune.common.errors import FileError, RecipeError, closest
from nicprune.common.files import check_regular, expand
from nicprune.experiments.recipe import Recipe
from nicprune.experiments.recipe_parser import parse_recipe


def recipe_folders() -> list[Path]:
    """Return the folders where recipes are found by name: beside the package in a clone, inside it
    when installed.
    """
    package = Path(str(resources.files("nicprune")))
    return [
        folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()
    ]


def recipe_names() -> dict[str, Path]:
    """Return the names of the recipes that come with nicprune."""
    return {
        path.stem: path
        for folder in reversed(recipe_folders())
        for path in sorted(folder.glob("*.yaml"))
    }


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by path or by name.

    Raises:
        RecipeError: there is none; names the closest.
    """
    path = expand(name)
    if path.exists() and not path.is_dir():
        return check_regular(path, "recipe")
    known = recipe_names()
    stem = path.stem if path.suffix in (".yaml", ".yml") else name
    if stem in known and (path.parent == Path(".") or path.parent.name == "recipes"):
        return known[stem]
    raise RecipeError(f"no recipe {name!r}; {closest(stem, known)}")


def read_recipe(
    name: str, overrides: Sequence[str] = (), *, imports: bool = True
) -> tuple[Recipe, str]:
    """Read a recipe and apply `key=value` overrides; return it with the text it amounts to.

    Nothing is imported here. With `imports` false, a recipe that would have code imported later is
    refused.

    Raises:
        RecipeError: not YAML, an unknown key, a value out of range, a codec, quality or method that
            does not exist.
        FileError: the file cannot be read.
    """
    path = find_recipe(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {error}") from None
    content = read_yaml(text, str(path))
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping that starts with version: 1 (found"
            f" {type(content).__name__})"
        )
    for override in overrides:
        apply_override(content, override)
    # Once all are applied: a position in `methods` is that of the file, whatever stands first.
    if any(override.partition("=")[0] == "qualities" for override in overrides):
        _keep_qualities(content)
    content.setdefault("name", path.stem)
    recipe = parse_recipe(content, str(path))
    if recipe.imports and not imports:
        raise RecipeError(
            f"{path}: codec: {cut(recipe.codec)} runs code; look at it, then leave --no-import out"
        )
    return recipe, yaml.safe_dump(content, sort_keys=False) if overrides else text


def _keep_qualities(content: dict[str, Any]) -> None:
    """Leave out of each arm the qualities that the recipe is not run at, and arms without any; and
    what is stated for these qualities alone.
    """
    arms, kept = content.get("methods"), content["qualities"]
    if not isinstance(kept, list):
        return  # refused when it is parsed
    for name in ("weights", "lambdas", "per_quality"):
        if isinstance(content.get(name), dict):
            content[name] = {k: v for k, v in content[name].items() if k in kept}
    if isinstance(chain := content.get("chain"), dict):
        content["chain"] = {k: v for k, v in chain.items() if {k, v} <= set(kept)}
    if not isinstance(arms, list):
        return
    found = []
    for arm in arms:
        own = arm.get("qualities") if isinstance(arm, dict) else None
        if isinstance(own, list):
            arm = arm | {"qualities": [quality for quality in own if quality in kept]}
        if not isinstance(own, list) or arm["qualities"]:
            found.append(arm)
    content["methods"] = found
