"""Trials in float64 of what a kind claims of a layer of somebody else's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-10
"""Largest difference, relative to the largest value of the output."""

SIDES = (8, 16, 32, 64)
"""Sides of the images that a layer is tried with, until it runs on one."""


@torch.no_grad()
def fault_of_mask_on_weight(twin: Any, kind: Any) -> str:
    """Return why scales of outputs and inputs, and an offset, cannot be written into weight and
    bias, as `mask_on_weight` of the layer's kind says, and what to do; empty if they can.

    Args:
        twin: a copy of the layer in float64, whose parameters are drawn anew.
    """
    name = type(twin).__name__
    advice = (
        f"register {name} with a kind whose mask_on_weight is False, as class My{name}Kind(Linear"
        " or Convolution): mask_on_weight = False"
    )
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    out, inn = kind.widths(twin)
    for parameter in twin.parameters():
        parameter.copy_(rand(*parameter.shape) + 0.5)
    x, reason = None, ""
    for side in SIDES:
        given = rand(2, side, inn) if kind.channel_axis == -1 else rand(1, inn, side, side)
        try:
            y = twin(given)
            x = given
            break
        except Exception as error:  # a foreign layer's own code may raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
    if x is None:
        return (
            f"{name} cannot be tried on a tensor of its own: {reason}; mask_on_weight has to be"
            f" shown: {advice}"
        )
    scale, offset, before = rand(out) + 0.5, rand(out), rand(inn) + 0.5
    shape = [1] * x.dim()
    shape[kind.channel_axis] = -1
    other = copy.deepcopy(twin)
    other.weight.mul_(kind.along(other, "out", scale))
    other.weight.mul_(kind.along(other, "in", 1 / before))
    expected = y * scale.view(shape)
    if other.bias is not None:
        other.bias.mul_(scale).add_(offset)
        expected = expected + offset.view(shape)
    found = other(x * before.view(shape))
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= (
        TOLERANCE * float(expected.abs().max())
    ):
        return (
            f"{name} does not compute as its kind says: a scale of its outputs cannot be written"
            f" into weight and bias, as the bias is not added last and unscaled; {advice}"
        )
    return ""
