"""Sizes that know where they come from: `x.shape[1] // 2` is half a width, `2` is a number."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np


class Width(int):
    """The number of channels of a tensor, or a multiple or part of it. It follows pruning where
    code computes with it.

    Attributes:
        ids: numbers of the channels that it counts.
        scale: what part of them it is.
    """

    ids: np.ndarray
    scale: Fraction

    def __new__(cls, value: int, ids: np.ndarray, scale: Fraction | int = 1) -> Width:
        made = super().__new__(cls, value)
        made.ids, made.scale = ids, Fraction(scale)
        return made

    def __hash__(self) -> int:
        # Caches by shape, as einops has, must not give back plain numbers for it.
        return hash((int(self), id(self.ids)))

    def __eq__(self, other: object) -> bool:
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        return int(self) != other

    def __floordiv__(self, other: Any) -> int:
        found = int(self) // other
        if isinstance(other, Width) or not isinstance(other, int) or int(self) % other:
            return found
        return Width(found, self.ids, self.scale / other)

    def __mul__(self, other: Any) -> Any:
        found = int(self) * other
        if isinstance(other, Width) or not isinstance(other, int) or other <= 0:
            return found
        return Width(found, self.ids, self.scale * other)

    __rmul__ = __mul__

    def __reduce__(self) -> Any:
        return int, (int(self),)
