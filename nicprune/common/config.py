"""Strict configuration: values are validated, and an unknown key is refused with the closest known
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from nicprune.common.errors import RecipeError, closest

S = TypeVar("S", bound="StrictConfig")


class StrictConfig(BaseModel):
    """Base class of every configuration that a user writes, in Python or in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the keys of `model` at `path` (a pydantic error location), for hints."""
    current: Any = model
    for part in path:
        fields = getattr(current, "model_fields", None)
        if fields is None or part not in fields:
            return []
        annotation = fields[part].annotation
        options = [a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")]
        current = (
            annotation if hasattr(annotation, "model_fields") else (options[0] if options else None)
        )
    return list(getattr(current, "model_fields", {}))


def parse(model: type[S], values: Mapping[str, Any], where: str) -> S:
    """Validate `values` against `model`.

    Args:
        where: source of the values, for the message (a file name, "fit(...)").

    Raises:
        RecipeError: a value is invalid; names the first invalid key, its value and what is
            expected.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(model, error)}") from None


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """Return a pydantic error as one line."""
    found = error.errors()
    # An unknown key explains a missing one more often than the other way round.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    location = tuple(first["loc"])
    key = ".".join(str(part) for part in location) or "the whole"
    if first["type"] == "extra_forbidden":
        hint = closest(str(location[-1]), known_keys(model, location[:-1]))
        return f"unknown key {key!r}; {hint}"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, dict) or given is None else f" (got {given!r})"
    return f"{key}: {message[:1].lower() + message[1:]}{shown}"


def apply_override(content: dict[str, Any], override: str) -> None:
    """Apply one `a.b.0.c=value` (value as YAML) to a recipe's content, in place."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"--set wants key=value, for example finetune.steps=100 (got {override!r})"
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {key}: {value!r} is not a YAML value") from None
    target: Any = content
    *path, last = key.split(".")
    for part in path:
        if isinstance(target, list):
            target = _item(target, part, override)
        else:
            if target.get(_key(part)) is None:
                target[_key(part)] = {}
            target = target[_key(part)]
        if not isinstance(target, (dict, list)):
            raise RecipeError(f"--set {override}: {part!r} is a value, not a section")
    if isinstance(target, list):
        _item(target, last, override)
        target[int(last)] = parsed
    else:
        target[_key(last)] = parsed


def _key(part: str) -> str | int:
    """Return a key as YAML parses it: a quality is an integer."""
    return int(part) if part.isascii() and part.isdecimal() else part


def _item(items: list[Any], part: str, override: str) -> Any:
    if not (part.isascii() and part.isdecimal()) or int(part) >= len(items):
        raise RecipeError(f"--set {override}: {part!r} is not an index below {len(items)}")
    return items[int(part)]
