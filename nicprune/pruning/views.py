"""A codec that computes with some of its channels: the parameters stay whole, layers are given
views of the part that counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nicprune.channels.groups import Groups, kept_channels
from nicprune.codecs.anatomy import is_bottleneck

Index = slice | Tensor | None
"""Which channels along one axis: the first n (a view), any (a copy), or None for all."""


def index_of(kept: np.ndarray, width: int) -> Index:
    """The cheapest index for channels that stay, sorted or not."""
    if np.array_equal(kept, np.arange(len(kept))):
        return None if len(kept) == width else slice(0, len(kept))
    return torch.from_numpy(np.ascontiguousarray(kept))


def take(x: Tensor, dim: int, index: Index) -> Tensor:
    """These channels of a tensor along one axis."""
    if index is None:
        return x
    return (
        x.narrow(dim, 0, index.stop)
        if isinstance(index, slice)
        else x.index_select(dim, index.to(x.device))
    )


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer is a GDN of either kind."""
    return hasattr(layer, "gamma_reparam")


class Slices:
    """What each layer of a codec has left under keep-lists.

    Attributes:
        keep: the keep-lists.
        layers: (output, input) index of each layer that has less, by module name; for GDN and
            depthwise layers both are the same.
    """

    def __init__(self, codec: nn.Module, groups: Groups, keep: Mapping[str, Sequence[int]]):
        self.keep = {name: list(kept) for name, kept in keep.items()}
        modules = dict(codec.named_modules())
        self.layers: dict[str, tuple[Index, Index]] = {}
        for name in dict.fromkeys(m.module for group in self.keep for m in groups[group].members):
            layer: Any = modules[name]
            if is_bottleneck(layer):
                continue
            if is_norm(layer) or getattr(layer, "groups", 1) > 1:
                width = layer.beta.numel() if is_norm(layer) else layer.out_channels
                both = index_of(kept_channels(groups, self.keep, name, "both", width), width)
                found = (both, both)
            else:
                widths = (
                    (layer.out_features, layer.in_features)
                    if isinstance(layer, nn.Linear)
                    else (layer.out_channels, layer.in_channels)
                )
                found = tuple(
                    index_of(kept_channels(groups, self.keep, name, axis, w), w)
                    for axis, w in zip(("out", "in"), widths, strict=True)
                )  # type: ignore[assignment]
            if found != (None, None):
                self.layers[name] = found

    def sliced_parameters(self, name: str, layer: Any) -> dict[str, Any]:
        """The attributes of a layer as it is when it has these channels alone."""
        out, inn = self.layers[name]
        if is_norm(layer):
            return {
                "gamma": take(take(layer.gamma, 0, out), 1, inn),
                "beta": take(layer.beta, 0, out),
            }
        depthwise = getattr(layer, "groups", 1) > 1
        rows = 1 if isinstance(layer, nn.ConvTranspose2d) and not depthwise else 0

        def cut(value: Tensor) -> Tensor:
            value = take(value, rows, out)
            return value if depthwise else take(value, 1 - rows, inn)

        found: dict[str, Any] = {"weight": cut(layer.weight)}
        if layer.bias is not None:
            found["bias"] = take(layer.bias, 0, out)
        if hasattr(layer, "mask"):
            found["mask"] = cut(layer.mask)
        if depthwise:
            found["groups"] = len(found["weight"])
        return found


@contextmanager
def override_attributes(
    attributes: Sequence[tuple[nn.Module, Mapping[str, Any]]],
) -> Iterator[None]:
    """Let these stand in front of modules' own attributes, parameters, buffers and sub-modules
    inside the block.
    """
    before: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = []
    try:
        for module, values in attributes:
            own = module.__dict__
            before.append((own, {name: own[name] for name in values if name in own}, list(values)))
            own.update(values)
        yield
    finally:
        for own, had, names in reversed(before):
            for name in names:
                own.pop(name, None)
            own.update(had)
