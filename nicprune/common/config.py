"""Strict configuration: values are validated, and an unknown key is refused with the closest known
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from nicprune.common.errors import RecipeError, closest

S = TypeVar("S", bound="StrictConfig")


class StrictConfig(BaseModel):
    """Base class of every configuration that a user writes, in Python or in a recipe.

    Raises:
        RecipeError: a value is invalid; one line, as from `parse`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeError(f"{type(self).__name__}: {explain(type(self), error)}") from None

    # Without it, pydantic would build nested models by this, and the place of an error be lost.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Return the keys of `model` at `path` (a pydantic error location), for hints."""
    current: Any = model
    for part in path:
        if isinstance(part, int):  # an entry of a list
            continue
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
    location, depth = _outside_unions(model, first["loc"])
    message = first["msg"]
    if depth is not None:
        # Each kind of value that is allowed there has its complaint: the one that is furthest in
        # is about what was meant.
        rivals = [e for e in found if e["loc"][:depth] == first["loc"][:depth]]
        first = max(rivals, key=lambda e: len(e["loc"]))
        location, _ = _outside_unions(model, first["loc"])
        message = first["msg"]
        if len(first["loc"]) == depth + 1:
            wanted = [e["msg"].partition(",")[0].removeprefix(EXPECTED) for e in rivals]
            message = EXPECTED + " or ".join(wanted)
    key = cut(".".join(str(part) for part in location))
    if first["type"] == "extra_forbidden":
        hint = closest(str(location[-1])[:80], known_keys(model, location[:-1]))
        return f"unknown key {key!r}; {hint}"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = message.removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, dict) or given is None else f" (got {cut(repr(given))})"
    problem = f"{cut(message[:1].lower() + message[1:], 400)}{shown}"
    return f"{key}: {problem}" if key else problem


EXPECTED = "Input should be "


def _outside_unions(
    model: type[BaseModel], location: tuple[Any, ...]
) -> tuple[tuple[Any, ...], int | None]:
    """Return the location of an error as a user writes it, without the kinds of value that
    pydantic names in it where a field allows several; and the index of the first such name.
    """
    kept: list[Any] = []
    parts = list(location)
    current: Any = model
    first: int | None = None
    while parts:
        kept.append(part := parts.pop(0))
        fields = getattr(current, "model_fields", None)
        if fields is not None:
            current = fields[part].annotation if part in fields else None
        else:  # of list[X] and dict[K, X], X
            current = (get_args(current) or (None,))[-1]
        if get_origin(current) in (Union, UnionType):
            kinds = [kind for kind in get_args(current) if kind is not NoneType]
            current = kinds[0]
            if len(kinds) > 1 and parts:
                first = len(location) - len(parts) if first is None else first
                named = str(parts.pop(0)).partition("[")[0]
                current = next((k for k in kinds if (get_origin(k) or k).__name__ == named), None)
    return tuple(kept), first


LONGEST, DEEPEST, MOST_NODES = 1 << 20, 30, 10_000
"""Characters, levels and values of a YAML text that is read: recipes have a few thousand, 6 and a
few hundred.
"""


def read_yaml(text: str, where: str) -> Any:
    """Read YAML of plain values, in which no key may stand twice.

    Args:
        where: what is being read, for the message.

    Raises:
        RecipeError: not YAML, a key stands twice, or it is too long, too deep, or by its anchors
            too large; one line, with the number of the line.
    """
    if len(text) > LONGEST:
        raise RecipeError(f"{where}: {len(text):,} characters are more than a recipe has")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise RecipeError(f"{_place(where, event.start_mark)}: nested too deep")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        _measure(node, {}, where)
        _refuse_twins(node, where, set())
        return yaml.constructor.SafeConstructor().construct_document(node)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(
            f"{_place(where, getattr(error, 'problem_mark', None))}: not YAML: {cut(problem, 200)}"
        ) from None
    except (ValueError, OverflowError, RecursionError) as error:  # a date that is none, say
        raise RecipeError(f"{where}: a value cannot be read: {cut(str(error), 200)}") from None


def cut(text: str, length: int = 80) -> str:
    """A text in one line that is not too long for a message."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def _place(where: str, mark: Any) -> str:
    return where if mark is None else f"{where}, line {mark.line + 1}"


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], where: str) -> tuple[int, int]:
    """Count the values of a node, those behind aliases each time they are named, and its levels."""
    if id(node) in known:
        if not known[id(node)][0]:
            raise RecipeError(f"{_place(where, node.start_mark)}: an anchor that contains itself")
        return known[id(node)]
    known[id(node)] = (0, 0)
    inside = [_measure(child, known, where) for child in _children(node)]
    count, levels = 1 + sum(n for n, _ in inside), 1 + max((n for _, n in inside), default=0)
    if count > MOST_NODES or levels > DEEPEST:
        raise RecipeError(
            f"{_place(where, node.start_mark)}: more than {MOST_NODES:,} values, or nested too"
            " deep, aliases included"
        )
    known[id(node)] = count, levels
    return count, levels


def _refuse_twins(node: yaml.Node, where: str, seen: set[int]) -> None:
    """Raise RecipeError where a key stands twice in a mapping: YAML would take the last."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        first: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            merges = key.tag == "tag:yaml.org,2002:merge"
            value = (
                key.value if merges else yaml.constructor.SafeConstructor().construct_object(key)
            )
            if value in first:
                raise RecipeError(
                    f"{where}, line {line}: the key {cut(key.value, 40)!r} stands twice (first in"
                    f" line {first[value]})"
                )
            first[value] = line
    for child in _children(node):
        _refuse_twins(child, where, seen)


BY_GROUP = "widths"
"""The key below which names of channel groups stand, which hold dots."""


def apply_override(content: dict[str, Any], override: str) -> None:
    """Apply one `a.b.0.c=value` (value as YAML) to a recipe's content, in place."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"--set wants key=value, for example finetune.steps=100 (got {cut(override)!r})"
        )
    try:
        parsed = read_yaml(value, f"--set {key}")
    except RecipeError as error:
        if "not YAML" in str(error):
            raise RecipeError(f"--set {key}: {cut(value)!r} is not a YAML value") from None
        raise
    target: Any = content
    *path, last = key.split(".")
    if BY_GROUP in path:
        start = path.index(BY_GROUP) + 1
        path, last = path[:start], ".".join([*path[start:], last])
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
