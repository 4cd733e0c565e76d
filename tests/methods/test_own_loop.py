"""In a training loop of one's own, as docs/howto/own_loop.md shows it: what methods do not train
keeps its bits, whatever the optimiser is.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compressai.losses import RateDistortionLoss
from compressai.optimizers import net_aux_optimizer
from helpers import built, state_of
from torch import nn

from nicprune.codecs.roles import on_side
from nicprune.common.errors import TrainingError
from nicprune.methods import Attached, attach
from nicprune.storage.adaptation import save_adaptation
from nicprune.storage.container import decode, encode
from nicprune.training.loop import fit


def image() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


QUICK: dict[str, Any] = {"steps": 2, "batch_size": 1, "patch_size": 64, "progress": False}


def train(model: nn.Module, steps: int = 3, kind: str = "AdamW") -> None:
    """Train as the page does."""
    loss = RateDistortionLoss(0.01)
    optimizers = net_aux_optimizer(
        model, {"net": {"type": kind, "lr": 1e-3}, "aux": {"type": kind, "lr": 1e-2}}
    )
    given: Any = model.train()
    for _ in range(steps):
        batch = image()
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        out = given(batch)
        (loss(out, batch)["loss"] + given.loss(out, batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers["net"].step()
        given.after_step()
        given.aux_loss().backward()
        optimizers["aux"].step()


def changed(codec: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in codec.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_one_side_alone_learns(side: str) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    original, before = copy.deepcopy(codec), state_of(codec)
    budget = {side: 0.7}
    model = attach(codec, "mask_decay", side=side, budget=budget, decay_steps=3, round_to=1)
    train(model)
    learnt = changed(codec, before)
    assert learnt and all(on_side(codec, name, side) for name in learnt)
    picture = (image()[0] * 255).byte()
    if side == "encoder":
        small = model.harden().eval()
        assert decode(original, encode(small, picture)).shape == picture.shape
        grads = [p.requires_grad for p in small.parameters()]
        assert all(grads)


@pytest.mark.parametrize(
    "settings",
    [
        {"form": "low_rank"},
        {"form": "grow", "grow": 0.25, "round_to": 4},
        {"form": "decoder_adapter"},
    ],
    ids=lambda settings: settings["form"],
)
def test_the_source_of_an_adaptation_keeps_its_bits(settings: Any, tmp_path: Any) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    before, picture = state_of(codec), (image()[0] * 255).byte()
    old = encode(copy.deepcopy(codec), picture)
    model = attach(codec, "adaptation", domain="mine", **settings)
    train(model)
    assert not changed(codec, before)
    assert decode(model.eval(), old).shape == picture.shape
    save_adaptation(model, tmp_path / "mine.safetensors")


def test_copies_hold_too_and_detaching_lets_go() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    settings: dict[str, Any] = {"side": "encoder", "budget": {"encoder": 0.7}, "round_to": 1}
    model = attach(codec, "mask_decay", decay_steps=3, **settings)
    train(model, 1)
    twin = copy.deepcopy(model)
    before = state_of(twin.codec)
    train(twin)
    assert all(on_side(twin.codec, name, "encoder") for name in changed(twin.codec, before))
    plain, before = model.detach(), state_of(codec)
    out = plain.train()(image())
    out["x_hat"].square().mean().backward()
    assert plain.g_s[0].weight.grad is not None
    assert plain is codec and not changed(codec, before)


def test_fit_trains_both_sides_where_it_is_asked_to() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    settings: dict[str, Any] = {"side": "encoder", "budget": {"encoder": 0.7}, "round_to": 1}
    model = attach(codec, "mask_decay", decay_steps=3, **settings)
    train(model, 1)  # drops gradients of the decoder
    before = state_of(codec)
    fit(model, "samples", side="both", **QUICK)
    assert any(name.startswith("g_s.") for name in changed(codec, before))
    before = state_of(codec)
    train(model, 1)
    assert not any(name.startswith("g_s.") for name in changed(codec, before))


@pytest.mark.parametrize("method", ["mask_decay", "group_lasso"])
def test_averaged_masks_are_not_hardened(method: str) -> None:
    """The average of masks over steps is not zero where the last ones are."""
    model = attach(
        built("bmshj2018-hyperprior")[0],
        method,
        budget={"macs": 0.7},
        round_to=1,
        decay_steps=4,
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for _ in range(4):
        train(model, 1, "Adam")
        average.update_parameters(model)
    averaged: Attached = average.module
    assert model.done and averaged.done
    with pytest.raises(TrainingError, match=r"not zero .*masked.after_step\(\)"):
        averaged.harden()
    averaged.after_step()
    small, x = averaged.harden(), image()
    with torch.no_grad():
        expected, found = averaged.eval()(x)["x_hat"], small(x)["x_hat"]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
