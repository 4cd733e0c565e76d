"""One input and what came of it."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from typing import Any, Protocol


class Verdict(enum.StrEnum):
    """What came of an input. All but the first two are faults."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    UNCLEAR = "unclear"
    """Refused in several lines, or in a line that is too long to be read."""
    BELIEVED = "accepted though damaged"
    SLOW = "slow"
    LARGE = "large"
    CRASHED = "crashed"
    """Any other error than nicprune's own, or the end of the process."""


FINE = (Verdict.ACCEPTED, Verdict.REFUSED)


class Believed(Exception):
    """A damaged input was taken for a whole one."""


class Kind(Protocol):
    """A kind of input; an instance is made in each process, in an empty working folder."""

    lines: int
    """How many lines a refusal may have: one, unless it lists all that is missing."""

    def make(self, draw: random.Random) -> tuple[str, Any]:
        """Return an input, and what was done to it in words."""

    def use(self, given: Any) -> None:
        """Do with an input what nicprune does with one of its kind.

        Raises:
            NicpruneError: it is refused.
            Believed: it is damaged, and was accepted all the same.
        """


@dataclass(frozen=True)
class Trial:
    """An input by its number, what was done to it, and what came of it."""

    number: int
    what: str
    verdict: Verdict
    message: str = ""
    """Of the error, or of the process."""
