"""Parameters with a value for each channel that a module uses in a forward pass of its own, such as
the scale of a residual branch: each is treated as a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import (
    KINDS,
    Index,
    LayerKind,
    cut,
    kept_indices,
    kind_of,
    kinds_in,
    take,
)


def is_vector(value: Tensor) -> bool:
    """Return whether one dimension alone is longer than 1."""
    return value.numel() == max(value.shape)


def shared_parameters(codec: nn.Module) -> dict[str, str]:
    """Return why the channels of some modules cannot be cut, by module name: two modules have the
    same parameter (tied weights, `b.weight = a.weight`), and each would cut, or scale, it its own
    way.
    """
    owners: dict[int, list[str]] = {}
    for name, module in codec.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return {
        name: f"{' and '.join(names)} share a parameter"
        for names in owners.values()
        if len(names) > 1
        for name in names
    }


class OwnParameter:
    """One parameter of a module, by name.

    Attributes:
        owner: the module.
        name: its attribute.
    """

    def __init__(self, owner: nn.Module, name: str):
        self.owner, self.name = owner, name

    @property
    def value(self) -> Tensor:
        """The parameter."""
        return getattr(self.owner, self.name)

    @property
    def dim(self) -> int:
        """The dimension that holds channels: the only one that is longer than 1, or the first."""
        shape = self.value.shape
        return max(range(len(shape)), key=lambda d: shape[d]) if is_vector(self.value) else 0

    @property
    def width(self) -> int:
        """The number of channels."""
        return self.value.shape[self.dim]

    def spread(self, factor: Tensor) -> Tensor:
        """Return a value for each channel, shape (C,), in a shape that multiplies the parameter."""
        shape = [1] * self.value.dim()
        shape[self.dim] = -1
        return factor.view(shape)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """List the parameter, as a module lists its own."""
        value = self.owner._parameters.get(self.name)
        if value is not None:
            yield self.name, value


class Part:
    """A layer inside another one that reads its weights without calling it, as attention does with
    its projection. Everything else of it is the layer's own.

    Attributes:
        owner: the layer that it is a part of.
        name: its attribute there.
    """

    def __init__(self, owner: nn.Module, name: str):
        self.owner, self.name = owner, name

    @property
    def module(self) -> Any:
        """The layer itself, or what stands in front of it now."""
        return getattr(self.owner, self.name)

    def __getattr__(self, name: str) -> Any:
        if "owner" not in self.__dict__:  # half made, by a copy
            raise AttributeError(name)
        return getattr(self.module, name)


class PerChannelParameter(LayerKind):
    """A parameter with values for each channel: a mask on it makes what it adds zero."""

    flow = "coupled"
    needs_zero = False
    absorbs = True

    def widths(self, layer: Any) -> tuple[int, int]:
        return layer.width, layer.width

    def is_product(self, layer: Any) -> bool:
        return False

    def parameter_terms(self, layer: Any) -> tuple[int, int]:
        each = layer.value.numel() // layer.width
        return 0, each if isinstance(layer.value, nn.Parameter) else 0

    def masked(self, axis: str) -> bool:
        return axis == "both"

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        cut(layer.owner, layer.name, kept_indices(layer.width, removed), layer.dim)

    def zero(self, layer: Any, channels: Tensor) -> None:
        layer.value.index_fill_(layer.dim, channels.to(layer.value.device), 0.0)

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        return {layer.name: take(layer.value, layer.dim, out)}

    def along(self, layer: Any, axis: str, factor: Tensor) -> Tensor:
        return layer.spread(factor)

    def masked_attributes(self, layer: Any, factor: Tensor) -> dict[str, Tensor] | None:
        return {layer.name: layer.value * layer.spread(factor)}

    def write(self, layer: Any, values: dict[str, Any]) -> None:
        layer.value.copy_(values[layer.name])

    def norms(self, layer: Any, axis: str) -> Tensor:
        squares = layer.value.square().movedim(layer.dim, 0)
        return squares.reshape(layer.width, -1).sum(1)


KINDS[OwnParameter] = PerChannelParameter()


def own_parameters(codec: nn.Module) -> dict[str, OwnParameter]:
    """Return the parameters and saved buffers of layers of no known kind that may have values for
    each channel, by dotted name: along the only dimension that is longer than 1, or the first.
    """
    found = {}
    for prefix, module in codec.named_modules():
        if kind_of(module) is not None or isinstance(module, (nn.ParameterList, nn.ParameterDict)):
            continue
        dot = f"{prefix}." if prefix else ""
        tensors = dict(module._parameters) | {
            name: buffer
            for name, buffer in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        for name, value in tensors.items():
            if value is None or not value.dim() or not value.is_floating_point():
                continue
            if value.numel() > 1 and (is_vector(value) or value.shape[0] > 1):
                found[f"{dot}{name}"] = OwnParameter(module, name)
    return found


def layers_of(codec: nn.Module) -> dict[str, Any]:
    """Return everything that can be a member of a channel group, by dotted name: modules, parts of
    layers that are not called, and parameters that modules use themselves.
    """
    parts = {
        f"{name}.{part}": Part(codec.get_submodule(name), part)
        for name, kind in kinds_in(codec).items()
        for part in kind.parts(codec.get_submodule(name))
    }
    return dict(codec.named_modules()) | parts | own_parameters(codec)


def holder(layer: Any) -> nn.Module:
    """Return the module whose attributes a layer's parameters are."""
    return layer.owner if isinstance(layer, (OwnParameter, Part)) else layer
