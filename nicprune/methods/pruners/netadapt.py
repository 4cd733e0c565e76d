"""One-shot pruning by measured loss: the width of each channel group is searched for, one step at a
time.

NetAdapt (Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications",
ECCV 2018) with the rate-distortion loss in place of accuracy. In every round each group proposes
to become as narrow as that round asks, the loss of each proposal is measured on photographs, and
the cheapest is taken. The paper trains every proposal for a while; here nothing is trained before
`harden`, and inside a group the channels with the least squared mask gradient go first, measured
anew in every round on what is left. Where a codec has many groups, only the proposals that cost
least by these gradients are measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from nicprune.channels.groups import Group
from nicprune.codecs.anatomy import rate_distortion_loss
from nicprune.codecs.calling import run
from nicprune.codecs.provenance import provenance
from nicprune.codecs.zoo import lmbda_of
from nicprune.common.errors import BudgetError, RecipeError, TrainingError
from nicprune.methods.contract import METHODS, Pruner
from nicprune.pruning.budget import next_width
from nicprune.pruning.masks import importance, masked_copy
from nicprune.pruning.target import Target

SIDE = 256
"""The loss is measured on the middle of each image, at most this high and wide in pixels: whole
photographs would take six times as long."""

MEASURED = 8
"""Groups whose proposals are measured in a round, at least: those that cost least per MAC by their
squared mask gradients. More are where these do not save twice what the round asks."""


class NetAdaptConfig(Target):
    """A target, and how it is approached.

    Attributes:
        rounds: equal steps from the whole codec to the budget.
    """

    rounds: int = Field(default=16, ge=1, le=1000)


@METHODS.register("netadapt")
class NetAdapt(Pruner):
    """Choose widths and channels in `prepare`, by the loss on some images."""

    name = "netadapt"
    summary = (
        "one shot: widths searched for by the measured loss (NetAdapt); looks at photographs, for"
        " minutes"
    )
    Config = NetAdaptConfig
    config: NetAdaptConfig

    def __init__(self, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self._keep: dict[str, list[int]] = {}

    def validate(self) -> None:
        if self.config.widths is not None:
            raise RecipeError("netadapt searches for widths: give a budget, {macs: 0.5}, or fisher")
        self.config.check(self.groups, self.cost)

    def prepare(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        super().prepare(model, images)
        self._keep = self._search([_middle(image) for image in images])

    def check_ready(self) -> None:
        if not self._keep:
            raise TrainingError(
                "netadapt has seen no photographs yet:"
                " attached.prepare(calibration_images(folder)) first, or --images folder"
            )

    def select(self) -> dict[str, list[int]]:
        return {name: list(kept) for name, kept in self._keep.items()}

    def _search(self, images: Sequence[Tensor]) -> dict[str, list[int]]:
        """Return keep-lists that meet the budget.

        Args:
            images: (1, 3, H, W) in [0, 1], sides multiples of 64.
        """
        free = self.config.free(self.groups)
        keep = {group.name: np.arange(group.width) for group in free}
        removed = {group.name: np.arange(0) for group in free}
        worth = {group.name: np.zeros(0) for group in free}
        loss = self._loss(keep, images)
        start = self._excess(keep)
        for number in range(1, self.config.rounds + 1):
            goal = start * (1 - number / self.config.rounds)
            while self._excess(keep) > goal:
                order, scores = self._ranked(keep, images)
                proposals = self._proposals(keep, order, goal)
                promised = {
                    name: float(scores[name][: -len(kept)].sum())
                    for name, kept in proposals.items()
                }
                listed = self._cheapest(promised, keep, proposals, goal)
                listed = self._enough(listed, keep, proposals, goal)
                losses = {
                    name: self._loss({**keep, name: proposals[name]}, images) - loss
                    for name in listed
                }
                # Where one group alone cannot do it, several narrow at once.
                for name in self._cheapest(losses, keep, proposals, goal):
                    gone = slice(len(keep[name]) - len(proposals[name]))
                    removed[name] = np.concatenate([removed[name], order[name][gone]])
                    worth[name] = np.concatenate([worth[name], scores[name][gone]])
                    keep[name] = proposals[name]
                    if self._excess(keep) <= goal:
                        break
                loss = self._loss(keep, images)
        self._put_back(keep, removed, worth)
        return {name: kept.tolist() for name, kept in keep.items()}

    def _excess(self, keep: Mapping[str, np.ndarray]) -> float:
        """Return how far these channels are from the budget: over all limits, what is too much as a
        share of what had to go, summed.
        """
        assert self.config.budget is not None
        full, now = self.cost.totals(), self.cost.totals(self._widths(keep))
        limits = self.config.budget.limits(self.cost.original)
        return sum(
            max(0.0, getattr(now, name) - limit) / (getattr(full, name) - limit)
            for name, limit in limits.items()
            if getattr(full, name) > limit
        )

    def _widths(self, keep: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.cost.widths({name: len(kept) for name, kept in keep.items()})

    def _proposals(
        self, keep: Mapping[str, np.ndarray], order: Mapping[str, np.ndarray], goal: float
    ) -> dict[str, np.ndarray]:
        """Return, by group, the channels that stay if it alone is to reach the goal, at most a half
        of it going at once.
        """
        found = {}
        for group in self.config.free(self.groups):
            kept, whole = keep[group.name], len(keep[group.name])
            while (width := self._narrower(group, len(kept))) < len(kept):
                if len(kept) < whole and 2 * width < whole:
                    break
                kept = np.sort(order[group.name][-width:])
                if self._excess({**keep, group.name: kept}) <= goal:
                    break
            if len(kept) < whole:
                found[group.name] = kept
        return found

    def _cheapest(
        self,
        prices: Mapping[str, float],
        keep: Mapping[str, np.ndarray],
        proposals: Mapping[str, np.ndarray],
        goal: float,
    ) -> list[str]:
        """Return groups by what their proposals cost over what they save on the way to the goal.

        Raises:
            BudgetError: none saves anything.
        """
        excess = self._excess(keep)
        ratios = {
            name: prices[name] / saved
            for name in prices
            if (saved := excess - max(goal, self._excess({**keep, name: proposals[name]}))) > 0
        }
        if not ratios:
            assert self.config.budget is not None
            raise BudgetError(
                f"budget {self.config.budget.parts()} cannot be met with round_to"
                f" {self.config.round_to}"
            )
        return sorted(ratios, key=lambda name: ratios[name])

    def _enough(
        self,
        names: Sequence[str],
        keep: Mapping[str, np.ndarray],
        proposals: Mapping[str, np.ndarray],
        goal: float,
    ) -> list[str]:
        """Return the first of these groups, as many as leave a choice."""
        excess = self._excess(keep)
        found: list[str] = []
        saved = 0.0
        for name in names:
            if len(found) >= MEASURED and saved >= 2 * (excess - goal):
                break
            saved += excess - max(goal, self._excess({**keep, name: proposals[name]}))
            found.append(name)
        return found

    def _narrower(self, group: Group, width: int) -> int:
        return next_width(width, group.step(self.config.round_to), group.least)

    def _put_back(
        self,
        keep: dict[str, np.ndarray],
        removed: Mapping[str, np.ndarray],
        worth: Mapping[str, np.ndarray],
    ) -> None:
        """The last round may have saved more than was needed: widen again what still fits, most
        important first.

        Args:
            removed: channels in the order in which they went, by group.
            worth: their importance when they went.
        """
        left = {name: len(gone) for name, gone in removed.items()}
        while True:
            wider: dict[str, tuple[float, int, np.ndarray]] = {}
            for group in self.config.free(self.groups):
                name, step = group.name, group.step(self.config.round_to)
                count = min(step - len(keep[name]) % step, left[name])
                last = slice(left[name] - count, left[name])
                back = np.union1d(keep[name], removed[name][last])
                if count and self._excess({**keep, name: back}) <= 0:
                    wider[name] = float(worth[name][last].sum()), count, back
            if not wider:
                return
            best = max(wider, key=lambda name: wider[name][0])
            left[best] -= wider[best][1]
            keep[best] = wider[best][2]

    def _ranked(
        self, keep: Mapping[str, np.ndarray], images: Sequence[Tensor]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the channels that are left of each group, least important first, and their
        importance in this order.
        """
        lmbda, metric = self._rate()
        found = importance(
            self._masked(keep), self.groups, self.config.free(self.groups), images, lmbda, metric
        )
        order, scores = {}, {}
        for name, kept in keep.items():
            importances = found[name].double().cpu().numpy()[kept]
            by_importance = np.argsort(importances, kind="stable")
            order[name], scores[name] = kept[by_importance], importances[by_importance]
        return order, scores

    def _loss(self, keep: Mapping[str, np.ndarray], images: Sequence[Tensor]) -> float:
        """Return the rate-distortion loss of the codec with these channels, latents rounded, mean
        over images; infinite if it is none.
        """
        masked, loss = self._masked(keep).eval(), rate_distortion_loss(*self._rate())
        with torch.no_grad():
            total = sum(float(loss(run(masked, image), image)["loss"]) for image in images)
        return total / len(images) if math.isfinite(total) else math.inf

    def _masked(self, keep: Mapping[str, np.ndarray]) -> nn.Module:
        lists = {name: kept.tolist() for name, kept in keep.items()}
        return masked_copy(self.codec, self.groups.check(lists), self.groups)

    def _rate(self) -> tuple[float, str]:
        return lmbda_of(self.codec, self.config.lmbda), provenance(self.codec).metric


def _middle(image: Tensor) -> Tensor:
    """Return the middle of an image, (1, 3, H, W), at most SIDE high and wide."""
    top, left = ((side - min(side, SIDE)) // 2 for side in image.shape[2:])
    return image[:, :, top : top + SIDE, left : left + SIDE]
