"""NetAdapt: widths are found by the loss that is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, built, image
from torch import Tensor, nn
from zoo_of_blocks import BLOCKS, block_codec

from nicprune.codecs.anatomy import rate_distortion_loss
from nicprune.codecs.calling import run
from nicprune.common.errors import BudgetError, RecipeError, TrainingError
from nicprune.methods import Attached, attach
from nicprune.methods.pruners import netadapt
from nicprune.pruning.cost import measure
from nicprune.pruning.masks import mask_channels, masked_copy
from nicprune.pruning.verification import difference
from nicprune.storage.named import load_codec

LMBDA = 0.01

DAILY = {"bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018"}
"""Architectures of the daily run: without a hyperprior, with one, with a context model."""


def photographs(count: int = 2, size: int = 64) -> list[Tensor]:
    """Smooth random images, which a trained codec codes like photographs."""
    torch.manual_seed(0)
    rough = torch.rand(count, 3, 8, 8)
    smooth = nn.functional.interpolate(rough, size=size, mode="bicubic").clamp(0, 1)
    return list(smooth.split(1))


def searched(codec: nn.Module, images: Sequence[Tensor], **more: Any) -> Attached:
    settings = {"budget": {"macs": 0.5}, "round_to": 1, "rounds": 2, "lmbda": LMBDA}
    attached = attach(codec, "netadapt", **settings | more)
    attached.prepare(images)
    return attached


def loss_of(codec: nn.Module, images: Sequence[Tensor]) -> float:
    loss, codec = rate_distortion_loss(LMBDA, "mse"), codec.eval()
    with torch.no_grad():
        return float(np.mean([float(loss(run(codec, x), x)["loss"]) for x in images]))


def loss_with(attached: Attached, keep: Mapping[str, Any], images: Sequence[Tensor]) -> float:
    groups = attached.groups
    return loss_of(masked_copy(attached.codec, groups.check(keep), groups), images)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in DAILY else pytest.mark.slow) for name in ARCHITECTURES],
)
def test_every_architecture_meets_the_budget_and_is_hardened_exactly(name: str) -> None:
    codec, _ = built(name)
    attached = searched(codec, [image(codec)], budget={"macs": 0.6})
    small = attached.harden()
    assert measure(small).macs == attached.cost.totals(attached.keep()).macs
    assert 0.4 < measure(small).macs / measure(codec).macs <= 0.6
    groups = attached.groups
    masked = masked_copy(codec, groups.check(attached.keep()), groups)
    assert difference(masked, small) < 1e-10


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if number % 4 == 0 else pytest.mark.slow)
        for number, name in enumerate(sorted(BLOCKS))
    ],
)
def test_every_layer_kind_is_searched(name: str) -> None:
    codec = block_codec(name)
    attached = searched(codec, [image(codec)], budget={"macs": 0.93})
    assert measure(attached.harden()).macs <= 0.93 * measure(codec).macs


@pytest.mark.parametrize(
    "budget",
    [
        {"macs": 0.4},
        {"params": 0.5},
        {"encoder": 0.5, "decoder": 0.8},
        {"kmac": 1.0},
        {"macs": 0.5, "split": 0.7},
        {"macs": 0.5, "split": "auto"},
        {"macs": 0.9, "encoder": 0.5},
    ],
    ids=str,
)
def test_every_limit_holds(budget: dict[str, Any]) -> None:
    codec, _ = built("bmshj2018-hyperprior")
    attached = searched(codec, [image(codec)], budget=budget)
    budget = attached.methods[0].config.budget  # type: ignore[attr-defined]
    limits = budget.limits(attached.cost.original)  # type: ignore[attr-defined]
    found = measure(attached.harden())
    assert all(getattr(found, name) <= limit for name, limit in limits.items())


def test_no_group_can_be_widened_again_with_profit() -> None:
    codec, images = load_codec("demo-hyperprior", 1), photographs()
    attached = searched(codec, images, round_to=16)
    keep, limit = attached.keep(), 0.5 * attached.cost.original.macs
    before, tried = loss_with(attached, keep, images), 0
    for group in attached.groups.prunable():
        gone = np.setdiff1d(np.arange(group.width), keep.get(group.name, range(group.width)))
        if len(gone):
            # Which of those that went would come back is the method's to know: all combinations of
            # neighbours are looked at.
            for first in range(0, len(gone) - 15, 16):
                wider = {**keep, group.name: sorted([*keep[group.name], *gone[first : first + 16]])}
                if attached.cost.totals(wider).macs <= limit:
                    tried += 1
                    assert loss_with(attached, wider, images) >= before
    assert tried or attached.cost.totals(keep).macs > 0.95 * limit


def test_dead_channels_go_first_and_cost_nothing() -> None:
    codec, images = load_codec("demo-hyperprior", 1), photographs()
    groups = attach(codec, "none").groups
    alive = {group.name: np.arange(0, group.width, 2) for group in groups.prunable()}
    mask_channels(codec, alive, groups)
    before = loss_of(codec, images)
    found = searched(codec, images, budget={"macs": 0.6}, rounds=8)
    assert loss_of(found.harden(), images) == pytest.approx(before, rel=1e-6)


def test_the_loss_is_lower_than_by_squared_gradients() -> None:
    codec, images = load_codec("demo-hyperprior", 1), photographs()
    fisher = attach(codec, "fisher", budget={"macs": 0.5}, lmbda=LMBDA)
    fisher.prepare(images)
    by_rounds = [
        loss_of(searched(codec, images, round_to=16, rounds=rounds).harden(), images)
        for rounds in (1, 6)
    ]
    assert by_rounds[1] < by_rounds[0]
    assert by_rounds[1] < 0.9 * loss_of(fisher.harden(), images)


def test_one_group_loses_its_least_important_channels() -> None:
    codec, groups = built("bmshj2018-hyperprior")
    only, images = groups.prunable()[0].name, photographs()
    attached = searched(codec, images, budget={"macs": 0.97}, only=[only], rounds=1)
    fisher = attach(codec, "fisher", budget={"macs": 0.97}, round_to=1, only=[only], lmbda=LMBDA)
    fisher.prepare(images)
    assert set(attached.keep()) == {only}
    assert len(attached.keep()[only]) < groups[only].width
    assert list(attached.keep()[only]) == list(fisher.keep()[only])


def test_importance_is_measured_anew_on_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, groups = built("bmshj2018-hyperprior")
    seen: list[int] = []
    real = netadapt.importance

    def counted(masked: nn.Module, *rest: Any) -> Any:
        seen.append(sum(int((p == 0).sum()) for p in masked.parameters()))
        return real(masked, *rest)

    monkeypatch.setattr(netadapt, "importance", counted)
    searched(codec, [image(codec)], rounds=4)
    assert len(seen) >= 4 and seen == sorted(seen) and seen[0] < seen[-1]


def test_the_middle_of_large_images_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, _ = built("bmshj2018-factorized")
    monkeypatch.setattr(netadapt, "SIDE", 64)
    whole = torch.zeros(1, 3, 64, 192)
    whole[:, :, :, 64:128] = image(codec)
    other = torch.ones_like(whole)
    other[:, :, :, 64:128] = image(codec)
    found = [searched(codec, [x]).keep() for x in (whole, other, image(codec))]
    assert found[0] == found[1] == found[2]
    assert searched(codec, [torch.rand(1, 3, 64, 64)]).keep() != found[0]


def test_one_side_and_the_latents_as_asked() -> None:
    codec, groups = built("bmshj2018-hyperprior")
    images = [image(codec)]
    decoder = {group.name for group in groups.on_side("decoder")}
    assert set(searched(codec, images, side="decoder", budget={"macs": 0.9}).keep()) <= decoder
    latent = {group.name for group in groups if group.latent is not None}
    assert not latent & {
        name
        for name, kept in searched(codec, images).keep().items()
        if len(kept) < groups[name].width
    }
    thin = searched(codec, images, latents=True, only=sorted(latent), budget={"macs": 0.97})
    assert thin.harden() is not None and set(thin.keep()) <= latent


def test_the_codec_is_left_as_it_was() -> None:
    codec, _ = built("mbt2018-mean")
    codec.train()
    x = image(codec)
    state = {name: value.clone() for name, value in codec.state_dict().items()}
    random = torch.get_rng_state()
    searched(codec, [x])
    assert torch.equal(random, torch.get_rng_state()) and codec.training
    assert all(torch.equal(value, state[name]) for name, value in codec.state_dict().items())


def test_what_it_cannot_do_is_said_in_one_line() -> None:
    codec, _ = built("bmshj2018-hyperprior")
    with pytest.raises(RecipeError, match="searches for widths: give a budget"):
        attach(codec, "netadapt", widths={"g_a.*": 4})
    with pytest.raises(TrainingError, match="has seen no photographs yet"):
        attach(codec, "netadapt", budget={"macs": 0.5}, round_to=1).harden()
    with pytest.raises(BudgetError, match="cannot be met"):
        attach(codec, "netadapt", budget={"macs": 0.0001}, round_to=1)
    with pytest.raises(RecipeError, match="rounds"):
        attach(codec, "netadapt", budget={"macs": 0.5}, rounds=0)


def test_a_loss_that_is_none_is_never_chosen() -> None:
    """One group's channels hold the loss finite: without them it is not a number."""
    codec, groups = built("bmshj2018-factorized")
    attached = attach(codec, "netadapt", budget={"macs": 0.7}, round_to=1, rounds=1, lmbda=LMBDA)
    method: Any = attached.methods[0]
    first = groups.prunable()[0].name
    real = method._loss

    def spoilt(keep: Mapping[str, np.ndarray], images: Sequence[Tensor]) -> float:
        broken = len(keep[first]) < groups[first].width
        return float("inf") if broken else float(real(keep, images))

    method._loss = spoilt
    attached.prepare([image(codec)])
    assert len(attached.keep().get(first, range(groups[first].width))) == groups[first].width


@pytest.mark.parametrize("better", [0, 1])
def test_what_still_fits_comes_back_most_important_first(better: int) -> None:
    codec, groups = built("bmshj2018-hyperprior")
    cost = attach(codec, "none").cost
    pair = [group.name for group in groups.prunable()[:2]]
    without = [cost.totals({name: groups[name].width - 1 for name in [one]}).macs for one in pair]
    share = max(without) / cost.totals().macs
    attached = attach(codec, "netadapt", budget={"macs": share}, round_to=1, only=pair)
    method: Any = attached.methods[0]
    keep = {name: np.arange(groups[name].width - 1) for name in pair}
    removed = {name: np.array([groups[name].width - 1]) for name in pair}
    worth = {name: np.array([float(i == better)]) for i, name in enumerate(pair)}
    method._put_back(keep, removed, worth)
    lengths = [groups[name].width - len(keep[name]) for name in pair]
    assert lengths == [int(i != better) for i in range(2)], "one fits, not both"
