"""Copies of codecs, of those too that keep activations."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", bound=nn.Module)


def copy_codec(codec: T) -> T:
    """Return an independent copy of a codec.

    Results of a computation that a module keeps as attributes (`self.last_y = y`), which `deepcopy`
    refuses, are copied without their graph.
    """
    return copy.deepcopy(codec, _without_graphs(codec))


def double_copy(codec: T) -> T:
    """Return an independent copy of a codec in float64, on the CPU, in evaluation mode."""
    memo = _without_graphs(codec)
    for parameter in codec.parameters():
        dtype = torch.float64 if parameter.is_floating_point() else parameter.dtype
        value = parameter.detach().to("cpu", dtype, copy=True)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return copy.deepcopy(codec, memo).cpu().double().eval()


def sharing_copy(codec: T, apart: Collection[Tensor] = ()) -> T:
    """Return a copy of a codec whose parameters are the codec's own memory: to replace some of
    them, at the cost of those alone.

    Args:
        apart: parameters that are copied all the same, to write to.
    """
    memo, copied = _without_graphs(codec), {id(parameter) for parameter in apart}
    for parameter in codec.parameters():
        value = parameter.detach()
        value = value.clone() if id(parameter) in copied else value
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return copy.deepcopy(codec, memo)


def _without_graphs(codec: nn.Module) -> dict[int, Any]:
    """Return the memo of a deep copy that takes results of a computation without their graph."""
    memo: dict[int, Any] = {}
    for module in codec.modules():
        for value in module.__dict__.values():
            if type(value) in (dict, OrderedDict) and not value:  # of hooks: most of what there is
                memo[id(value)] = type(value)()
        own = [v for key, v in module.__dict__.items() if key not in WITHOUT]
        for kept in _tensors(own, set()):
            if not kept.is_leaf:
                memo[id(kept)] = kept.detach().clone()
    return memo


WITHOUT = ("_parameters", "_modules", "_nicprune_groups")
"""Attributes of a module without results of a computation: parameters are leaves, modules are seen
one by one.
"""


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
