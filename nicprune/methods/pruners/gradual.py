"""The common part of pruners that drive channels out while the codec is trained.

Up to the commit, each method drives channels out in its own way, at a pace rho such that the cost
follows a straight line. At the commit the choice is final: keep-lists that meet the target exactly.
From there to the last step the masks of the other channels go to zero in a straight line.

The running mean of the squared gradient with respect to a mask (Fisher information, the curvature
along it, the first-order Taylor importance of Molchanov et al., CVPR 2019) estimates how much the
loss would rise without the channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from nicprune.common.errors import TrainingError
from nicprune.methods.contract import Pruner
from nicprune.pruning.budget_controller import deviations, relative_rates
from nicprune.pruning.latency import TimedCost
from nicprune.pruning.latency_table import LatencyTable
from nicprune.pruning.masks import Masks
from nicprune.pruning.target import Target

EMA = 0.99
"""Share of the past in the running mean of squared gradients."""


class GradualConfig(Target):
    """Settings of a gradual pruner beside its target.

    Attributes:
        decay_steps: training steps until the mask of every removed channel is zero.
        commit: fraction of `decay_steps` after which the choice is final.
    """

    decay_steps: int = Field(default=10_000, ge=2)
    commit: float = Field(default=0.7, gt=0, lt=1)


class GradualPruner(Pruner):
    """A pruner with a mask on each channel that may go, zero for those removed once it is done."""

    steps_field = "decay_steps"
    Config = GradualConfig
    config: GradualConfig

    step: Tensor
    rho: Tensor
    fisher: Tensor
    current: Tensor
    at_commit: Tensor
    going: Tensor
    committed: Tensor
    latency: Tensor

    def __init__(self, *args: Any):
        super().__init__(*args)
        free = self.config.free(self.groups)
        self.free_names = [g.name for g in free]
        self._columns = np.array([self.cost.names.index(g.name) for g in free], dtype=np.int64)
        self._sizes = [g.width for g in free]
        fixed = self.config.fixed_widths(self.groups)
        self._goal = np.array([fixed.get(g.name, 0) for g in free], dtype=float)
        self.masks = Masks(free, self.config.norms)
        steered = len(free) if self.config.widths is not None else 1
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("rho", torch.full((steered,), 1.0 / self.config.decay_steps))
        self.register_buffer("fisher", torch.zeros(sum(self._sizes)))
        # What the optimiser may have done to the masks is undone from here: `after_step` alone
        # moves them.
        self.register_buffer("current", torch.ones(sum(self._sizes)))
        self.register_buffer("at_commit", torch.ones(sum(self._sizes)))
        self.register_buffer("going", torch.zeros(sum(self._sizes), dtype=torch.bool))
        self.register_buffer("committed", torch.zeros((), dtype=torch.bool))
        if isinstance(self.cost, TimedCost):  # a run goes on with the times that it began with
            self.register_buffer("latency", self.cost.table.as_bytes())

    # -- what each method defines -----------------------------------------------------------------

    def _update(self, gradient: Tensor) -> Tensor:
        """Return the masks after this step, given the gradient of the rate-distortion loss with
        respect to them, both of shape (channels,). After the commit, only those of channels that
        stay count.
        """
        raise NotImplementedError

    def _standing(self) -> Tensor:
        """Return how much is left of each channel, 1 for all of it, shape (channels,)."""
        return self.current

    def _counted(self, standing: Tensor) -> Tensor:
        """Return what each channel counts in the present width of its group, 0 to 1."""
        return standing

    def _scores(self) -> Tensor:
        """Return the scores by which channels are chosen, shape (channels,); those with the higher
        ones stay.
        """
        return self._standing()

    # -- what is the same for all -----------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        written = state_dict.get(f"{prefix}latency")
        if written is not None and isinstance(self.cost, TimedCost):
            self.cost.use(LatencyTable.from_bytes(written))
            self.latency = written.clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def validate(self) -> None:
        self.config.check(self.groups, self.cost)

    def attach(self, codec: nn.Module) -> None:
        self.masks.attach(codec, self.groups)

    def detach(self, codec: nn.Module) -> None:
        self.masks.detach(codec)

    def manually_updated(self) -> list[nn.Parameter]:
        return list(self.masks.values)

    @property
    def commit_step(self) -> int:
        """Training step at which the choice is final."""
        return min(
            max(1, round(self.config.commit * self.config.decay_steps)), self.config.decay_steps - 1
        )

    @property
    def done(self) -> bool:
        return self.steps_left == 0

    @property
    def steps_left(self) -> int:
        return max(0, self.config.decay_steps - int(self.step))

    @torch.no_grad()
    def after_step(self) -> None:
        if self.done:
            self._write(self.current)
            return
        self.config.check_split_is_decided()
        self.step += 1
        gradients = [
            p.grad if p.grad is not None else torch.zeros_like(p) for p in self.masks.values
        ]
        gradient = torch.cat(gradients) if gradients else self.current.new_zeros(0)
        if not bool(torch.isfinite(gradient).all()):
            gradient = torch.zeros_like(gradient)
        self.fisher.mul_(EMA).add_(gradient.square(), alpha=1 - EMA)
        values = self._update(gradient)
        if int(self.step) > self.commit_step:
            left = 1 - (int(self.step) - self.commit_step) / (
                self.config.decay_steps - self.commit_step
            )
            values = torch.where(self.going, self.at_commit.clamp(max=1) * left, values)
        if int(self.step) == self.commit_step:
            self.current.copy_(values)
            self.going.copy_(self._gone(self._choose()))
            self.at_commit.copy_(values)
            self.committed.fill_(True)
            self.masks.stays.copy_(~self.going)
        self.current.copy_(values)
        self._write(values)

    def _gone(self, keep: Mapping[str, Sequence[int]]) -> Tensor:
        """Return which channels these keep-lists leave out."""
        parts = [
            np.isin(np.arange(n), keep[name], invert=True)
            for name, n in zip(self.free_names, self._sizes, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts))

    def _per_channel(self, rho: Tensor) -> Tensor:
        """Return the pace of each channel, where each group may have its own."""
        if len(rho) == 1:
            return rho
        return rho.repeat_interleave(torch.tensor(self._sizes, device=rho.device))

    def _soft_widths(self, standing: Tensor) -> np.ndarray:
        """Return the widths by what is left of each channel."""
        widths = self.cost.widths().astype(float)
        counted = self._counted(standing).clamp(0, 1)
        sums = torch.stack([part.sum() for part in counted.split(self._sizes)])
        widths[self._columns] = sums.tolist()
        return widths

    def _excess(self, soft: np.ndarray) -> np.ndarray:
        """Return the distance of widths from those planned for this step, as a fraction of the
        whole way, positive where they are too high: for each group where it has a width to reach,
        else of the limit that is furthest off.
        """
        planned = min(1.0, int(self.step) / self.commit_step)
        if self.config.widths is not None:
            full, now = np.array(self._sizes, float), soft[self._columns]
            return (now - (full + planned * (self._goal - full))) / np.maximum(
                full - self._goal, 1.0
            )
        assert self.config.budget is not None
        limits = self.config.budget.limits(self.cost.original)
        whole = self.cost.totals()
        return np.array(
            [max(deviations(lambda name: self.cost.soft(soft, name), whole, limits, planned))]
        )

    def _rates(self, soft: np.ndarray, importance: Tensor) -> Tensor:
        """Return the MACs of each channel over its importance, relative to the median. Of several
        limits, those that are not met count.
        """
        price = np.ones(len(self._sizes))
        if self.config.budget is not None:
            widths = np.maximum(np.rint(soft), 1).astype(np.int64)
            totals, price = self.cost.totals(widths), np.zeros(len(self._sizes))
            limits = self.config.budget.limits(self.cost.original)
            # What is met already asks for nothing more, as long as something else is not.
            missed = {
                name: limit for name, limit in limits.items() if getattr(totals, name) > limit
            }
            for name, limit in (missed or limits).items():
                over = max(getattr(totals, name) - limit, 0.0) + 1e-3 * limit
                price += (
                    self.cost.decreases(widths, np.ones_like(widths), name)[self._columns] / over
                )
        prices = torch.from_numpy(np.repeat(price, self._sizes)).to(importance)
        if self.config.widths is None:
            return relative_rates(prices, importance)
        each = zip(prices.split(self._sizes), importance.split(self._sizes), strict=True)
        return torch.cat([relative_rates(*part) for part in each])

    def _choose(self) -> dict[str, list[int]]:
        """Return keep-lists that meet the target. Scores are compared as they are, not by MACs."""
        parts = [part.cpu().numpy() for part in self._scores().split(self._sizes)]
        by_group = dict(zip(self.free_names, parts, strict=True))
        return self.config.choose(self.groups, self.cost, by_group, per_cost=False)

    def _write(self, values: Tensor) -> None:
        for parameter, part in zip(self.masks.values, values.split(self._sizes), strict=True):
            parameter.data.copy_(part)
            parameter.grad = None

    def select(self) -> dict[str, list[int]]:
        if not bool(self.committed):
            return self._choose()
        stays = (~self.going).split(self._sizes)
        return {
            name: torch.nonzero(part).flatten().tolist()
            for name, part in zip(self.free_names, stays, strict=True)
        }

    def check_ready(self) -> None:
        if not self.done:
            title = self.name.replace("_", " ")
            raise TrainingError(
                f"{title} is at step {int(self.step)} of {self.config.decay_steps}: masks are"
                " not at zero yet; train on until masked.done, or attach with fewer decay_steps"
            )
        values = [value.detach().flatten() for value in self.masks.values]
        left = torch.cat(values)[self.going].abs() if values else self.current.new_zeros(0)
        if bool((left != 0).any()):
            raise TrainingError(
                f"{self.name.replace('_', ' ')} is done, but masks of channels that go are not zero"
                f" (up to {float(left.max()):.2g}): something else than after_step() wrote to them,"
                " as averaging parameters over steps does. masked.after_step() sets them to zero;"
                " look at the codec again after it"
            )

    def weight_factors(self, codec: nn.Module) -> dict[tuple[str, str], Tensor]:
        return {
            (layer, "out"): factor
            for layer, factor in self.masks.factors(codec, self.groups).items()
        }

    def fold(self, codec: nn.Module) -> None:
        self.masks.fold(codec, self.groups)

    def metrics(self) -> dict[str, float]:
        soft = self._soft_widths(self._standing())
        return {
            "macs": self.cost.soft(soft) / self.cost.original.macs,
            "rho": float(self.rho.mean()),
        }
