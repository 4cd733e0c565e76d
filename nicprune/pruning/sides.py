"""The sides, encoding and decoding, on which layers run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from nicprune.codecs.anatomy import sides_of, transform_of
from nicprune.codecs.cdf import update_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import example_image
from nicprune.codecs.hooks import without_hooks


def sides_of_modules(codec: nn.Module, names: Iterable[str]) -> dict[str, tuple[bool, bool]]:
    """Return for each module whether it runs when encoding, and when decoding.

    Modules of CompressAI's transforms are known by name. For others the codec codes an image and is
    watched; those that it calls on neither side, or all of them if it cannot code, count on both.
    """
    found = {name: sides_of(transform_of(name)) for name in names}
    unknown = [name for name in found if name and transform_of(name) == "other"]
    if unknown and (seen := _watch(codec, unknown)) is not None:
        for name in unknown:
            if name in seen[0] | seen[1]:
                found[name] = name in seen[0], name in seen[1]
    return found


def _watch(codec: Any, names: Iterable[str]) -> tuple[set[str], set[str]] | None:
    """Return the modules among those named that `compress` and `decompress` call."""
    if not (hasattr(codec, "compress") and hasattr(codec, "decompress")):
        return None
    calls: tuple[set[str], set[str]] = set(), set()
    side = calls[0]

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: side.add(name)

    with torch.no_grad(), torch.random.fork_rng(devices=[]), without_hooks(codec):
        image = example_image(codec).cpu().float()
        double = copy_codec(codec).cpu().float().eval()
    modules = dict(double.named_modules())
    for name in names:
        if name in modules:
            modules[name].register_forward_pre_hook(note(name))
    try:
        with torch.no_grad():
            update_tables(double)
            sent = double.compress(image)
            side = calls[1]
            double.decompress(sent["strings"], sent["shape"])
    except Exception:  # a foreign codec's own code may raise anything; it is tried elsewhere
        return None
    return calls
