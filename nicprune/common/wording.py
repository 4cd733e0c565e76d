"""Wording of messages."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "1,024 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
