"""An operating point: the rate, width and encoding effort at which one codec codes an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class OperatingPoint:
    """One setting of a codec that has several; the empty point is that of a codec with one.

    Attributes:
        rate: level of a variable-rate codec, a position among its trained lambdas, 0 the lowest.
        width: width of a slimmable codec, 0 the widest.
        effort: level of a scalable encoder, 0 the first encoder alone.
        domain: domain of an adapted codec, 0 the source.
    """

    rate: float | None = None
    width: int | None = None
    effort: int | None = None
    domain: int | None = None

    def keywords(self) -> dict[str, Any]:
        """Return the point as keywords of `compress`, `evaluate`, `encode`."""
        level = self.rate if self.effort is None else self.effort
        found = {"level": level, "width": self.width, "domain": self.domain}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        return "-".join(f"{name}-{value:g}" for name, value in self.keywords().items())


EMPTY = OperatingPoint()
"""The point of a codec that has only one."""


class Choice:
    """One dimension of a codec's operating points: the values that it has, and the one that is set.

    Attributes:
        field: the field of `OperatingPoint` that holds its value.
        keywords: the keywords of `compress` and others that name a value.
        in_bitstream: whether a bitstream says which value it was written at.
        now: the value that is set; may be None where the codec itself, without the method, is one.
    """

    field: ClassVar[str]
    keywords: ClassVar[tuple[str, ...]]
    in_bitstream: ClassVar[bool] = True
    now: Any

    def resolve(self, *args: Any, **asked: Any) -> Any:
        """Return the value that these keywords ask for, or the default without any.

        Raises:
            RecipeError: the codec does not have it.
        """
        raise NotImplementedError

    def assign(self, value: Any) -> None:
        """Set a value that `resolve` returned."""
        self.now = value

    def points(self, between: int = 0) -> Sequence[Any]:
        """Return all values, for a continuous one with so many between each two trained ones."""
        raise NotImplementedError

    def name(self, value: Any) -> str:
        """Return how tables name a value."""
        raise NotImplementedError

    def write(self, value: Any) -> bytes:
        """Set a value, rounded to what a header can say, and return the bitstream's header; empty
        for a bitstream without one.
        """
        raise NotImplementedError

    def take(self, strings: list[Any], asked: Any = None) -> Any:
        """Remove the header from a bitstream's strings, set its value, and return it.

        Raises:
            FileError: not a header, or not the value asked for.
        """
        first = strings.pop(0) if strings else b""
        return self.read(first[0] if isinstance(first, list) and first else b"", asked)

    def read(self, header: bytes, asked: Any = None) -> Any:
        """Set the value that a header says, and return it.

        Raises:
            FileError: not a header, or not the value asked for.
        """
        raise NotImplementedError
