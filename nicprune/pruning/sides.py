"""The sides, encoding and decoding, on which layers run."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nicprune.codecs.anatomy import sides_of, transform_of
from nicprune.codecs.roles import calls_of


def sides_of_modules(codec: nn.Module, names: Iterable[str]) -> dict[str, tuple[bool, bool]]:
    """Return for each module whether it runs when encoding, and when decoding.

    Modules of CompressAI's transforms are known by name. For others the codec codes an image and is
    watched; those that it calls on neither side, or all of them if it cannot code, count on both.
    """
    found = {name: sides_of(transform_of(name)) for name in names}
    unknown = [name for name in found if name and transform_of(name) == "other"]
    if unknown and (seen := calls_of(codec)) is not None:
        for name in unknown:
            if name in seen[0] | seen[1]:
                found[name] = name in seen[0], name in seen[1]
    return found
