"""The target of a pruning method: a budget, or a width for each group. The same words for every
method.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nicprune.channels.groups import Group, Groups, Norms
from nicprune.codecs.anatomy import rate_distortion_loss
from nicprune.codecs.calling import run
from nicprune.codecs.provenance import provenance
from nicprune.codecs.zoo import lmbda_of
from nicprune.common.config import StrictConfig
from nicprune.common.errors import BudgetError, RecipeError, TrainingError, closest
from nicprune.pruning.budget import ROUND_TO, Budget, allocate_widths, check_feasible
from nicprune.pruning.masks import importance, masked_copy

if TYPE_CHECKING:
    from nicprune.pruning.cost import CostModel


class Target(StrictConfig):
    """The aim of a pruning method; exactly one of `budget` and `widths`.

    Attributes:
        budget: shares of the original codec, see `Budget`.
        widths: the width each channel group ends with, by name or pattern ("g_a.*": 48); others
            stay whole.
        round_to: widths that a budget leads to are multiples of this, in channels of layers (of
            heads, as many as that takes); given `widths` are taken as they are.
        latents: whether y and z may shrink too.
        side: "encoder" or "decoder": only what runs on this side alone shrinks and is trained. What
            writes or reads the bitstream stays as it is, so that the other side need not be
            changed.
        only: names or patterns of the groups that may shrink; all if not given.
        lmbda: trade-off by which photographs decide (`split: auto`, fisher); that of the codec's
            quality if not given.
        norms: whether channels that a norm computes over (LayerNorm, GroupNorm, and the like) are
            "pinned", or may go ("adapt"): its statistics are then of the channels that stay.
    """

    budget: Budget | None = None
    widths: dict[str, int] | None = None
    round_to: int = Field(default=ROUND_TO, ge=1, le=64)
    latents: bool = False
    side: Literal["encoder", "decoder"] | None = None
    only: list[str] | None = Field(default=None, min_length=1)
    lmbda: float | None = Field(default=None, gt=0)
    norms: Norms = "pinned"

    @model_validator(mode="after")
    def _one(self) -> Target:
        if self.latents and self.side is not None:
            raise ValueError(
                f"latents: true with side: {self.side} would change the bitstream, which the other"
                " side is to read or write"
            )
        if (self.budget is None) == (self.widths is None):
            raise ValueError("give either budget: {macs: 0.5} or widths: {'g_a.0': 48, ...}")
        return self

    def fixed_widths(self, groups: Groups) -> dict[str, int]:
        """Resolve `widths` to a width for each group named; later patterns win.

        Raises:
            RecipeError: a pattern matches no group, or a width is out of range.
        """
        resolved: dict[str, int] = {}
        free = {g.name: g for g in self.open(groups)}
        for pattern, width in (self.widths or {}).items():
            matched = [name for name in free if matches(name, pattern)]
            if not matched:
                raise RecipeError(
                    f"widths: no {groups.noun} matches {pattern!r}; {closest(pattern, free)}"
                )
            for name in matched:
                least = free[name].least
                if not least <= width <= free[name].width:
                    raise RecipeError(
                        f"widths: {name} can have {least} to {free[name].width} channels (got"
                        f" {width})"
                    )
                resolved[name] = width
        return resolved

    def open(self, groups: Groups) -> list[Group]:
        """Return the groups that are on the side asked for, and among those named.

        Raises:
            RecipeError: there is none.
        """
        found = [
            g
            for g in groups.prunable(latents=self.latents)
            if self.side is None or g in groups.on_side(self.side)
        ]
        if self.only is not None:
            for pattern in self.only:
                if not any(matches(g.name, pattern) for g in found):
                    raise RecipeError(
                        f"only: no {groups.noun} matches {pattern!r};"
                        f" {closest(pattern, [g.name for g in found])}"
                    )
            found = [g for g in found if any(matches(g.name, pattern) for pattern in self.only)]
        if not found and self.side is not None:
            raise RecipeError(f"side: {self.side} has no channel group of its own in this codec")
        return found

    def free(self, groups: Groups) -> list[Group]:
        """Return the groups that may shrink under this target."""
        if self.widths is not None:
            chosen = self.fixed_widths(groups)
            return [groups[name] for name in chosen if chosen[name] < groups[name].width]
        return self.open(groups)

    def check(self, groups: Groups, cost: CostModel) -> None:
        """Raise unless the target can be met."""
        if self.widths is not None:
            if not self.free(groups):
                raise RecipeError(
                    "widths: every channel group named keeps its whole width; there is nothing to"
                    " prune"
                )
            return
        assert self.budget is not None
        now = cost.totals()
        for name, limit in self.budget.limits(cost.original).items():
            if (reached := getattr(now, name)) <= limit:
                asked, there = self.budget.in_units_given(name, limit, reached, cost)
                raise BudgetError(f"{asked} is met already: the codec is at {there}")
        check_feasible(cost, self.free(groups), self.budget, self.round_to)

    def check_split_is_decided(self) -> None:
        """Raise unless the budget is divided between encoder and decoder, where it is to be."""
        if self.budget is not None and self.budget.split == "auto":
            raise TrainingError(
                "split: auto is decided by photographs:"
                " attached.prepare(calibration_images(folder)) first"
            )

    def choose(
        self, groups: Groups, cost: CostModel, scores: Mapping[str, np.ndarray], *, per_cost: bool
    ) -> dict[str, list[int]]:
        """Choose keep-lists by score (higher stays)."""
        if self.widths is not None:
            return {
                name: sorted(np.argsort(-np.asarray(scores[name]), kind="stable")[:width].tolist())
                for name, width in self.fixed_widths(groups).items()
                if name in scores  # those that keep their width are not scored
            }
        assert self.budget is not None
        self.check_split_is_decided()
        return allocate_widths(
            cost, self.free(groups), scores, self.budget, self.round_to, per_cost=per_cost
        )


def matches(name: str, pattern: str) -> bool:
    """Return whether a group's name fits a pattern with * and ?. Brackets are those of names, as in
    "g_a.13[0:8]"; a pattern without a match of that sort may use them as sets, as in "g_[as].*".
    """
    literal = pattern.replace("[", "[[]")
    return fnmatch.fnmatchcase(name, literal) or fnmatch.fnmatchcase(name, pattern)


SPLITS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the saving that the encoder is tried with."""


def resolve_split(
    target: Target,
    codec: nn.Module,
    groups: Groups,
    cost: CostModel,
    images: Sequence[Tensor],
    lmbda: float | None = None,
) -> Target:
    """Return the target with `split: auto` replaced by a share: that whose codec, channels closed
    by squared mask gradient and nothing trained, has the least rate-distortion loss on these
    images, (1, 3, H, W) in [0, 1].

    Raises:
        BudgetError: no split meets the budget.
    """
    if target.budget is None or target.budget.split != "auto":
        return target
    lmbda, metric = lmbda_of(codec, lmbda), provenance(codec).metric
    found = importance(codec, groups, target.free(groups), images, lmbda, metric)
    scores = {name: value.double().cpu().numpy() for name, value in found.items()}
    loss, tried, reason = rate_distortion_loss(lmbda, metric), {}, ""
    for split in SPLITS:
        fixed = target.model_copy(
            update={"budget": target.budget.model_copy(update={"split": split})}
        )
        try:
            keep = fixed.choose(groups, cost, scores, per_cost=True)
        except BudgetError as error:
            reason = str(error)
            continue
        masked = masked_copy(codec, groups.check(keep), groups).eval()
        with torch.no_grad():
            tried[split] = sum(float(loss(run(masked, image), image)["loss"]) for image in images)
    if not tried:
        raise BudgetError(f"no split between encoder and decoder meets it: {reason}")
    best = min(tried, key=lambda split: tried[split])
    return target.model_copy(update={"budget": target.budget.model_copy(update={"split": best})})
