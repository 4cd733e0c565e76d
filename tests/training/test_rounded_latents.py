"""Rounded latents in training: every codec trains what it is used with, and gradients stay."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, METHOD_SETTINGS, M, N, built
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.entropy import entropy_models
from nicprune.methods import attach
from nicprune.training.loop import fit
from nicprune.training.rounded_latents import rounded_latents

ROUND_THEMSELVES = (
    "cheng2020-anchor-checkerboard",
    "elic2022-official",
    "elic2022-chandelier",
    "bmshj2018-hyperprior-vbr",
    "mbt2018-mean-vbr",
    "mbt2018-vbr",
)
"""Codecs that decode rounded latents in training anyway."""

SERIAL = ("mbt2018", "cheng2020-anchor", "cheng2020-attn")
"""Codecs whose y is rounded relative to means that are known pixel by pixel."""


def outputs(codec: nn.Module, image: Tensor, training: bool) -> Any:
    torch.manual_seed(0)
    return codec.train(training)(image)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_decodes_what_is_decoded_in_use(name: str) -> None:
    codec = built(name)[0]
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        in_use, noisy = outputs(codec, image, False), outputs(codec, image, True)
        with rounded_latents(codec):
            inside = outputs(codec, image, False)
            rounded = outputs(codec, image, True)
        after = outputs(codec, image, True)
    top = float(in_use["x_hat"].abs().max())
    same = torch.allclose(rounded["x_hat"], in_use["x_hat"], atol=1e-5 * top)
    assert same == (name not in SERIAL)
    assert torch.equal(inside["x_hat"], in_use["x_hat"]), "nothing changes outside of training"
    assert torch.equal(after["x_hat"], noisy["x_hat"]), "nothing stays after the block"
    if name not in ROUND_THEMSELVES:
        assert not torch.allclose(noisy["x_hat"], in_use["x_hat"], atol=1e-4 * top)
    # The rate stays that of noisy latents: of the innermost ones it is the same to the bit.
    innermost = list(in_use["likelihoods"])[-1]
    assert torch.equal(rounded["likelihoods"][innermost], noisy["likelihoods"][innermost])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_reach_all_that_noisy_latents_reach(name: str) -> None:
    def reached(rounding: bool) -> dict[str, bool]:
        codec = built(name)[0]
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with rounded_latents(codec) if rounding else nullcontext():
            out = outputs(codec, image, True)
        rate = sum(p.log().mean() for p in out["likelihoods"].values())
        (out["x_hat"].square().mean() + rate).backward()
        return {n: p.grad is not None and bool(p.grad.any()) for n, p in codec.named_parameters()}

    assert reached(True) == reached(False)


def test_the_gradient_passes_the_rounding_unchanged() -> None:
    codec = built("mbt2018-mean")[0].train()
    for model in entropy_models(codec):
        given = torch.randn(2, M if hasattr(model, "scale_table") else N, 4, 4, requires_grad=True)
        means = torch.randn_like(given).requires_grad_()
        conditional = hasattr(model, "scale_table")
        further = (torch.ones_like(given), means) if conditional else ()
        with rounded_latents(codec):
            latents, _ = model(given, *further)
            again = model.quantize(given, "noise", means)
        if conditional:
            assert torch.equal(latents, (given - means).round() + means)
        assert torch.equal(again, (given - means).round() + means)
        for rounded in (latents, again):
            gradients = torch.autograd.grad(rounded.sum(), (given, means), allow_unused=True)
            assert gradients[0] is not None
            assert torch.equal(gradients[0], torch.ones_like(given))
            assert gradients[1] is None, "noise does not depend on means"


@pytest.mark.parametrize("name", ["bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018-mean"])
def test_masked_latents_stay_masked(name: str) -> None:
    """A masked channel is not there for what reads it: its median is not put in its place."""
    codec = built(name)[0]
    attached = attach(codec, "mask_decay", **METHOD_SETTINGS["mask_decay"], latents=True)
    masks: Any = attached.methods[0].masks
    seen: list[Tensor] = []
    bottleneck: Any = codec.get_submodule("entropy_bottleneck")
    bottleneck.register_forward_hook(lambda _, args, output: seen.append(output[0].detach()))
    with torch.no_grad():
        bottleneck.quantiles[:, :, 1] = 0.3
        for group in attached.groups.prunable(latents=True):
            if any(member.module == "entropy_bottleneck" for member in group.members):
                masks[group.name][1::2] = 0
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with rounded_latents(attached), torch.no_grad():
        for training in (False, True):
            outputs(attached, image, training)
    assert torch.equal(*seen)
    assert not seen[0][:, 1::2].any() and bool(seen[0][:, ::2].any())


def test_blocks_may_be_nested_and_leave_what_was_there() -> None:
    codec: Any = built("mbt2018-mean")[0].train()
    own = codec.gaussian_conditional.quantize
    codec.gaussian_conditional.quantize = own  # a user's
    y = torch.randn(1, M, 4, 4)
    with rounded_latents(codec), rounded_latents(codec):
        assert torch.equal(codec.gaussian_conditional(y, torch.ones_like(y))[0], y.round())
        assert torch.equal(
            codec.gaussian_conditional(y, torch.ones_like(y), None, True)[0], y.round()
        )
    assert vars(codec.gaussian_conditional)["quantize"] is own
    assert not any({"quantize", "forward"} & vars(m).keys() for m in [codec.entropy_bottleneck])
    assert codec.gaussian_conditional.training


def test_fit_gives_decoders_rounded_latents_where_asked_to() -> None:
    for latents, whole in (("noisy", False), ("rounded", True)):
        codec = built("bmshj2018-hyperprior")[0]
        masked = attach(codec, "mask_decay", **METHOD_SETTINGS["mask_decay"])
        seen: list[bool] = []
        codec.get_submodule("g_s").register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(bool((args[0] == args[0].round()).all()))
        )
        fit(
            masked,
            "samples",
            steps=6,
            batch_size=1,
            patch_size=64,
            lmbda=0.01,
            latents=latents,
            progress=False,
        )
        assert seen == [whole] * 6
        assert not any("quantize" in vars(model) for model in entropy_models(codec))
