"""The widths of a slimmable codec. The bitstream holds the width in one byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from nicprune.common.errors import FileError, RecipeError
from nicprune.methods.operating_point import Choice


class Widths(Choice):
    """The widths that a codec has, 0 the widest, and the one that is set.

    Attributes:
        word: how messages and tables call a width.
        fractions: the widths as they were asked for, widest first.
    """

    field = "width"
    keywords: ClassVar[tuple[str, ...]] = ("width",)
    word = "width"
    now: int | None

    def __init__(self, count: int, fractions: Sequence[float]):
        self.count, self.fractions = count, tuple(fractions)
        self.now = 0

    def __len__(self) -> int:
        return self.count

    def describe(self) -> str:
        """Return the list of widths, for messages."""
        return ", ".join(f"{i} ({fraction:g})" for i, fraction in enumerate(self.fractions))

    def name(self, value: int) -> str:
        return f"{self.word} {value}"

    def resolve(self, width: Any = None) -> int | None:
        """Return the width that is asked for; the one that is set without."""
        if width is None:
            return self.now
        if not isinstance(width, int) or not 0 <= width < self.count:
            raise RecipeError(
                f"{self.word} {width!r} is not among those that the codec has: {self.describe()}"
            )
        return width

    def points(self, between: int = 0) -> range:
        return range(self.count)

    def write(self, value: int | None) -> bytes:
        self.now = value
        return bytes([value or 0])

    def read(self, header: bytes, asked: int | None = None) -> int:
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
        if asked is not None and asked != header[0]:
            raise FileError(
                f"this bitstream was written at width {header[0]}, and is to be read at width"
                f" {asked}: read it at its own, or leave the width out"
            )
        self.now = header[0]
        return header[0]
