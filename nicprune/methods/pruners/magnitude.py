"""One-shot pruning by group magnitude: the rival that costs nothing.

A channel's importance is the L2 norm of all weights that go with it, over every member of its group
(Fang et al., "DepGraph", CVPR 2023, section 4.2), GDN's effective gamma and masked convolutions
included, relative to its group's mean, so that groups compare; with a budget, channels go by
importance per MAC saved.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nicprune.channels.groups import Group
from nicprune.methods.contract import METHODS, Method
from nicprune.pruning.target import Target


def member_norms(layer: Any, axis: str) -> Tensor:
    """Squared L2 norm of each of a layer's channels along one axis, shape (channels,)."""
    if hasattr(layer, "gamma_reparam"):
        gamma, beta = layer.gamma_reparam(layer.gamma), layer.beta_reparam(layer.beta)
        return gamma.square().sum(0) + gamma.square().sum(1) + beta.square()
    weight = getattr(layer, "weight", None)
    # Entropy bottlenecks: the shape of a distribution says nothing of its importance.
    if weight is None:
        return torch.zeros(layer.channels)
    if hasattr(layer, "mask"):
        weight = weight * layer.mask
    rows = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    dim = rows if axis != "in" else 1 - rows
    norms = weight.movedim(dim, 0).flatten(1).square().sum(1)
    if axis != "in" and layer.bias is not None:
        norms = norms + layer.bias.square()
    return norms


def group_magnitude(codec: nn.Module, group: Group) -> np.ndarray:
    """Importance of each channel of a group: L2 norm over its members, relative to the group's
    mean.
    """
    modules = dict(codec.named_modules())
    total = np.zeros(group.width)
    with torch.no_grad():
        for member in group.members:
            norms = member_norms(modules[member.module], member.axis).double().cpu().numpy()
            total += norms[member.index].sum(1)
    magnitude = np.sqrt(total)
    return magnitude / max(float(magnitude.mean()), 1e-12)


@METHODS.register("magnitude")
class Magnitude(Method):
    """Decides at once, by weight norms."""

    name = "magnitude"
    summary = "one shot: smallest group L2 norm per MAC goes first"
    Config = Target

    def validate(self) -> None:
        self.config.check(self.groups, self.cost)  # type: ignore[attr-defined]

    def keep(self) -> dict[str, list[int]]:
        config: Target = self.config  # type: ignore[assignment]
        scores = {g.name: group_magnitude(self.codec, g) for g in config.free(self.groups)}
        return config.choose(self.groups, self.cost, scores, per_cost=True)
