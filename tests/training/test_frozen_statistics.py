"""What is not trained does not change by running either: batch norms of a frozen encoder, and
spectral norms, by `fit` and in a training loop of one's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import ScaleHyperprior
from helpers import QUICK_FIT, image
from torch import nn

from nicprune.methods import attach
from nicprune.storage.container import decode, encode
from nicprune.training.loop import fit


class WithNorms(ScaleHyperprior):
    """A codec with a batch norm on either side."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.g_a = nn.Sequential(*self.g_a, nn.BatchNorm2d(12))
        self.g_s = nn.Sequential(nn.BatchNorm2d(12), *self.g_s)


def made() -> Any:
    torch.manual_seed(0)
    codec = WithNorms().eval()
    codec.update()
    return codec


def kept(codec: nn.Module, end: str) -> dict[str, torch.Tensor]:
    """A copy of all that one transform holds."""
    return {k: v.clone() for k, v in codec.state_dict().items() if k.startswith(end)}


def own_loop(model: Any, few_photos: Path) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(3):
        x = torch.rand(2, 3, 64, 64)
        out = model(x)
        optimizer.zero_grad()
        loss = (out["x_hat"] - x).square().mean() + (model.loss(out, x) if model.methods else 0)
        loss.backward()
        optimizer.step()
        model.after_step()


def by_fit(model: Any, few_photos: Path) -> None:
    fit(model, few_photos, steps=3, **QUICK_FIT)


@pytest.mark.parametrize("train", [by_fit, own_loop])
@pytest.mark.parametrize(
    ("side", "frozen", "trained"), [("decoder", "g_a", "g_s"), ("encoder", "g_s", "g_a")]
)
def test_the_side_that_is_not_trained_stays(
    train: Any, side: str, frozen: str, trained: str, few_photos: Path
) -> None:
    codec = made()
    before = {end: kept(codec, end) for end in (frozen, trained)}
    attached = attach(
        codec, "mask_decay", budget={"macs": 0.9}, side=side, round_to=1, decay_steps=3
    )
    train(attached, few_photos)
    after = kept(codec, frozen)
    assert all(torch.equal(after[name], value) for name, value in before[frozen].items())
    changed = kept(codec, trained)
    assert any(
        "running" in name and not torch.equal(changed[name], value)
        for name, value in before[trained].items()
    )


@pytest.mark.parametrize("side", ["encoder", "decoder", "both"])
def test_of_a_plain_codec_too(side: str, few_photos: Path) -> None:
    codec = made()
    nn.utils.parametrizations.spectral_norm(codec.g_a[2])
    nn.utils.spectral_norm(codec.g_s[3])
    before = {end: kept(codec, end) for end in ("g_a", "g_s")}
    fit(codec, few_photos, steps=3, side=side, **QUICK_FIT)
    for end, one in (("g_a", "encoder"), ("g_s", "decoder")):
        same = all(torch.equal(kept(codec, end)[k], v) for k, v in before[end].items())
        assert same is (side not in ("both", one))


@pytest.mark.parametrize("train", [by_fit, own_loop])
@pytest.mark.parametrize("form", ["decoder_adapter", "low_rank"])
def test_adapted_codecs_read_their_old_files(form: str, train: Any, few_photos: Path) -> None:
    codec = made()
    picture = (image(codec)[0] * 255).round().byte()
    attached = attach(codec, "adaptation", form=form, domain="target")
    before, state = encode(attached, picture, domain="source"), codec.state_dict()
    state = {k: v.clone() for k, v in state.items()}
    seen = decode(attached, before)
    train(attached, few_photos)
    attached.eval()
    assert all(torch.equal(codec.state_dict()[k], v) for k, v in state.items())
    assert torch.equal(decode(attached, before), seen)


def test_modes_are_as_they_were_after_training(few_photos: Path) -> None:
    codec = made().train()
    codec.g_a[-1].eval()  # by the user's own choice
    codec.h_a.eval()
    modes = {name: module.training for name, module in codec.named_modules()}
    fit(codec, few_photos, steps=1, side="decoder", **QUICK_FIT)
    assert {name: module.training for name, module in codec.named_modules()} == modes


def test_detached_layers_are_in_the_codecs_mode() -> None:
    codec = made().train()
    settings = {"budget": {"macs": 0.9}, "round_to": 1, "decay_steps": 3}
    attached = attach(codec, "mask_decay", side="decoder", **settings)
    assert codec.training and not codec.g_a[-1].training
    assert attached.detach() is codec and codec.g_a[-1].training
