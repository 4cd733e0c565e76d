"""Group lasso: the L2,1 norm of the filters drives channels out while the codec is trained (Yuan
and Lin, "Model selection and estimation in regression with grouped variables", 2006; over channels
Wen et al., "Learning Structured Sparsity in Deep Neural Networks", NIPS 2016; on learned codecs
"Structured Sparsity Learning for Efficient Image Compression", ISCAS 2025).

w of a channel are the weights and biases of all layers that produce it, and u = |w| / n its norm
relative to n, the mean of its group at the start, so that layers are comparable. After each
optimiser step follows the proximal step of the penalty rho * p * u:

    w <- w * max(1/2, 1 - rho * p / u)

The loss is free of the penalty: put through the optimiser, its gradient would be normalised away
(see `mask_decay`). A norm falls by the same amount in each step, whatever it is, unless the loss
pulls the weights back; those that the loss does not hold end near zero. A channel never gets to
zero before the choice is final, so that it can come back.

What p is:

- *constant*: 1, the plain norm. Every channel shrinks, also those that stay.
- *incremental* (Wang et al., "Structured Pruning for Efficient ConvNets via Incremental
  Regularization", IJCNN 2019): it grows in each step in which the target would remove the channel,
  by u, and falls in each in which it would not; relative to the largest, so that the pace is rho's
  alone.
- *importance*, not from these papers: MACs over the squared mask gradient, relative to the median,
  as in mask decay. The norm of a filter in front of GDN, which divides by it, says little of what
  the channel is worth.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nicprune.codecs.layer_kinds.kind import channel_kind
from nicprune.codecs.layer_kinds.parameters import layers_of
from nicprune.methods.contract import METHODS
from nicprune.methods.pruners.gradual import GradualConfig, GradualPruner
from nicprune.pruning.budget_controller import FASTEST, deviations

SMALL = 1e-4
"""Pace with which the effect of a step on the cost is tried."""

RANK_EVERY = 10
"""Steps from one ranking of the channels to the next."""


class GroupLassoConfig(GradualConfig):
    """Settings of group lasso beside those of every gradual pruner.

    Attributes:
        penalty: the weight p of each channel in the norm: by "importance", "incremental", or
            "constant".
    """

    penalty: Literal["importance", "incremental", "constant"] = "importance"


@METHODS.register("group_lasso")
class GroupLasso(GradualPruner):
    """Shrink filters by their L2 norm, and remove those that stay small."""

    name = "group_lasso"
    summary = "filters shrink by their L2 norm (L2,1, weighted by MACs over importance) to a budget"
    Config = GroupLassoConfig
    config: GroupLassoConfig

    unit: Tensor
    start: Tensor
    grown: Tensor
    removable: Tensor

    def __init__(self, *args: Any):
        super().__init__(*args)
        norms = self._norms()
        means = [
            part.mean().clamp_min(1e-12).expand(len(part)) for part in norms.split(self._sizes)
        ]
        self.register_buffer("unit", torch.cat(means) if means else norms)
        self.register_buffer("start", (norms / self.unit).clamp_min(1e-12))
        self.register_buffer("grown", torch.zeros(sum(self._sizes)))
        self.register_buffer("removable", torch.zeros(sum(self._sizes), dtype=torch.bool))

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """Return the norm of all that produces each channel, shape (channels,)."""
        modules, found = layers_of(self.codec), []
        for name, size in zip(self.free_names, self._sizes, strict=True):
            total = torch.zeros(size, device=self.current.device)
            for member in self.groups[name].members:
                if member.axis == "out":
                    layer = modules[member.module]
                    squares = channel_kind(layer).norms(layer, member.axis).float()
                    index = torch.from_numpy(member.index).to(squares.device)
                    total = total.to(squares.device) + squares[index].sum(1)
            found.append(total.sqrt())
        return torch.cat(found) if found else self.current.new_zeros(0)

    def _relative(self) -> Tensor:
        return self._norms() / self.unit

    def _standing(self) -> Tensor:
        return self._relative() / self.start * self.current

    def _update(self, gradient: Tensor) -> Tensor:
        if int(self.step) <= self.commit_step:
            self._shrink()
        return self.current

    def _shrink(self) -> None:
        """Take the proximal step, in place."""
        relative = self._relative()
        soft = self._soft_widths(relative / self.start)
        penalty = self._penalty(soft)
        pull = self._pace(soft, relative, penalty) * penalty
        # At most halved: weights of zero might never be anything else again.
        factor = (1 - pull / relative.clamp_min(1e-12)).clamp(min=0.5)
        self._write(factor)
        self.masks.fold(self.codec, self.groups)

    def _pace(self, before: np.ndarray, relative: Tensor, penalty: Tensor) -> Tensor:
        """Set rho such that this step leads from the present widths to the planned cost, if the
        loss leaves the norms as they are, and return it for each channel.
        """
        after = self._soft_widths((relative - SMALL * penalty).clamp(min=0) / self.start)
        planned = self._planned()
        if self.config.widths is not None:
            full, now = np.array(self._sizes, float), before[self._columns]
            excess = now - (full + planned * (self._goal - full))
            saved = now - after[self._columns]
        else:
            assert self.config.budget is not None
            limits, whole = self.config.budget.limits(self.cost.original), self.cost.totals()
            excess = np.array(
                deviations(lambda name: self.cost.soft(before, name), whole, limits, planned)
            )
            saved = excess - np.array(
                deviations(lambda name: self.cost.soft(after, name), whole, limits, planned)
            )
        pace = np.divide(SMALL * excess, saved, out=np.zeros_like(excess), where=saved > 0)
        if self.config.widths is None:  # of several limits, the one that is furthest off
            pace = pace.max(keepdims=True)
        self.rho.copy_(torch.from_numpy(pace.clip(0, FASTEST)))
        return self._per_channel(self.rho)

    def _penalty(self, soft: np.ndarray) -> Tensor:
        """Return p of the module's docstring for every channel."""
        if self.config.penalty == "importance":
            return self._rates(soft, self.fisher)
        if self.config.penalty == "constant":
            return torch.ones_like(self.current)
        if (int(self.step) - 1) % RANK_EVERY == 0:
            self.removable.copy_(self._gone(self._choose(self.current)))
        self.grown.add_(torch.where(self.removable, 1.0, -1.0)).clamp_(min=0)
        return self.grown / self.grown.max().clamp_min(1)

    def _choose(self, masks: Tensor) -> dict[str, list[int]]:
        # By importance, what is left of each says how far it was driven out, as masks do.
        left = self._standing() if self.config.penalty == "importance" else self._relative()
        return self._by_score(left, per_cost=False)

    def metrics(self) -> dict[str, float]:
        below = float((self._standing() < 0.5).float().mean())
        return {**super().metrics(), "norms_below_half": below}
