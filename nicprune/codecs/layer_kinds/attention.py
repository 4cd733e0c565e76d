"""Self-attention: `nn.MultiheadAttention`, whose heads go with as many channels of its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import KINDS, Index, LayerKind, cut, kept_indices, take
from nicprune.codecs.layer_kinds.linear import Linear
from nicprune.codecs.layer_kinds.parameters import Part


class Attention(LayerKind):
    """`nn.MultiheadAttention` with one matrix for queries, keys and values: a linear layer from E
    channels to three times E. A head's rows go together.

    Torch computes the size of heads as E over their number. So a head goes with E / heads channels
    of the input, and the size of heads, and with it the scale of their products, stays.
    """

    flow = "attention"
    channel_axis = -1

    def parts(self, layer: Any) -> tuple[str, ...]:
        return ("out_proj",)

    def times(
        self, layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        query, key, value = (
            given[name].numel() // given[name].shape[-1] for name in ("query", "key", "value")
        )
        return {"": (query, key, value), "out_proj": (query,)}

    def traceable(self, layer: Any) -> bool:
        own = {name for name, value in layer._parameters.items() if value is not None}
        return own <= {"in_proj_weight", "in_proj_bias"} and bool(layer._qkv_same_embed_dim)

    def widths(self, layer: Any) -> tuple[int, int]:
        out, inn = layer.in_proj_weight.shape
        return out, inn

    def heads(self, layer: Any) -> int:
        return int(layer.num_heads)

    def parameter_terms(self, layer: Any) -> tuple[int, int]:
        return 1, int(layer.in_proj_bias is not None)

    def _width_attributes(self, layer: Any, rows: int, columns: int) -> dict[str, Any]:
        heads = rows // 3 // layer.head_dim
        return {"embed_dim": columns, "kdim": columns, "vdim": columns, "num_heads": heads}

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        kept = kept_indices(self.widths(layer)[axis == "in"], removed)
        cut(layer, "in_proj_weight", kept, int(axis == "in"))
        if axis != "in":
            cut(layer, "in_proj_bias", kept)
        self.follow_shapes(layer)

    def follow_shapes(self, layer: Any) -> None:
        for name, value in self._width_attributes(layer, *layer.in_proj_weight.shape).items():
            setattr(layer, name, value)

    def zero(self, layer: Any, channels: Tensor) -> None:
        for value in (layer.in_proj_weight, layer.in_proj_bias):
            if value is not None:
                value.index_fill_(0, channels.to(value.device), 0.0)

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        weight = take(take(layer.in_proj_weight, 0, out), 1, inn)
        found: dict[str, Any] = {"in_proj_weight": weight}
        if layer.in_proj_bias is not None:
            found["in_proj_bias"] = take(layer.in_proj_bias, 0, out)
        return found | self._width_attributes(layer, *weight.shape)

    def along(self, layer: Any, axis: str, factor: Tensor) -> Tensor:
        return factor.view(-1, 1) if axis != "in" else factor.view(1, -1)

    def masked_attributes(self, layer: Any, factor: Tensor) -> dict[str, Tensor] | None:
        found = {"in_proj_weight": layer.in_proj_weight * self.along(layer, "out", factor)}
        if layer.in_proj_bias is not None:
            found["in_proj_bias"] = layer.in_proj_bias * factor
        return found

    def norms(self, layer: Any, axis: str) -> Tensor:
        squares = layer.in_proj_weight.square()
        if axis == "in":
            return squares.sum(0)
        bias = layer.in_proj_bias
        return squares.sum(1) if bias is None else squares.sum(1) + bias.square()

    def reinitialise(self, layer: Any) -> None:
        layer._reset_parameters()


class OutputProjection(Linear):
    """The linear layer behind the heads, whose weights the attention reads without calling it: what
    stands in front of them stands in front of the whole layer.
    """

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        super().remove(layer.module, axis, removed)

    def follow_shapes(self, layer: Any) -> None:
        super().follow_shapes(layer.module)

    def _in_front(self, layer: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {layer.name: SimpleNamespace(**({"bias": None} | values))}

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        return self._in_front(layer, super().sliced(layer, out, inn))

    def masked_attributes(self, layer: Any, factor: Tensor) -> dict[str, Any] | None:
        found = super().masked_attributes(layer, factor)
        return self._in_front(layer, found) if found is not None else None

    def write(self, layer: Any, values: dict[str, Any]) -> None:
        given = vars(values[layer.name])
        super().write(layer.module, {k: v for k, v in given.items() if v is not None})

    def reinitialise(self, layer: Any) -> None:
        # As the attention does when it is made.
        layer.reset_parameters()
        if layer.bias is not None:
            torch.nn.init.zeros_(layer.bias)


class UncalledLinear(Linear):
    """The same layer as a module, apart from the attention that it is a part of."""

    reinitialise = OutputProjection.reinitialise


KINDS[nn.MultiheadAttention] = Attention()
KINDS[Part] = OutputProjection()
KINDS[nn.modules.linear.NonDynamicallyQuantizableLinear] = UncalledLinear()
