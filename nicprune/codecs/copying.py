"""Copies of codecs, of those too that keep activations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound=nn.Module)


def copy_codec(codec: T) -> T:
    """Return an independent copy of a codec.

    Results of a computation that a module keeps as attributes (`self.last_y = y`), which `deepcopy`
    refuses, are copied without their graph.
    """
    memo: dict[int, Any] = {}
    for module in codec.modules():
        for kept in _tensors(list(module.__dict__.values()), set()):
            if not kept.is_leaf:
                memo[id(kept)] = kept.detach().clone()
    return copy.deepcopy(codec, memo)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors in an attribute, however deep in containers and plain objects; not those of
    modules.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, nn.Module) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    else:
        inner = list(getattr(value, "__dict__", {}).values()) if not callable(value) else []
    for item in inner:
        yield from _tensors(item, seen)
