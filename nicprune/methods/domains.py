"""The domains of an adapted codec: the source, which is the codec as it was, and the target."""

from __future__ import annotations

from typing import Any, ClassVar

from nicprune.common.errors import FileError, RecipeError, closest
from nicprune.methods.widths import Widths

SOURCE, TARGET = 0, 1

SOURCE_NAME = "source"

HEADER = bytes([TARGET])
"""First string of a bitstream of the target domain. One of the source domain has no header: it is
the source codec's own.
"""


class Domains(Widths):
    """The domains of an adapted codec, 0 the source, 1 the target, and the one that is set.

    Attributes:
        names: of both.
    """

    field = "domain"
    keywords: ClassVar[tuple[str, ...]] = ("domain", "width")
    word = "domain"

    def __init__(self, target: str):
        super().__init__(2, [])
        self.names = (SOURCE_NAME, target)
        self.now = SOURCE

    def describe(self) -> str:
        return " and ".join(self.names)

    def name(self, value: int) -> str:
        return f"domain {self.names[value]}"

    def resolve(self, width: Any = None, domain: Any = None) -> int | None:
        """Return the domain that is asked for, by name or number; the one that is set without."""
        asked = width if domain is None else domain
        if isinstance(asked, str):
            if asked not in self.names:
                raise RecipeError(
                    f"domain {asked!r} is not among those that the codec has:"
                    f" {self.describe()}; {closest(asked, self.names)}"
                )
            return self.names.index(asked)
        return super().resolve(asked)

    def write(self, value: int | None) -> bytes:
        self.now = value
        return HEADER if value == TARGET else b""

    def take(self, strings: list[Any], asked: Any = None) -> int:
        first = strings[0] if strings else None
        found = TARGET if isinstance(first, list) and first[:1] == [HEADER] else SOURCE
        if asked is not None and self.resolve(domain=asked) != found:
            raise FileError(f"this bitstream was written for the domain {self.names[found]}")
        if found == TARGET:
            strings.pop(0)
        self.now = found
        return found
