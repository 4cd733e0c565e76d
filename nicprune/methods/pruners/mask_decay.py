"""Mask decay with the |m - 1| criterion (Wang et al., "EVC: Towards Real-Time Neural Image
Compression with Mask Decay", ICLR 2023).

Every channel of every prunable group gets a mask m, initially 1, applied after the bias of the
layers that produce it. After each optimiser step

    m <- max(0, m - eta * clip(g / rms(g)) - rho * r * (|m - 1| + floor))

with g the gradient of the rate-distortion loss, rms(g) its running root mean square over all masks.
|m - 1| is EVC's criterion: it grows as a mask falls and is zero at 1, so that masks separate into
those that stay and those that go; L1 pushes all equally, L2 pushes the large ones most. Three parts
are not from the paper, whose settings are not public:

*Start.* m = 1 is a fixed point of |m - 1|, and at a trained codec's optimum the mean of g is zero
too: only noise would move a mask. The floor starts the decay.

*Importance.* The mean of g is zero at the optimum, its square is not: the running mean of g^2
(Fisher information, the curvature along m, the first-order Taylor importance of Molchanov et al.,
CVPR 2019) estimates how much the loss would rise. The rate r = c / E[g^2], relative to its median,
first removes channels that cost many MACs (c, at the present widths) and matter little: widths
follow rate-distortion loss per MAC. A deficit grows exponentially, so a channel half as important
is gone when the other has hardly begun to fall.

*Pace.* rho is steered: it rises while the codec costs more than planned for the step and falls when
it costs less. For the last part of `decay_steps` the choice is final: keep-lists that meet the
target exactly are read off the masks, the masks of the other channels go to zero, and the decay of
those that stay ends.

Decay is decoupled from the optimiser, as weight decay is in AdamW: Adam's normaliser would make |m
- 1|, L1 and L2 equal.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from nicprune.common.errors import TrainingError
from nicprune.methods.contract import METHODS, Pruner
from nicprune.pruning.budget_controller import deviations, relative_rates, steer
from nicprune.pruning.latency import TimedCost
from nicprune.pruning.latency_table import LatencyTable
from nicprune.pruning.masks import Masks
from nicprune.pruning.target import Target

EMA = 0.99
"""Share of the past in the running mean of squared gradients."""

FLOOR = 0.05
"""Decay at m = 1, as a share of the decay at m = 0."""


class MaskDecayConfig(Target):
    """Settings of mask decay beside its target.

    Attributes:
        decay_steps: training steps until the mask of every removed channel is zero.
        criterion: the decay's gradient: "decay" is |m - 1|, "l1" is 1, "l2" is m; the floor is
            added to each.
        mask_lr: eta, the step size of masks along the rate-distortion gradient; None takes 1 /
            decay_steps, with which a mask that is always pushed one way moves by at most 1.
        commit: fraction of `decay_steps` after which the choice is final.
        rates: whether masks decay by "importance", the rate r of each channel its MACs over its
            importance, or all alike ("equal", r = 1, as published), so that the criterion and the
            gradient alone tell them apart.
    """

    decay_steps: int = Field(default=10_000, ge=2)
    criterion: Literal["decay", "l1", "l2"] = "decay"
    mask_lr: float | None = Field(default=None, gt=0)
    commit: float = Field(default=0.7, gt=0, lt=1)
    rates: Literal["importance", "equal"] = "importance"


@METHODS.register("mask_decay")
class MaskDecay(Pruner):
    """Learn which channels to remove while the codec is trained."""

    name = "mask_decay"
    summary = "learnt masks decay by |m - 1| (EVC), weighted by MACs, to an exact budget"
    steps_field = "decay_steps"
    Config = MaskDecayConfig
    config: MaskDecayConfig

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
        # What the optimiser may have done to the masks is undone from here: they move by the rule
        # above alone.
        self.register_buffer("current", torch.ones(sum(self._sizes)))
        self.register_buffer("at_commit", torch.ones(sum(self._sizes)))
        self.register_buffer("going", torch.zeros(sum(self._sizes), dtype=torch.bool))
        self.register_buffer("committed", torch.zeros((), dtype=torch.bool))
        if isinstance(self.cost, TimedCost):  # a run goes on with the times that it began with
            self.register_buffer("latency", self.cost.table.as_bytes())

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
    def eta(self) -> float:
        """Step size of masks along the rate-distortion gradient."""
        return (
            self.config.mask_lr
            if self.config.mask_lr is not None
            else 1.0 / self.config.decay_steps
        )

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

    def _soft_widths(self, values: Tensor) -> np.ndarray:
        """Return the widths by masks: those above 3/4 count as 1, those below 1/4 as 0."""
        widths = self.cost.widths().astype(float)
        standing = ((values - 0.25) * 2).clamp(0, 1)
        widths[self._columns] = [float(part.sum()) for part in standing.split(self._sizes)]
        return widths

    def _rates(self, soft: np.ndarray, importance: Tensor) -> Tensor:
        """Return r of the module's docstring for every mask: cost over importance, relative to the
        median.
        """
        if self.config.rates == "equal":
            return torch.ones_like(importance)
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

    def _ahead(self, soft: np.ndarray) -> np.ndarray:
        """Return the distance from the planned cost as a fraction of the whole way; positive where
        it is too high.
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

    @torch.no_grad()
    def after_step(self) -> None:
        if self.done:
            self._write(self.current)
            return
        self.config.check_settled()
        self.step += 1
        gradients = [
            p.grad if p.grad is not None else torch.zeros_like(p) for p in self.masks.values
        ]
        gradient = torch.cat(gradients) if gradients else self.current.new_zeros(0)
        if not bool(torch.isfinite(gradient).all()):
            gradient = torch.zeros_like(gradient)
        self.fisher.mul_(EMA).add_(gradient.square(), alpha=1 - EMA)
        pull = self.eta * (gradient / self._rms()).clamp(-1, 1)
        values = self.current
        if int(self.step) <= self.commit_step:
            values = (values - pull - self._decay(values)).clamp(min=0)
        else:
            left = 1 - (int(self.step) - self.commit_step) / (
                self.config.decay_steps - self.commit_step
            )
            values = torch.where(
                self.going, self.at_commit.clamp(max=1) * left, (values - pull).clamp(min=0)
            )
        if int(self.step) == self.commit_step:
            keep = self._choose(values)
            going = [
                np.isin(np.arange(n), keep[name], invert=True)
                for name, n in zip(self.free_names, self._sizes, strict=True)
            ]
            self.going.copy_(torch.from_numpy(np.concatenate(going)))
            self.at_commit.copy_(values)
            self.committed.fill_(True)
            self.masks.stays.copy_(~self.going)
        self.current.copy_(values)
        self._write(values)

    def _rms(self) -> Tensor:
        unbiased = self.fisher / (1 - EMA ** int(self.step))
        return unbiased.mean().sqrt().clamp_min(1e-20)

    def _decay(self, values: Tensor) -> Tensor:
        """Return the decay of each mask in this step, and steer rho."""
        soft = self._soft_widths(values)
        steer(self.rho, self._ahead(soft), slowest=1e-4 / self.config.decay_steps)
        rates = self._rates(soft, self.fisher)
        rho = (
            self.rho
            if len(self.rho) == 1
            else self.rho.repeat_interleave(torch.tensor(self._sizes, device=values.device))
        )
        return rho * rates * (self._criterion(values) + FLOOR)

    def _criterion(self, m: Tensor) -> Tensor:
        if self.config.criterion == "decay":
            return (m - 1).abs()
        return (m > 0).to(m) if self.config.criterion == "l1" else m

    def _write(self, values: Tensor) -> None:
        for parameter, part in zip(self.masks.values, values.split(self._sizes), strict=True):
            parameter.data.copy_(part)
            parameter.grad = None

    def _choose(self, values: Tensor) -> dict[str, list[int]]:
        parts = [part.cpu().numpy() for part in values.split(self._sizes)]
        scores = dict(zip(self.free_names, parts, strict=True))
        # The decay was weighted by cost already, so masks are compared as they are.
        return self.config.choose(self.groups, self.cost, scores, per_cost=False)

    def select(self) -> dict[str, list[int]]:
        if not bool(self.committed):
            return self._choose(self.current)
        stays = (~self.going).split(self._sizes)
        return {
            name: torch.nonzero(part).flatten().tolist()
            for name, part in zip(self.free_names, stays, strict=True)
        }

    def check_ready(self) -> None:
        if not self.done:
            raise TrainingError(
                f"mask decay is at step {int(self.step)} of {self.config.decay_steps}: masks are"
                " not at zero yet; train on until masked.done, or attach with fewer decay_steps"
            )

    def weight_factors(self, codec: nn.Module) -> dict[tuple[str, str], Tensor]:
        return {
            (layer, "out"): factor
            for layer, factor in self.masks.factors(codec, self.groups).items()
        }

    def fold(self, codec: nn.Module) -> None:
        self.masks.fold(codec, self.groups)

    def metrics(self) -> dict[str, float]:
        return {
            "macs": self.cost.soft(self._soft_widths(self.current)) / self.cost.original.macs,
            "rho": float(self.rho.mean()),
            "masks_below_half": float((self.current < 0.5).float().mean()),
        }
