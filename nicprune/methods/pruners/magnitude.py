"""One-shot pruning by group magnitude, the baseline that needs no data.

A channel's importance is the L2 norm of all weights that are removed with it, over every member of
its group (Fang et al., "DepGraph", CVPR 2023, section 4.2), GDN's effective gamma and masked
convolutions included, relative to the mean of its group, so that groups are comparable. With a
budget, channels go by importance per MAC saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nicprune.channels.groups import Group
from nicprune.codecs.layer_kinds.kind import channel_kind
from nicprune.codecs.layer_kinds.parameters import layers_of
from nicprune.methods.contract import METHODS, Pruner
from nicprune.pruning.target import Target


def group_magnitude(modules: Mapping[str, Any], group: Group) -> np.ndarray:
    """Return the importance of each channel of a group: L2 norm over its members, relative to the
    group's mean.

    Args:
        modules: what `layers_of(codec)` returns.
    """
    total = np.zeros(group.width)
    with torch.no_grad():
        for member in group.members:
            layer = modules[member.module]
            norms = channel_kind(layer).norms(layer, member.axis).double().cpu().numpy()
            total += norms[member.index].sum(1)
    magnitude = np.sqrt(total)
    return magnitude / max(float(magnitude.mean()), 1e-12)


@METHODS.register("magnitude")
class Magnitude(Pruner):
    """Choose channels at once, by weight norms."""

    name = "magnitude"
    summary = "one shot: smallest group L2 norm per MAC goes first"
    Config = Target

    def validate(self) -> None:
        self.config.check(self.groups, self.cost)  # type: ignore[attr-defined]

    def select(self) -> dict[str, list[int]]:
        config: Target = self.config  # type: ignore[assignment]
        modules = layers_of(self.codec)
        scores = {g.name: group_magnitude(modules, g) for g in config.free(self.groups)}
        return config.choose(self.groups, self.cost, scores, per_cost=True)
