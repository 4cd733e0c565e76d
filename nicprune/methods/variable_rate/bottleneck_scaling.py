"""Bottleneck scaling: a scale for each latent and rate (Theis et al., ICLR 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nicprune.methods.contract import METHODS
from nicprune.methods.variable_rate.modulation import Modulation, Site


@METHODS.register("bottleneck_scaling")
class BottleneckScaling(Modulation):
    """A table of scales; the codec is frozen while it is attached."""

    name = "bottleneck_scaling"
    summary = (
        "one codec, many rates (Theis 2017): a learnt scale per latent and rate, the codec frozen"
    )

    def build(self) -> None:
        steps = self._prior(torch.arange(len(self.levels), dtype=torch.float32))
        self.log_scale = nn.Parameter(steps[:, None].repeat(1, self.sites[0].width))

    def trains(self, name: str) -> bool:
        return False

    def factors(self, site: Site) -> tuple[Tensor, Tensor | None]:
        log = self._between(self.log_scale)
        return torch.exp(log if site.side == "out" else -log), None

    def per_channel(self, site: int) -> dict[str, int]:
        return {"log_scale": 1}
