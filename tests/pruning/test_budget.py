"""Budgets are met from below, as closely as the rounding allows, or refused before anything
changes.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from helpers import built, same_state, state_of

from nicprune.channels.groups import Groups
from nicprune.codecs.provenance import provenance
from nicprune.common.config import parse
from nicprune.common.errors import BudgetError, RecipeError
from nicprune.methods import attach
from nicprune.pruning.budget import KMAC, Budget, allocate_widths, move_to_budget, next_width
from nicprune.pruning.cost import CostModel, measure
from nicprune.pruning.surgery import analyse
from nicprune.pruning.target import Target

BUDGETS = [
    {"macs": 0.5},
    {"macs": 0.2},
    {"encoder": 0.6, "decoder": 0.4},
    {"decoder": 0.35},
    {"params": 0.4},
    {"macs": 0.5, "params": 0.3},
    {"decoder_kmac": 1.5},
]


def scores(groups: Groups, seed: int, latents: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {g.name: rng.uniform(0, 1, g.width) for g in groups.prunable(latents=latents)}


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018", "cheng2020-attn"])
def test_met_from_below_and_nothing_more_fits(
    name: str, budget: dict[str, float], latents: bool
) -> None:
    codec, groups = built(name)
    cost, wanted, step = CostModel(codec, groups), Budget(**budget), 2
    importance = scores(groups, 1, latents)
    for per_cost in (True, False):
        keep = allocate_widths(
            cost, groups.prunable(latents=latents), importance, wanted, step, per_cost=per_cost
        )
        totals = cost.totals(keep)
        assert all(getattr(totals, k) <= limit for k, limit in wanted.limits(cost.original).items())
        for group in groups.prunable(latents=latents):
            kept = keep[group.name]
            assert len(kept) == group.width or len(kept) % step == 0
            assert len(kept) >= 2
            # Those of the highest scores, in order.
            assert kept == sorted(np.argsort(-importance[group.name])[: len(kept)].tolist())
            if len(kept) < group.width:
                more = cost.totals(
                    {
                        **{n: len(k) for n, k in keep.items()},
                        group.name: min(len(kept) + step, group.width),
                    }
                )
                assert any(
                    getattr(more, k) > limit for k, limit in wanted.limits(cost.original).items()
                ), f"{group.name} could have stayed wider"


@pytest.mark.parametrize("round_to", [1, 8, 16])
def test_widths_are_multiples(round_to: int) -> None:
    codec, groups = built("cheng2020-anchor")
    cost = CostModel(codec, groups)
    free = groups.prunable(latents=True)
    budget = Budget(macs=0.7 if round_to > 1 else 0.3)
    if round_to == 16:
        with pytest.raises(BudgetError, match="round_to"):
            allocate_widths(cost, free, scores(groups, 0, True), Budget(macs=0.1), round_to)
        return
    keep = allocate_widths(cost, free, scores(groups, 0, True), budget, round_to)
    assert all(len(k) == groups[n].width or len(k) % round_to == 0 for n, k in keep.items())


def test_what_is_left_whole_is_named() -> None:
    """In the message of a budget that is out of reach for its sake."""
    codec = built("bmshj2018-hyperprior")[0]
    tied: Any = codec.h_s  # type: ignore[union-attr]
    tied[0].weight = codec.h_s[2].weight  # type: ignore[union-attr,index]
    cost = CostModel(codec, groups := analyse(codec))
    held = [group for group in groups if group.pinned]
    assert held
    with pytest.raises(BudgetError) as error:
        attach(codec, "magnitude", budget={"macs": 0.0001})
    assert str(error.value).endswith(
        f"{len(held)} groups are left whole: {held[0].name} ({held[0].pinned}), ..."
    )
    assert cost.groups is groups
    with pytest.raises(BudgetError) as error:
        attach(built("bmshj2018-hyperprior")[0], "magnitude", budget={"macs": 0.0001})
    assert "whole" not in str(error.value)


@pytest.mark.parametrize("method", ["mask_decay", "magnitude", "channel_gating"])
def test_a_limit_is_told_in_the_unit_that_it_was_given_in(method: str) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    cost = measure(codec)
    for name, total in KMAC.items():
        few = cost.kmac_per_pixel(total) / 1e4
        with pytest.raises(BudgetError, match=rf"^budget {name}: {few:.4g} cannot be met") as error:
            attach(codec, method, budget={name: few})
        assert re.search(r"[\d.]+ kMAC/pixel remains", str(error.value))
        with pytest.raises(
            BudgetError, match=rf"^budget {total}: 0.0001 cannot .* of the original"
        ):
            attach(codec, method, budget={total: 0.0001})


@pytest.mark.parametrize("method", ["mask_decay", "magnitude"])
def test_a_budget_that_is_met_is_told_in_its_unit(method: str) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    now = measure(codec).kmac_per_pixel()
    with pytest.raises(BudgetError, match=rf"budget kmac: 99 is met .* at {now:.4g} kMAC/pixel"):
        attach(codec, method, budget={"kmac": 99})


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({"side": "encoder"}, {"decoder": 0.5}),
        ({"side": "decoder"}, {"encoder": 0.5}),
        ({"only": ["g_s.*"]}, {"encoder": 0.5}),
        ({"round_to": 64}, {"macs": 0.5}),  # wider than any group
    ],
)
def test_groups_that_do_not_lower_what_is_limited_are_the_reason(
    settings: dict[str, Any], budget: dict[str, float]
) -> None:
    with pytest.raises(BudgetError, match=r"no group that may shrink .* lowers it, and 1 of the"):
        attach(built("bmshj2018-hyperprior")[0], "magnitude", budget=budget, **settings)


def test_next_width() -> None:
    assert [next_width(w, 16) for w in (192, 191, 40, 17, 16, 3)] == [176, 176, 32, 16, 16, 3]
    assert (
        next_width(3, 1, least=2) == 2
        and next_width(2, 1, least=2) == 2
        and next_width(2, 1) == 1
        and next_width(1, 1) == 1
        and [next_width(w, 8, least=0) for w in (20, 16, 8, 3, 0)] == [16, 8, 0, 0, 0]
    )


@pytest.mark.parametrize("budget", [{"macs": 0.0001}, {"decoder": 0.001}, {"params": 0.0001}])
def test_an_impossible_budget_is_refused_before_anything_changes(budget: dict[str, float]) -> None:
    codec, _ = built("bmshj2018-hyperprior")
    before = state_of(codec)
    for method in ("mask_decay", "magnitude", "random"):
        with pytest.raises(BudgetError, match=r"cannot be met.*round_to 1"):
            attach(codec, method, budget=budget, round_to=1)
    assert same_state(before, codec.state_dict()) and not any(
        m._forward_hooks or m._forward_pre_hooks for m in codec.modules()
    )


@pytest.mark.parametrize(
    "budget",
    [
        {"macs": 0},
        {"macs": 1},
        {"macs": -0.5},
        {"macs": float("nan")},
        {},
        {"mac": 0.5},
        {"macs": "half"},
        {"kmac": 0},
        {"kmac": float("inf")},
        {"kmac": 20, "macs": 0.5},
        {"decoder_kmac": 20, "decoder": 0.5},
        {"kmac": 20, "decoder_kmac": 20, "split": 0.5},
    ],
)
def test_a_senseless_budget_is_refused(budget: dict[str, object]) -> None:
    with pytest.raises(RecipeError) as error:
        parse(Target, {"budget": budget}, "attach(...)")
    assert "\n" not in str(error.value) and "budget" in str(error.value)


def test_a_budget_is_relative_to_the_original_at_a_second_pruning() -> None:
    codec, groups = built("bmshj2018-hyperprior")
    original = CostModel(codec, groups).totals()
    first = attach(codec, "magnitude", budget={"macs": 0.6}, round_to=1).harden()
    assert provenance(first).original == original.as_dict()
    second = attach(first, "magnitude", budget={"macs": 0.3}, round_to=1)
    assert second.cost.original == original
    small = second.harden()
    share = CostModel(small, Groups([])).totals().macs / original.macs
    assert 0.28 < share <= 0.3
    assert (
        len(provenance(small).history) == 2
        and len(provenance(first).history) == 1
        and not provenance(codec).history
    )
    with pytest.raises(BudgetError, match="met already"):
        attach(small, "magnitude", budget={"macs": 0.5}, round_to=1)


def test_fixed_widths_by_pattern() -> None:
    _, groups = built("bmshj2018-hyperprior")
    target = Target(widths={"g_a.*": 12, "g_a.2": 5})
    assert target.fixed_widths(groups) == {"g_a.0": 12, "g_a.2": 5, "g_a.4": 12}
    with pytest.raises(RecipeError, match="did you mean"):
        Target(widths={"g_b.0": 12}).fixed_widths(groups)
    with pytest.raises(RecipeError, match="1 to 16"):
        Target(widths={"g_a.0": 17}).fixed_widths(groups)
    with pytest.raises(RecipeError, match="either budget"):
        parse(Target, {"budget": {"macs": 0.5}, "widths": {"g_a.0": 8}}, "x")


@pytest.mark.parametrize(
    "guess",
    [lambda used: (used - 1) * 2, lambda used: 0.01, lambda used: -5.0, lambda used: 50.0],
    ids=["good", "short", "wrong", "far"],
)
@pytest.mark.parametrize("start", [0.0, 0.9, -30.0])
@pytest.mark.parametrize("steps", [1000, 7])
def test_thresholds_are_shifted_until_the_budget_is_met_and_used(
    guess: Any, start: float, steps: int
) -> None:
    places, measured = [0.0], []

    def measure() -> float:  # falls in steps, from 2 at -1 to 0.4 at 1
        at = min(max(start + places[-1], -1), 1)
        measured.append(math.ceil((2 - 0.8 * (at + 1)) * steps) / steps)
        return measured[-1]

    def guessed(now: float) -> float:
        assert now == places[-1]
        return float(guess(measured[-1]))

    move_to_budget(places.append, measure, guessed, 100.0)
    assert measured[-1] <= 1 and len(measured) <= 18
    assert measured[-1] == measure(), "what was measured last is what is left"
    if guess(2.0) == 2.0:
        assert measured[-1] >= (0.98 if steps == 1000 else 1 - 1 / 7)


def test_kmac_per_pixel_is_the_share_of_the_original() -> None:
    original = CostModel(*built("bmshj2018-hyperprior")).original
    for kmac, share in KMAC.items():
        half = original.kmac_per_pixel(share) / 2
        assert Budget(**{kmac: half}).limits(original) == pytest.approx(
            Budget(**{share: 0.5}).limits(original)
        )
    split = Budget(kmac=original.kmac_per_pixel() / 2, split=0.3)
    assert split.limits(original) == pytest.approx(Budget(macs=0.5, split=0.3).limits(original))


def test_kmac_that_the_codec_does_not_have_is_refused() -> None:
    codec, _ = built("bmshj2018-hyperprior")
    with pytest.raises(BudgetError, match=r"is met already: the codec is at .* kMAC/pixel"):
        attach(codec, "magnitude", budget={"decoder_kmac": 1e6})
