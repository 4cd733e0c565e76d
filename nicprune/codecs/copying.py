"""Copies of codecs, of those too that keep activations."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nicprune.codecs.float64_types import as_precise, to_precision
from nicprune.common.errors import CodecError, first_line

T = TypeVar("T", bound=nn.Module)


def copy_codec(codec: T) -> T:
    """Return an independent copy of a codec.

    Results of a computation that a module keeps as attributes (`self.last_y = y`), which `deepcopy`
    refuses, are copied without their graph.
    """
    return _copied(codec, _without_graphs(codec))


def double_copy(codec: T) -> T:
    """Return an independent copy of a codec in float64, on the CPU, in evaluation mode. Complex
    values are in complex128.
    """
    memo = _without_graphs(codec)
    for parameter in codec.parameters():
        value = parameter.detach().to("cpu", as_precise(torch.float64, parameter), copy=True)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    return to_precision(torch.float64, _copied(codec, memo).cpu()).eval()


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
    return _copied(codec, memo)


def _copied(codec: T, memo: dict[int, Any]) -> T:
    """Return a deep copy. What cannot be copied (locks, open files, scripted functions) is shared.

    Raises:
        CodecError: it cannot be copied all the same.
    """
    try:
        return copy.deepcopy(codec, dict(memo))
    except Exception:  # a foreign attribute's own code may raise anything
        modules = list(codec.modules())
        shared = memo | {id(module): module for module in modules}
        for module in modules:
            for value in module.__dict__.values():
                _share_uncopyable(value, shared, set())
        for module in modules:
            del shared[id(module)]
        try:
            return copy.deepcopy(codec, shared)
        except Exception as error:
            raise CodecError(
                f"{type(codec).__name__} cannot be copied: {first_line(error)}"
            ) from None


def _share_uncopyable(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Enter into a memo, as their own copies, the innermost parts of a value that have none."""
    if id(value) in seen or isinstance(value, Tensor):
        return
    seen.add(id(value))
    try:
        copy.deepcopy(value, dict(memo))
        return
    except Exception:
        before = len(memo)
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    else:
        own = {} if isinstance(value, ModuleType) else getattr(value, "__dict__", {})
        inner = list(own.values())
    for item in inner:
        _share_uncopyable(item, memo, seen)
    if len(memo) == before:
        memo[id(value)] = value


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
    if isinstance(value, (nn.Module, ModuleType)) or id(value) in seen:
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
