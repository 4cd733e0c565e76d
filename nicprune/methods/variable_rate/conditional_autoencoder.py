"""The conditional autoencoder: a scale and an offset of every convolution for each rate (cAE; Choi
et al., ICCV 2019).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import widths_of
from nicprune.methods.contract import METHODS
from nicprune.methods.variable_rate.modulation import ZERO, Modulation, Site, convolutions_in


@METHODS.register("conditional_autoencoder")
class ConditionalAutoencoder(Modulation):
    """Scale and bias of every convolution from the nearest trained rate; between rates only the
    step size follows lambda.
    """

    name = "conditional_autoencoder"
    summary = (
        "one codec, many rates (cAE): scale and bias of every convolution per rate, a step size in"
        " between"
    )

    def places(self) -> list[Site]:
        codec: Any = self.codec
        names = convolutions_in(codec, ("g_a", "h_a", "h_s", "g_s"))
        return [
            Site(self, n, "out", n, "out", widths_of(codec.get_submodule(n))[0]) for n in names
        ] + super().places()

    def build(self) -> None:
        rates = len(self.levels)
        self.scales = nn.ParameterList(
            nn.Parameter(torch.zeros(rates, site.width)) for site in self.sites[:-2]
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(rates, site.width)) for site in self.sites[:-2]
        )

    def factors(self, site: Site) -> tuple[Tensor, Tensor | None]:
        now = self._now()
        if site in self.sites[-2:]:
            return self._step(site, now), None
        number, row = self.sites.index(site), now.round().long()
        zero = torch.tensor(ZERO)
        return (
            F.softplus(self.scales[number][row] + zero) / F.softplus(zero),
            self.biases[number][row],
        )

    @torch.no_grad()
    def on_rescale(self, layer: str, side: str, factor: Tensor) -> None:
        # A mask in front of a bias of ours, as in `Site`.
        for number, site in enumerate(self.sites[:-2]):
            if side == "out" and site.layer == layer:
                self.biases[number].mul_(factor.to(self.biases[number]))

    def per_channel(self, site: int) -> dict[str, int]:
        return (
            {f"{what}.{site}": 1 for what in ("scales", "biases")}
            if site < len(self.sites) - 2
            else {}
        )
