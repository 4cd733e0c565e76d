"""Group lasso: the L2,1 norm of the filters drives channels out while the codec is trained (Yuan
and Lin, "Model selection and estimation in regression with grouped variables", 2006; over channels
Wen et al., "Learning Structured Sparsity in Deep Neural Networks", NIPS 2016; on learned codecs
"Structured Sparsity Learning for Efficient Learned Image Compression", ISCAS 2025).

w: the weights and biases, taken together, of all layers that produce a channel. u = |w| / n: their
norm relative to n, the mean of the channel's group at the start, so that layers are comparable.
After each optimiser step follows the proximal step of the penalty sum(rho * p * n * |w|), in
coordinates w / n:

    w <- w * max(1/2, 1 - rho * p / u)

So u falls by rho * p, whatever it is, unless the loss pulls the weights back. The loss is free of
the penalty: put through the optimiser, its gradient would be normalised away (see `mask_decay`). A
channel never gets to zero before the choice is final, so that it can come back. What is not trained
does not shrink.

rho is set in each step such that the cost, each channel counted by what is left of its norm, comes
down to the planned one. What p is:

- *constant*: 1, the plain norm. Every channel shrinks, also those that stay.
- *incremental* (Wang et al., "Structured Pruning for Efficient ConvNets via Incremental
  Regularization", IJCNN 2019; on learned codecs the work of 2025): a count that rises by 1 in each
  step in which the channel, ranked by u, would be removed, and falls by 1 in each in which it would
  not, over the largest such count. Channels are ranked every tenth step.
- *importance*, not from these papers: MACs over the squared mask gradient, relative to the median,
  as in mask decay. The norm of a filter in front of GDN, which divides by it, says little of what
  the channel is worth. Channels are chosen by what is left of their norm at the start, otherwise by
  u.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nicprune.codecs.gradient_free import learns
from nicprune.codecs.layer_kinds.kind import LayerKind, channel_kind
from nicprune.codecs.layer_kinds.parameters import holder, layers_of
from nicprune.methods.contract import METHODS
from nicprune.methods.pruners.gradual import GradualConfig, GradualPruner
from nicprune.pruning.budget_controller import FASTEST
from nicprune.pruning.masks import multiplied

LEAST = 0.5
"""Smallest factor of a step."""

HALVINGS = 20
"""Halvings of the interval in which the pace of a step is sought."""

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
        found = [torch.zeros(size, device=self.current.device) for size in self._sizes]
        for position, layer, kind, index in self._producers():
            squares = kind.norms(layer, "out").float()
            sums = squares[torch.from_numpy(index).to(squares.device)].sum(1)
            found[position] = found[position].to(sums.device) + sums
        return torch.cat(found).sqrt() if found else self.current.new_zeros(0)

    def _producers(self) -> Iterator[tuple[int, Any, LayerKind, np.ndarray]]:
        """Yield the layers that produce the channels of each group, by the group's position, with
        their kinds, and which of their outputs belong to each channel.
        """
        modules = layers_of(self.codec)
        for position, name in enumerate(self.free_names):
            for member in self.groups[name].members:
                if member.axis == "out":
                    layer = modules[member.module]
                    yield position, layer, channel_kind(layer), member.index

    def _relative(self) -> Tensor:
        return self._norms() / self.unit

    def _standing(self) -> Tensor:
        standing = self._relative() / self.start
        if bool(self.committed):  # those that stay count whole, however much they have shrunk
            return torch.where(self.going, standing * self.current, 1.0)
        return standing

    def _scores(self) -> Tensor:
        # By importance, what is left of each says how far it was driven out, as masks do.
        return self._standing() if self.config.penalty == "importance" else self._relative()

    def _update(self, gradient: Tensor) -> Tensor:
        if int(self.step) <= self.commit_step:
            relative = self._relative()
            factor = self._factor(relative, self._penalty(relative) * self._trained())
            self._shrink(factor)
        return self.current

    def _factor(self, relative: Tensor, penalty: Tensor) -> Tensor:
        """Set rho such that this step leads to the planned cost, if the loss leaves the norms as
        they are, and return what each channel is multiplied by.
        """

        where = np.cumsum([0, *self._sizes[:-1]])
        now, price, start = (t.double().cpu().numpy() for t in (relative, penalty, self.start))
        widths = self.cost.widths().astype(float)

        def after(rho: np.ndarray) -> np.ndarray:
            pull = (rho if len(rho) == 1 else np.repeat(rho, self._sizes)) * price
            # At most halved: weights of zero might never be anything else again.
            return (1 - pull / np.maximum(now, 1e-12)).clip(min=LEAST)

        def excess(rho: np.ndarray) -> np.ndarray:
            left = (after(rho) * now / start).clip(max=1)
            widths[self._columns] = np.add.reduceat(left, where)
            return self._excess(widths)

        low = np.zeros(len(self.rho))
        high = np.where(excess(low) > 0, FASTEST, 0.0)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = excess(middle) > 0
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        self.rho.copy_(torch.from_numpy(high))
        return torch.from_numpy(after(high)).to(relative)

    def _trained(self) -> Tensor:
        """Return 1 for channels that the optimiser may change, 0 for others, shape (channels,)."""
        trained = [True] * len(self._sizes)
        for position, layer, _, _ in self._producers():
            trained[position] &= all(map(learns, holder(layer).parameters()))
        each = torch.tensor(trained, device=self.current.device).to(self.current)
        return each.repeat_interleave(torch.tensor(self._sizes, device=each.device))

    @torch.no_grad()
    def _shrink(self, factor: Tensor) -> None:
        """Multiply what produces each channel, in place; a parameter that several layers share,
        once.
        """
        parts = factor.split(self._sizes)
        by_layer: dict[int, tuple[Any, LayerKind, Tensor]] = {}
        for position, layer, kind, index in self._producers():
            whole = factor.new_ones(kind.widths(layer)[0])
            _, _, whole = by_layer.setdefault(id(layer), (layer, kind, whole))
            for column in index.T:
                whole[torch.from_numpy(column).to(whole.device)] = parts[position]
        seen: set[int] = set()
        for layer, kind, whole in by_layer.values():
            values = multiplied(kind, layer, whole) or {}
            own = {name: getattr(layer, name, None) for name in values}
            values = {name: value for name, value in values.items() if id(own[name]) not in seen}
            kind.write(layer, values)
            seen |= {id(value) for value in own.values() if value is not None}

    def _penalty(self, relative: Tensor) -> Tensor:
        """Return p of the module's docstring for every channel."""
        if self.config.penalty == "importance":
            return self._rates(self._soft_widths(relative / self.start), self.fisher)
        if self.config.penalty == "constant":
            return torch.ones_like(self.current)
        if (int(self.step) - 1) % RANK_EVERY == 0:
            self.removable.copy_(self._gone(self._choose()))
        self.grown.add_(torch.where(self.removable, 1.0, -1.0)).clamp_(min=0)
        return self.grown / self.grown.max().clamp_min(1)

    def metrics(self) -> dict[str, float]:
        below = float((self._standing() < 0.5).float().mean())
        return {**super().metrics(), "norms_below_half": below}
