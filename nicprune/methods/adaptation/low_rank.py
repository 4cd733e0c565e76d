"""A low-rank change of convolutions' weights (Hu et al., "LoRA: Low-Rank Adaptation of Large
Language Models", ICLR 2022): the target domain computes with

    W + B A,    W of shape (rows, columns * height * width), B (rows, rank) zero at the start.

The MACs are the codec's own. Few numbers are new: in a file of the adaptation alone, they travel.
"""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import torch
from torch import nn

from nicprune.codecs.layer_kinds.kind import kinds_in
from nicprune.common.errors import CodecError, RecipeError, closest
from nicprune.methods.adaptation.form import Form, Overrides


class LowRank(Form):
    """Two factors for each convolution that changes."""

    def build(self) -> None:
        codec = self.codec
        modules: dict[str, Any] = dict(codec.named_modules())
        known = [
            name
            for name, kind in kinds_in(codec).items()
            if kind.convolution and kind.traceable(modules[name])
        ]
        if not known:
            raise CodecError(f"{type(codec).__name__} has no convolution with a weight of its own")
        for pattern in self.config.layers or ():
            if not fnmatch.filter(known, pattern):
                raise RecipeError(
                    f"layers: no convolution matches {pattern!r}; {closest(pattern, known)}"
                )
        patterns = self.config.layers or ["*"]
        self.names = [n for n in known if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        self.rows, self.columns = nn.ParameterList(), nn.ParameterList()
        for name in self.names:
            weight = modules[name].weight.detach().flatten(1)
            rank = min(self.config.rank, *weight.shape)
            columns = torch.empty(rank, weight.shape[1])
            nn.init.kaiming_uniform_(columns, a=math.sqrt(5))
            self.rows.append(nn.Parameter(weight.new_zeros(weight.shape[0], rank)))
            self.columns.append(nn.Parameter(columns.to(weight)))

    def overrides(self, codec: Any) -> Overrides:
        found: Overrides = []
        for name, rows, columns in zip(self.names, self.rows, self.columns, strict=True):
            layer = codec.get_submodule(name)
            weight = layer.weight.detach()
            found.append((layer, {"weight": weight + (rows @ columns).view(weight.shape)}))
        return found
