"""Odd values, and trees of JSON or YAML with some of them inside."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 4.0, 0.5, -0.5, 1e308, 1e-320, float("inf"), float("nan"),
    10**30, -(10**30), 2**31, 2**63, 65536, "", " ", "4", "a", "a/b", "..", "ü" * 200, "a\0b",
    "a\nb", "=1+1", "\udce9", "x" * 5000, "${NOWHERE}", "~nobody/x", "/dev/zero", "none", "auto",
    "nowhere:make", "os:getcwd", [], [[]], [0], [1, 1], ["a"], [None], [10**30], [[[[1]]]], {},
    {"a": 1}, {1: 1}, {"steps": 3}, {"name": "none"}, {"": {"": {}}},
)  # fmt: skip
"""Values that stand in the place of valid ones."""


def odd(draw: random.Random) -> Any:
    """One of them, of its own."""
    return copy.deepcopy(draw.choice(ODD))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree, from outside to inside."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if _is_list(tree) else ()
    return [found for key, value in items for found in [(*path, key), *places(value, (*path, key))]]


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        tree = tree[key]
    return tree


def change(tree: Any, draw: random.Random) -> str:
    """Put an odd value into a tree, in place, or damage it otherwise; return what was done."""
    path = draw.choice(places(tree))
    parent, key = at(tree, path[:-1]), path[-1]
    named = ".".join(map(str, path))[:80]
    way = draw.choice(("replace", "replace", "replace", "remove", "scale", "move", "add"))
    value = parent[key]
    if way == "remove":
        del parent[key]
        return f"{named} removed"
    if way == "scale" and isinstance(value, (int, float)):
        parent[key] = value * draw.choice((-1, 0, 2, 3, 10, 1e6, 10**12))
    elif way == "move":
        parent[key] = copy.deepcopy(at(tree, draw.choice(places(tree))))
    elif way == "add" and isinstance(value, dict):
        value[draw.choice(("a", "name", "", 1, str(key)))] = odd(draw)
        return f"{named} with another key"
    elif way == "add" and _is_list(value):
        value.append(copy.deepcopy(draw.choice(value)) if value else odd(draw))
    else:
        parent[key] = odd(draw)
    return f"{named} = {ascii(parent[key])[:80]}"


def nudge(tree: Any, pool: Pool, draw: random.Random) -> str:
    """Give a value in a tree another that may be as good; return what was done.

    Args:
        pool: what stands in other trees, by key.
    """
    path = draw.choice(places(tree))
    parent, key = at(tree, path[:-1]), path[-1]
    value = parent[key]
    if isinstance(value, bool):
        parent[key] = not value
    elif isinstance(value, (int, float)) and draw.random() < 0.5:
        near = (value + 1, value - 1, 2 * value, value / 2, value * draw.random(), -value)
        parent[key] = draw.choice(near)
    elif isinstance(parent, dict) and draw.random() < 0.3:  # another key of the same mapping
        key = draw.choice([*pool])
        parent[key] = copy.deepcopy(draw.choice(pool[key]))
    elif key in pool:
        parent[key] = copy.deepcopy(draw.choice(pool[key]))
    return f"{'.'.join(map(str, (*path[:-1], key)))[:80]} = {ascii(parent[key])[:80]}"


Pool = dict[Any, list[Any]]


def pool_of(trees: Iterable[Any]) -> Pool:
    """All values of trees by the keys that they stand at."""
    pool: Pool = {}
    for tree in trees:
        for path in places(tree):
            pool.setdefault(path[-1], []).append(at(tree, path))
    return pool


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
