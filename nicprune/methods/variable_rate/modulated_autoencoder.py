"""The modulated autoencoder: a network scales the output of every convolution of the transforms
(MAE; Yang et al., SPL 2020).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import widths_of
from nicprune.methods.contract import METHODS
from nicprune.methods.variable_rate.modulation import (
    Modulation,
    Network,
    NetworkConfig,
    Site,
    convolutions_in,
)


@METHODS.register("modulated_autoencoder")
class ModulatedAutoencoder(Modulation):
    """A small network at every convolution: after those of g_a, before those of g_s."""

    name = "modulated_autoencoder"
    summary = (
        "one codec, many rates (MAE): a small network from lambda at every convolution of g_a"
        " and g_s"
    )
    Config = NetworkConfig
    config: NetworkConfig

    def places(self) -> list[Site]:
        codec: Any = self.codec
        analysis = [
            Site(self, n, "out", n, "out", widths_of(codec.get_submodule(n))[0])
            for n in convolutions_in(codec, ("g_a",))
        ]
        synthesis = [
            Site(self, n, "in", n, "in", widths_of(codec.get_submodule(n))[1])
            for n in convolutions_in(codec, ("g_s",))
        ]
        return analysis + synthesis + super().places()

    def build(self) -> None:
        self.networks = nn.ModuleList(
            Network(self.config.hidden, site.width, torch.relu) for site in self.sites[:-2]
        )

    def factors(self, site: Site) -> tuple[Tensor, Tensor | None]:
        levels = self._now()
        if site in self.sites[-2:]:
            return self._step(site, levels), None
        networks: Any = self.networks
        return (
            torch.exp(
                networks[self.sites.index(site)](
                    self.levels.lmbda(levels) / self.levels.lambdas[-1]
                )
            ),
            None,
        )

    def per_channel(self, site: int) -> dict[str, int]:
        return (
            {f"networks.{site}.second.{what}": 0 for what in ("weight", "bias")}
            if site < len(self.sites) - 2
            else {}
        )
