"""The rates of a codec that has many: a level is a position among the trained lambdas, and travels
with the bitstream.
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

STEPS = 65535
"""A level travels as a 16-bit number: 0 is the lowest trained rate, this the highest."""


class Levels:
    """Trained lambdas, increasing, and the level that is set now.

    A level between two trained ones stands for the lambda that lies as far between theirs, on a
    logarithmic scale.

    Attributes:
        now: levels in use, shape (1,), or one for each image of the batch, shape (B,).
    """

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

    def resolve(self, level: float | None = None, lmbda: float | None = None) -> float:
        """The level that was asked for; the highest without either.

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
        """The lambda of each level."""
        logs = torch.as_tensor(self._logs, dtype=torch.float32, device=levels.device)
        below = levels.floor().clamp(0, max(self.top - 1, 0)).long()
        above = (below + 1).clamp(max=self.top)
        return torch.exp(torch.lerp(logs[below], logs[above], levels.float() - below))

    def set(self, level: float | None = None, lmbda: float | None = None) -> float:
        """Set the level of what comes next, for all images alike; return it."""
        found = self.resolve(level, lmbda)
        self.now = torch.tensor([found])
        return found

    def draw(self, count: int, device: torch.device | str = "cpu") -> None:
        """Draw a level for each image of a batch, spread evenly over all rates."""
        places = (torch.randperm(count) + torch.rand(count)) / count
        self.now = (places * self.top).to(device)

    def write(self, level: float | None = None, lmbda: float | None = None) -> bytes:
        """Set the level, as near as a header can say it, and return the header."""
        code = round(self.resolve(level, lmbda) / max(self.top, 1) * STEPS)
        self.set(code / STEPS * self.top)
        return struct.pack(">H", code)

    def read(self, header: bytes) -> float:
        """Set the level that a header says; return it.

        Raises:
            FileError: not a header.
        """
        if not isinstance(header, bytes) or len(header) != 2:
            raise FileError(
                "this bitstream does not start with a rate: it is of another codec, or of this one"
                " without its modulator"
            )
        (code,) = struct.unpack(">H", header)
        return self.set(code / STEPS * self.top)


class Widths:
    """Which of a slimmable codec's widths is set; it travels with the bitstream as one byte.

    Attributes:
        word: what a width is called; `travels`: whether decoding must know it.
        shares: what the widths were asked for as, widest first.
        now: the width that is set, 0 for the widest.
    """

    word = "width"
    travels = True

    def __init__(self, count: int, shares: Sequence[float]):
        self.count, self.shares = count, tuple(shares)
        self.now: int | None = 0

    def __len__(self) -> int:
        return self.count

    def told(self) -> str:
        """What there is, for a message."""
        return ", ".join(f"{i} ({share:g})" for i, share in enumerate(self.shares))

    def name(self, width: int) -> str:
        """What a table calls a width."""
        return f"{self.word} {width}"

    def set(self, width: Any) -> int | None:
        """Set the width of what comes next; None leaves it.

        Raises:
            RecipeError: the codec has no such width.
        """
        if width is not None:
            if not isinstance(width, int) or not 0 <= width < self.count:
                raise RecipeError(
                    f"{self.word} {width!r} is not among those that the codec has: {self.told()}"
                )
            self.now = width
        return self.now

    def write(self, width: int | None) -> bytes:
        """Set the width and return its header."""
        return bytes([self.set(width) or 0])

    def read(self, header: bytes, width: int | None = None) -> int:
        """Set the width that a header says; return it.

        Raises:
            FileError: not a header, a width that the codec does not have, or not the one asked for.
        """
        if not isinstance(header, bytes) or len(header) != 1:
            raise FileError(
                "this bitstream does not start with a width: it is of another codec, or of one"
                " width of this one on its own"
            )
        if header[0] >= self.count:
            raise FileError(
                f"this bitstream was written at width {header[0]}; this codec has widths 0 to"
                f" {self.count - 1}"
            )
        if width is not None and width != header[0]:
            raise FileError(
                f"this bitstream was written at width {header[0]}, and is to be read at width"
                f" {width}: read it at its own, or leave the width out"
            )
        self.set(header[0])
        return header[0]
