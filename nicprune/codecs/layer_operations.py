"""Operations on layers whatever their kind: remove channels, make them zero, resize."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import LayerKind, kind_of, nearest_kind
from nicprune.common.errors import SurgeryError


def remove(layer: Any, axis: str, removed: Sequence[int], kind: LayerKind | None = None) -> None:
    """Remove channels of one axis ("out", "in" or "both") from a layer, in place; requires_grad
    stays as it was.

    Args:
        kind: what the layer was before anything was removed, where axes go one after the other.

    Raises:
        SurgeryError: no channels can be removed from a layer of this type.
    """
    kind = kind if kind is not None else kind_of(layer)
    if kind is None or not kind.has_channels:
        raise SurgeryError(f"no channels can be removed from a {type(layer).__name__}")
    needs_grad = {name: p.requires_grad for name, p in layer.named_parameters()}
    kind.remove(layer, axis, removed)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(needs_grad[name])


def zero(layer: Any, axis: str, channels: Sequence[int]) -> None:
    """Make channels of a producer zero, in place: its rows and bias, or a bottleneck's medians.
    Other layers stay as they are.
    """
    kind = kind_of(layer)
    if kind is not None and kind.masked(axis):
        with torch.no_grad():
            kind.zero(layer, torch.as_tensor(list(channels), dtype=torch.long))


def resize(codec: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give every layer of `codec` the shapes that `state` has for it, in place; values are left to
    load_state_dict.
    """
    for prefix, module in codec.named_modules():
        dot = f"{prefix}." if prefix else ""
        kind = nearest_kind(module)  # of what it is before its shapes change
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = state.get(dot + name)
            if value is not None and value.shape != parameter.shape:
                fresh = nn.Parameter(
                    parameter.new_empty(value.shape), requires_grad=parameter.requires_grad
                )
                if isinstance(module, nn.ParameterList):
                    module[int(name)] = fresh
                else:
                    setattr(module, name, fresh)
        for name, buffer in list(module.named_buffers(recurse=False)):
            value = state.get(dot + name)
            if value is not None and value.shape != buffer.shape:
                setattr(module, name, buffer.new_empty(value.shape))
        if kind is not None:
            kind.follow_shapes(module)
