"""Operating points of any codec, with methods attached or plain."""

from __future__ import annotations

from typing import Any

from torch import nn

from nicprune.methods.composition import Attached, refuse_keywords
from nicprune.methods.operating_point import EMPTY, OperatingPoint


def resolve_point(codec: nn.Module, **asked: Any) -> OperatingPoint:
    """Return the operating point of any codec that level, lmbda and width ask for.

    Raises:
        RecipeError: the codec does not have it.
    """
    if isinstance(codec, Attached):
        return codec.point(**asked)
    refuse_keywords({name: value for name, value in asked.items() if value is not None})
    return EMPTY


def operating_points(codec: nn.Module, between: int = 0) -> list[OperatingPoint]:
    """Return all operating points of any codec: one empty point for a plain one."""
    return codec.operating_points(between) if isinstance(codec, Attached) else [EMPTY]


def first_point(codec: nn.Module, asked: OperatingPoint = EMPTY) -> OperatingPoint:
    """Return the operating point at which a codec is tried before it codes: the first, in the
    domain that is asked for, whose arithmetic is its own.
    """
    points = operating_points(codec)
    return next((point for point in points if point.domain == asked.domain), points[0])
