"""The bit-rate modulator: two layers from lambda to a scale for each latent, and their inverse at
the decoder (BM; Yin et al., ICASSP 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nicprune.methods.contract import METHODS
from nicprune.methods.variable_rate.modulation import Modulation, Network, NetworkConfig, Site


@METHODS.register("bit_rate_modulator")
class BitRateModulator(Modulation):
    """Channel vectors from two small networks, one on each side."""

    name = "bit_rate_modulator"
    summary = (
        "one codec, all rates (BM): two layers from lambda to a scale per latent, and their inverse"
    )
    Config = NetworkConfig
    config: NetworkConfig

    def build(self) -> None:
        width = self.sites[0].width
        self.modulate, self.restore = (
            Network(self.config.hidden, width, torch.tanh) for _ in range(2)
        )

    def factors(self, site: Site) -> tuple[Tensor, Tensor | None]:
        levels = self._now()
        log = self._prior(levels)[:, None] + self.modulate(levels / self.levels.top)
        return (
            torch.exp(log if site.side == "out" else self.restore(levels / self.levels.top) - log),
            None,
        )

    def per_channel(self, site: int) -> dict[str, int]:
        # The inverse is that of the same latents: both sites have the same channels, and are pruned
        # alike.
        return {
            f"{'restore' if site else 'modulate'}.second.{what}": 0 for what in ("weight", "bias")
        }
