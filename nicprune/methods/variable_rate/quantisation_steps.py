"""Quantisation steps: one a latent, times one a rate (EVC; Wang et al., ICLR 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nicprune.methods.contract import METHODS
from nicprune.methods.variable_rate.modulation import Modulation, Site


@METHODS.register("quantisation_steps")
class QuantisationSteps(Modulation):
    """A step per latent channel, not below 1/2, times one per rate."""

    name = "quantisation_steps"
    summary = "one codec, many rates (EVC): a quantisation step per latent, times one per rate"

    def build(self) -> None:
        self.basic = nn.Parameter(torch.ones(self.sites[0].width))
        steps = torch.exp(-self._prior(torch.arange(len(self.levels), dtype=torch.float32)))
        self.log_step = nn.Parameter(steps.log()[:, None])

    def factors(self, site: Site) -> tuple[Tensor, Tensor | None]:
        bounded = self.basic + (self.basic.clamp(min=0.5) - self.basic).detach()
        step = torch.exp(self._between(self.log_step)) * bounded
        return (1 / step if site.side == "out" else step), None

    def per_channel(self, site: int) -> dict[str, int]:
        return {"basic": 0}
