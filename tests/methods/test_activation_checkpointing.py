"""Codecs that run layers again in the backward pass, to save memory (`torch.utils.checkpoint`):
methods learn there what they learn without, or end in an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressai.losses import RateDistortionLoss
from compressai.models import ScaleHyperprior
from helpers import METHOD_SETTINGS, same_state, state_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nicprune.codecs.nested_tensors import tensors_in
from nicprune.common.errors import TrainingError
from nicprune.methods import METHODS, Attached, attach


class Ends(nn.Module):
    """A transform that may keep none of its activations."""

    reentrant: bool | None = None

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Any:
        if self.reentrant is None or not torch.is_grad_enabled():
            return self.layers(x)
        if self.reentrant and not x.requires_grad:
            x = x.detach().requires_grad_()
        return checkpoint(self.layers, x, use_reentrant=self.reentrant)


class Checkpointed(ScaleHyperprior):
    def __init__(self) -> None:
        super().__init__(8, 12)
        self.g_a, self.g_s = Ends(self.g_a), Ends(self.g_s)


def image() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def attached(method: str) -> Attached:
    torch.manual_seed(0)
    config = METHOD_SETTINGS.get(method, {})
    named = [("none", {}), (method, config)] if method == "distillation" else [(method, config)]
    model = attach(Checkpointed(), named)
    model.prepare([image()])
    return model.train()


def step(model: Attached, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    for width in model.widths_per_step() or [None]:  # type: ignore[list-item]
        out = model(x, width=width)
        objective = model.objective(out, x) or RateDistortionLoss(0.01)(out, x)
        (objective["loss"] + model.loss(out, x)).backward()
    optimizer.step()
    model.after_step()


def trained(method: str, reentrant: bool | None) -> dict[str, Tensor]:
    model = attached(method)
    for module in model.codec.modules():
        if isinstance(module, Ends):
            module.reentrant = reentrant
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(4):
        step(model, optimizer, image())
    return state_of(model)


REFUSED = ("adaptation", "scalable_encoder", "slimmable")
"""Methods that put values in front of layers' parameters while a codec runs."""


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_learn_the_same_where_layers_run_again(method: str, reentrant: bool) -> None:
    if method in REFUSED:
        with pytest.raises(TrainingError, match="activation checkpointing inside the") as told:
            trained(method, reentrant)
        assert "\n" not in str(told.value)
        return
    if method == "distillation" and reentrant:  # activations without a gradient reach the loss
        with pytest.raises(TrainingError, match="use_reentrant=False") as told:
            trained(method, reentrant)
        assert "\n" not in str(told.value)
        return
    assert same_state(trained(method, None), trained(method, reentrant))


def test_features_of_the_backward_pass_are_not_compared() -> None:
    model = attached("distillation")
    for module in model.codec.modules():
        if isinstance(module, Ends):
            module.reentrant = False
    out = model(image())
    (out["x_hat"].mean() + model.loss(out, image())).backward()
    with pytest.raises(TrainingError, match="call loss once after each"):
        model.loss(out, image())


def test_clips_at_a_width_are_refused_too() -> None:
    config = {name: METHOD_SETTINGS[name] for name in ("slimmable", "temporal_entropy_model")}
    model = attach(Checkpointed(), list(config.items())).train()
    for module in model.codec.modules():
        if isinstance(module, Ends):
            module.reentrant = False
    out = model(torch.rand(1, 2, 3, 64, 64), width=1)
    with pytest.raises(TrainingError, match="activation checkpointing inside the"):
        sum(t.mean() for t in tensors_in(out) if t.requires_grad).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("method", REFUSED)
def test_calls_outside_of_the_backward_pass_are_not_looked_at(method: str) -> None:
    model = attached(method)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    step(model, optimizer, image())
    assert not nn.modules.module._global_forward_pre_hooks
    model.codec.g_s(torch.rand(1, 12, 4, 4)).sum().backward()
    checkpoint(nn.Conv2d(3, 3, 1), image().requires_grad_(), use_reentrant=False).sum().backward()


def test_a_backward_pass_that_fails_leaves_nothing_behind() -> None:
    def fail(gradient: Tensor) -> None:
        raise ValueError("of the user's")

    model = attached("slimmable")
    out = model(image(), width=1)["x_hat"]
    next(model.codec.g_a.parameters()).register_hook(fail)
    with pytest.raises(ValueError, match="of the user's"):
        out.mean().backward()
    model.codec.g_s(torch.rand(1, 12, 4, 4))
    assert not nn.modules.module._global_forward_pre_hooks


def test_tensors_are_found_in_what_codecs_return() -> None:
    a, b, c = (torch.zeros(1) for _ in range(3))
    found = list(tensors_in({"x": [a, (b, None)], "y": {"z": c}, "n": 3}))
    assert [id(t) for t in found] == [id(a), id(b), id(c)]
