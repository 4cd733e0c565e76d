"""The rates of a variable-rate codec. A level is a position among the trained lambdas.

The bitstream holds it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nicprune.common.errors import FileError, RecipeError
from nicprune.methods.operating_point import Choice

STEPS = 65535
"""A level travels as a 16-bit number: 0 is the lowest trained rate, this the highest."""


class Levels(Choice):
    """Trained lambdas, increasing, and the level that is set now.

    A level between two trained ones stands for the lambda that lies as far between theirs, on a
    logarithmic scale.

    Attributes:
        now: levels in use, shape (1,), or one for each image of the batch, shape (B,).
    """

    field = "rate"
    keywords = ("level", "lmbda")
    now: Tensor

    def __init__(self, lambdas: Sequence[float]):
        self.lambdas = tuple(lambdas)
        self._logs = np.log(self.lambdas)
        self.now = torch.tensor([float(self.top)])

    def __len__(self) -> int:
        return len(self.lambdas)

    @property
    def top(self) -> int:
        """The highest level."""
        return len(self.lambdas) - 1

    def resolve(self, level: Any = None, lmbda: float | None = None) -> float:
        """Return the level that is asked for; the highest without either.

        Raises:
            RecipeError: both are given, or it lies outside what was trained.
        """
        if level is not None and lmbda is not None:
            raise RecipeError(f"give level or lmbda, not both (got {level:g} and {lmbda:g})")
        if lmbda is not None:
            if not self.lambdas[0] * (1 - 1e-9) <= lmbda <= self.lambdas[-1] * (1 + 1e-9):
                raise RecipeError(
                    f"lmbda {lmbda:g} lies outside what the codec was trained for:"
                    f" {self.lambdas[0]:g} to {self.lambdas[-1]:g}"
                )
            # A trained lambda is exactly its level, whatever the processor's logarithm rounds to.
            for trained, known in enumerate(self.lambdas):
                if math.isclose(
                    lmbda, known, rel_tol=1e-6
                ):  # also after float32, and as tables print it
                    return float(trained)
            return float(np.interp(math.log(lmbda), self._logs, np.arange(len(self))))
        if level is None:
            return float(self.top)
        if isinstance(level, str):
            raise RecipeError(
                f"a modulator's level is a number, 0 to {self.top} (got {level!r}); best is for"
                " scalable encoders"
            )
        if not 0 <= level <= self.top:
            reach = f"0 (lambda {self.lambdas[0]:g}) to {self.top} ({self.lambdas[-1]:g})"
            raise RecipeError(
                f"level {level:g} lies outside what the codec was trained for: {reach}"
            )
        return float(level)

    def lmbda(self, levels: Tensor) -> Tensor:
        """Return the lambda of each level."""
        logs = torch.as_tensor(self._logs, dtype=torch.float32, device=levels.device)
        below = levels.floor().clamp(0, max(self.top - 1, 0)).long()
        above = (below + 1).clamp(max=self.top)
        return torch.exp(torch.lerp(logs[below], logs[above], levels.float() - below))

    def assign(self, value: float) -> None:
        self.now = torch.tensor([value])

    def points(self, between: int = 0) -> list[float]:
        return [i / (between + 1) for i in range(self.top * (between + 1) + 1)]

    def name(self, value: float) -> str:
        return f"level {value:g}"

    def draw(self, count: int, device: torch.device | str = "cpu") -> None:
        """Draw a level for each image of a batch, spread evenly over all rates."""
        places = (torch.randperm(count) + torch.rand(count)) / count
        self.now = (places * self.top).to(device)

    def write(self, value: float) -> bytes:
        code = round(value / max(self.top, 1) * STEPS)
        self.assign(code / STEPS * self.top)
        return struct.pack(">H", code)

    def read(self, header: bytes, asked: Any = None) -> float:
        if not isinstance(header, bytes) or len(header) != 2:
            raise FileError(
                "this bitstream does not start with a rate: it is of another codec, or of this one"
                " without its modulator"
            )
        (code,) = struct.unpack(">H", header)
        level: float = code / STEPS * self.top
        self.assign(level)
        return level
