"""One-shot pruning of random channels, the baseline for every criterion."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from nicprune.methods.contract import METHODS, Pruner
from nicprune.pruning.target import Target


class RandomConfig(Target):
    """A target, and the seed of the draw."""

    seed: int = Field(default=0, ge=0)


@METHODS.register("random")
class Random(Pruner):
    """Choose channels at once, at random; widths follow the budget as for the other methods."""

    name = "random"
    summary = "one shot: channels drawn at random"
    Config = RandomConfig

    def validate(self) -> None:
        self.config.check(self.groups, self.cost)  # type: ignore[attr-defined]

    def select(self) -> dict[str, list[int]]:
        config: RandomConfig = self.config  # type: ignore[assignment]
        generator = np.random.default_rng(config.seed)
        scores = {g.name: generator.uniform(0.5, 1.5, g.width) for g in config.free(self.groups)}
        return config.choose(self.groups, self.cost, scores, per_cost=True)
