"""Attributes in which somebody's own modules repeat a width: numbers of heads, sizes of parts.

Tracing sees what code does to channels, not where it has its numbers from. Where a group cannot
shrink since code holds to its width, the numbers beside its layers that may be that width are
followed, and it is tried whether the pruned codec is the masked one then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from torch import nn

from nicprune.channels.groups import Attribute, Group, Groups
from nicprune.codecs.trusted import of_a_library

FOLLOWED = "_nicprune_attributes"
"""Name of the attribute on a pruned codec that keeps what was set, by dotted name."""

MOST = 12
"""Sets of attributes that are tried for a group."""


def candidates(codec: nn.Module, group: Group) -> list[Attribute]:
    """Return the whole numbers of modules around a group's layers that are multiples of its
    width.
    """
    modules = dict(codec.named_modules())
    around: dict[str, None] = {}
    for member in group.members:
        parent = member.module.rpartition(".")[0]
        around |= dict.fromkeys((parent, parent.rpartition(".")[0]))
    found = []
    for name in around:
        module = modules.get(name)
        if not name or module is None or of_a_library(type(module)):
            continue
        for key, value in module.__dict__.items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if whole and not key.startswith("_") and value % group.width == 0:
                found.append(Attribute(name, key, value // group.width))
    return found


def _sets(found: Sequence[Attribute]) -> Iterator[tuple[Attribute, ...]]:
    """Return sets of attributes: all of them, then each, then each two, and so on."""
    yield tuple(found)
    for count in range(1, len(found)):
        yield from combinations(found, count)


def likeness(codec: nn.Module, group: Group, around: Sequence[Attribute]) -> object:
    """Return what groups have in common whose layers are those of modules of the same classes."""
    first = group.members[0]
    layer = first.module.rpartition(".")[2]
    classes = {(type(codec.get_submodule(a.module)), a.name, a.times) for a in around}
    start = int(first.index.min())
    return layer, first.axis, start, group.width, len(group.members), frozenset(classes)


def find_attributes(
    around: Sequence[Attribute], holds: Callable[[Sequence[Attribute]], bool]
) -> tuple[Attribute, ...]:
    """Return those of a group's candidates with which it can shrink, none if there are no such.

    Args:
        holds: tries whether the codec, pruned with these attributes followed, is the masked one.
    """
    tried = (chosen for _, chosen in zip(range(MOST), _sets(around), strict=False))
    return next((chosen for chosen in tried if holds(chosen)), ())


def values_under(
    codec: nn.Module, groups: Groups, keep: Mapping[str, Sequence[int] | np.ndarray]
) -> dict[str, dict[str, int]]:
    """Return what followed attributes become under keep-lists, by module."""
    found: dict[str, dict[str, int]] = {}
    for name, kept in keep.items():
        group = groups[name]
        for attribute in group.attributes:
            values = found.setdefault(attribute.module, {})
            module = codec.get_submodule(attribute.module)
            now = values.get(attribute.name, getattr(module, attribute.name))
            values[attribute.name] = now - attribute.times * (group.width - len(kept))
    return found


def set_attributes(codec: nn.Module, values: Mapping[str, Mapping[str, int]]) -> None:
    """Set attributes of modules, and note on the codec that they have been set.

    Raises:
        ValueError: the codec has no such whole number.
    """
    noted = {name: dict(known) for name, known in noted_attributes(codec).items()}
    for name, given in values.items():
        module: Any = codec.get_submodule(name)
        for key, value in given.items():
            if type(module.__dict__.get(key)) is not int or type(value) is not int:
                raise ValueError(f"{name} has no whole number {key}")
            setattr(module, key, value)
            noted.setdefault(name, {})[key] = value
    if noted:
        codec.__dict__[FOLLOWED] = noted


def noted_attributes(codec: nn.Module) -> dict[str, dict[str, int]]:
    """Return the attributes that pruning has set on a codec, by module."""
    found: dict[str, dict[str, int]] = codec.__dict__.get(FOLLOWED, {})
    return found
