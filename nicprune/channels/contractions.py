"""Matrix products as letters: `ij,jk->ik` says which dimensions meet and which are left."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def letters_of_matmul(first: Tensor, second: Tensor) -> tuple[str, str, str] | None:
    """Return the letters of both operands and of the result of `first @ second`."""
    if first.dim() < 2 or second.dim() < 2:
        return None
    batch = string.ascii_uppercase[: max(first.dim(), second.dim()) - 2]
    own = [batch[len(batch) - (t.dim() - 2) :] for t in (first, second)]
    return f"{own[0]}mk", f"{own[1]}kn", f"{batch}mn"


def letters_of_einsum(args: Sequence[Any]) -> tuple[str, str, str] | None:
    """Return the letters of an einsum of two operands, None where it has another form."""
    if not args or not isinstance(args[0], str):
        return None
    given, arrow, result = args[0].replace(" ", "").partition("->")
    parts = given.split(",")
    if not arrow or len(parts) != 2 or "." in given:
        return None
    if any(len(set(part)) < len(part) for part in parts):
        return None
    return parts[0], parts[1], result


def macs_of(letters: tuple[str, str, str], first: Tensor, second: Tensor) -> int:
    """Return the multiply-adds of a product: the product of the sizes of all letters."""
    sizes: dict[str, int] = {}
    for part, operand in zip(letters, (first, second), strict=False):
        for letter, size in zip(part, operand.shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), int(size))
    total = 1
    for size in sizes.values():
        total *= size
    return total
