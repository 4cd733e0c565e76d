"""Find by trials which of several things fail."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """A trial that failed.

    Attributes:
        reason: why.
        suspects: names that are likely to be at fault; none if nothing points to any.
    """

    reason: str
    suspects: Collection[str] = ()


def find_failing(
    names: Sequence[str], trial: Callable[[Sequence[str]], Failure | None]
) -> dict[str, str]:
    """Return those of the names that fail, and why; nothing if they pass together.

    Suspects are tried apart from the others, and by halves where there are none. What fails only
    together all counts: the suspects, or all of it. Others may still fail with what passed alone:
    try what is left again.

    Args:
        trial: tries some of the names at once; None if they pass.
    """
    failed = trial(names) if names else None
    if failed is None:
        return {}
    if len(names) == 1:
        return {names[0]: failed.reason}
    suspects = [name for name in names if name in failed.suspects]
    others = [name for name in names if name not in failed.suspects]
    half = len(names) // 2
    parts = (suspects, others) if suspects and others else (names[:half], names[half:])
    found: dict[str, str] = {}
    for part in parts:
        found |= find_failing(part, trial)
    return found or dict.fromkeys(suspects or names, failed.reason)
