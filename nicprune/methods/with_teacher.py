"""Attach distillation beside a codec's methods for a phase of training, and detach it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from nicprune.methods.attaching import attach
from nicprune.methods.compatibility import check_combination
from nicprune.methods.composition import Attached
from nicprune.methods.contract import METHODS, Method


def teaching(
    settings: Sequence[tuple[str, Mapping[str, Any]]],
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return those of (name, settings) that only help to train."""
    return [(name, own) for name, own in settings if METHODS[name].for_training_only]


def taught(
    model: nn.Module, settings: Sequence[tuple[str, Mapping[str, Any]]], teacher: nn.Module
) -> nn.Module:
    """Return the model with these methods attached as well; the model itself if there are none. A
    method that is on it already gets the teacher, too, if it can use one.

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
    check_combination([type(method) for method in before] + [METHODS[name] for name, _ in settings])
    model.detach()  # for the moment: attach needs a plain codec
    try:
        added = attach(model.codec, settings, teacher=teacher)
    except BaseException:  # one that has no memory left, too
        model.attach_again()
        model.in_mode(model.training)
        raise
    after = cast("list[Method]", list(added.methods))
    both = Attached(model.codec, [*before, *after], model.groups, model.cost)
    added.detach()
    both.attach_again()
    return both.in_mode(model.training)


def untaught(model: nn.Module) -> nn.Module:
    """Return the trained model that `taught` was given: a plain codec where nothing else is
    attached.
    """
    if not isinstance(model, Attached):
        return model
    every = cast("list[Method]", list(model.methods))
    left = [method for method in every if not method.for_training_only]
    if len(left) == len(every):
        return model
    codec = model.detach()
    if not left:
        return codec
    rest = Attached(codec, left, model.groups, model.cost)
    rest.attach_again()
    return rest.in_mode(model.training)
