"""A teacher's help for what is being trained: put beside whatever is attached, and taken
off again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from nicprune.common.errors import NicpruneError, RecipeError
from nicprune.methods.composition import Attached, attach
from nicprune.methods.contract import METHODS, Method


def teaching(
    settings: Sequence[tuple[str, Mapping[str, Any]]],
) -> list[tuple[str, Mapping[str, Any]]]:
    """Those of (name, settings) that only help to train."""
    return [(name, own) for name, own in settings if METHODS[name].teaches]


def taught(
    model: nn.Module, settings: Sequence[tuple[str, Mapping[str, Any]]], teacher: nn.Module
) -> nn.Module:
    """A codec, or one with gates on it, with these attached to it as well; the model itself if
    there are none. What is on it learns from the teacher, too, if it can.

    Args:
        teacher: the codec that it was pruned from.

    Raises:
        RecipeError: they do not go with what is attached; the model stays as it was.
    """
    if isinstance(model, Attached):
        model.set_teacher(teacher)
    if not settings:
        return model
    if not isinstance(model, Attached):
        return attach(model, settings, teacher=teacher)
    before = cast("list[Method]", list(model.methods))
    modulators = [method.name for method in before if method.modulates]
    if modulators:
        raise RecipeError(
            f"a teacher codes at one rate, {modulators[0]} at many: leave one of them out"
        )
    model.detach()  # the hooks, for the moment: what is attached next must find a plain codec
    try:
        added = attach(model.codec, settings, teacher=teacher)
    except NicpruneError:
        model.hang()
        raise
    after = cast("list[Method]", list(added.methods))
    both = Attached(model.codec, [*before, *after], model.groups, model.cost).train(model.training)
    added.detach()
    both.hang()
    return both


def untaught(model: nn.Module) -> nn.Module:
    """What `taught` was given, trained: a plain codec where nothing else is attached."""
    if not isinstance(model, Attached) or not any(
        method.teaches for method in cast("list[Method]", list(model.methods))
    ):
        return model
    left = [method for method in cast("list[Method]", list(model.methods)) if not method.teaches]
    codec = model.detach()
    if not left:
        return codec
    rest = Attached(codec, left, model.groups, model.cost).train(model.training)
    rest.hang()
    return rest
