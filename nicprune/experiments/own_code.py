"""Hashes of a user's own code that a run depends on: the codec of a factory, and methods of other
packages. They are part of a run's key, so that numbers of earlier code do not count as done.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.zoo import build_from_path
from nicprune.common.source_code import OWN, source_digests
from nicprune.experiments.recipe import Recipe, Variant
from nicprune.methods.contract import METHODS


def codec_digest(recipe: Recipe, quality: int) -> list[Any]:
    """Return what identifies the codec of `package.module:factory`: its code, and what it builds.
    Empty for codecs by name, whose code is this package's and CompressAI's, and for files.

    Raises:
        CodecError: the factory cannot be imported, or fails.
    """
    if not recipe.imports:
        return []
    # Neither is enough. Layers and widths are alike where `forward` was changed; code is alike
    # where the factory reads widths or weights from a file. Random weights must not count: they
    # differ by rounding between processors. They are those that differ between two seeds.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = build_from_path(recipe.codec, quality)
        first = _description(codec)
        torch.manual_seed(1)
        second = _description(build_from_path(recipe.codec, quality))
    classes = {base for module in codec.modules() for base in type(module).__mro__}
    modules = [recipe.codec.partition(":")[0], *sorted({c.__module__ for c in classes})]
    constant = sorted((k, v if second.get(k) == v else "") for k, v in first.items())
    return [source_digests(modules), constant]


def method_digests(arm: Variant) -> list[Any]:
    """Return what identifies the code of an arm's methods that are of other packages than this."""
    found = []
    for part in arm.stack:
        modules = [base.__module__ for base in METHODS[part.name].__mro__]
        if modules[0].partition(".")[0] != OWN:
            found.append(source_digests(modules))
    return found


def _description(codec: nn.Module) -> dict[str, str]:
    """Return classes, plain attributes (strides, slopes, ...), shapes and values of a codec."""
    found = {}
    for name, module in codec.named_modules():
        found[f"{name} class"] = f"{type(module).__module__}.{type(module).__qualname__}"
        for key, value in vars(module).items():
            if not key.startswith("_") and _is_plain(value):
                found[f"{name}.{key}"] = repr(value)
    for key, value in codec.state_dict().items():
        if isinstance(value, Tensor):
            found[f"{key} shape"] = f"{value.dtype} {tuple(value.shape)}"
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            found[f"{key} values"] = hashlib.blake2b(raw.tobytes()).hexdigest()[:32]
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, (bool, int, float, str))
