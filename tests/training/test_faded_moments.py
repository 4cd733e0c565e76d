"""Optimisers whose moments of channels without gradients fade: to zero, not to denormal numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import built
from torch import Tensor, nn
from torch.optim import Optimizer

from nicprune.data.images import write_png
from nicprune.training import run
from nicprune.training.faded_moments import EVERY, drop_faded_moments
from nicprune.training.loop import fit
from nicprune.training.optimizers import OPTIMIZERS, make_optimizer

SMALLEST = torch.finfo(torch.float32).tiny


def moments_of(optimizer: Optimizer) -> list[Tensor]:
    found = []
    for state in optimizer.state.values():
        found += [state["exp_avg"], state["exp_avg_sq"], *state.get("GG", ())]
    return [m for m in found if len(m)]


def denormal(optimizer: Optimizer) -> int:
    return sum(int(((m != 0) & (m.abs() < SMALLEST)).sum()) for m in moments_of(optimizer))


def train(name: str, steps: int, drop: bool, scale: float = 1.0) -> tuple[Tensor, list[int]]:
    """A weight half of whose filters have no gradient from the fifth step on, and how many moments
    were denormal after each step.
    """
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 6, 3, 3, generator=generator))
    optimizer: Any = make_optimizer(name, [weight], lr=1e-3)
    found = []
    for step in range(steps):
        weight.grad = 1e-3 * scale * torch.randn(weight.shape, generator=generator)
        if step >= 5:
            weight.grad[:4] = 0
        optimizer.step()
        if drop and step % EVERY == 0:
            drop_faded_moments(optimizer)
        found.append(denormal(optimizer))
    return weight.detach(), found


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_no_moment_becomes_denormal(name: str) -> None:
    assert max(train(name, 1400, drop=False, scale=1e-3)[1]) > 50, "they would"
    assert max(train(name, 1400, drop=True, scale=1e-3)[1]) == 0


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_steps_are_the_same_to_the_bit(name: str, scale: float) -> None:
    with_them, without = (train(name, 600, drop, scale)[0] for drop in (False, True))
    assert torch.equal(with_them, without)


def test_fit_looks_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Optimizer] = []
    monkeypatch.setattr(run, "drop_faded_moments", asked.append)
    write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    codec = built("bmshj2018-factorized")[0]
    settings: Any = {"batch_size": 1, "patch_size": 64, "lmbda": 0.01}
    fit(codec, str(tmp_path), steps=EVERY + 1, **settings)
    assert len(asked) == 2 and moments_of(asked[0])
