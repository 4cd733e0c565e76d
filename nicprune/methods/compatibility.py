"""Combinations of methods on one codec: which are refused, and why."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from nicprune.channels.groups import Norms
from nicprune.common.errors import RecipeError
from nicprune.methods.contract import METHODS, Method, Pruner, parse_settings


def check_combination(classes: Sequence[type[Method]]) -> None:
    """Raise RecipeError if the methods declare that they do not go together."""
    for first, cls in enumerate(classes):
        for second, other in enumerate(classes):
            names = {other.name, *(base.__name__ for base in other.__mro__)}
            for excluded, reason in cls.exclusive.items():
                if first != second and excluded in names and not names & cls.goes_with:
                    raise RecipeError(f"{cls.name} and {other.name} do not go together: {reason}")


def parsed_methods(
    wanted: Sequence[tuple[str, Mapping[str, Any]]],
) -> list[tuple[type[Method], Any]]:
    """Return the classes of methods and their settings, validated.

    Raises:
        RecipeError: a method or a setting is unknown, a value out of range, or two methods do not
            go together.
    """
    # Before the settings, which may be refused because of a method that cannot be there at all.
    check_combination([METHODS[name] for name, _ in wanted])
    return [
        (METHODS[name], parse_settings(name, settings, f"method {name!r}", wanted))
        for name, settings in wanted
    ]


def check_disjoint(pruners: Sequence[Pruner]) -> None:
    """Raise RecipeError if two methods decide the width of the same groups: each would choose
    channels by its own budget, and what both keep is far less than either asks for.
    """
    for first, second in itertools.combinations(pruners, 2):
        both = first.shrinks() & second.shrinks() if first.codec is second.codec else set()
        if both:
            raise RecipeError(
                f"{first.name} and {second.name} would both choose channels of"
                f" {first.groups.noun} {min(both)}, and little would be left: give them different"
                " groups by side or only, or prune by one, harden, then by the other"
            )


def norms_of(parsed: Sequence[tuple[type[Method], Any]]) -> Norms:
    """Return what becomes of channels that a norm computes over.

    Raises:
        RecipeError: the methods differ.
    """
    given = {cls.name: settings.norms for cls, settings in parsed if hasattr(settings, "norms")}
    found: set[Norms] = set(given.values())
    if len(found) > 1:
        lacking = [name for name, norms in given.items() if norms != "adapt"]
        raise RecipeError(
            f"norms: adapt is of the whole codec: give it to {' and '.join(lacking)} too, or to"
            " none of them"
        )
    return found.pop() if found else "pinned"
