"""Linear layers."""

from __future__ import annotations

from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.convolutions import Convolution
from nicprune.codecs.layer_kinds.kind import KINDS


class Linear(Convolution):
    """`nn.Linear`: weight (out, in), channels last."""

    channel_axis = -1
    any_axis = True
    convolution = False
    pruner = tp.pruner.function.LinearPruner()

    def widths(self, layer: Any) -> tuple[int, int]:
        return layer.out_features, layer.in_features

    def follow_shapes(self, layer: Any) -> None:
        layer.out_features, layer.in_features = layer.weight.shape

    def along(self, layer: Any, axis: str, factor: Tensor) -> Tensor:
        return factor.view(-1, 1) if axis != "in" else factor.view(1, -1)


KINDS[nn.Linear] = Linear()
