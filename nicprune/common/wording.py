"""Wording of messages."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "1,024 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def numbered(names: Sequence[str]) -> list[str]:
    """Return names that are unique: the second "mask_decay" is "mask_decay 2"."""
    found: list[str] = []
    for i, name in enumerate(names):
        before = list(names[:i]).count(name)
        found.append(f"{name} {before + 1}" if before else name)
    return found
