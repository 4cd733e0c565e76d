"""Rounded latents in training: what decodes is given the latents that it will be given in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.entropy import entropy_models


@contextmanager
def rounded_latents(model: nn.Module) -> Iterator[None]:
    """Inside the block, give all that reads latents in training the rounded ones: synthesis
    transforms, hyper-synthesis transforms, context models. Gradients are those of noisy latents.
    The rate stays that of noisy latents, whose gradient is that of the expected rate.

    CompressAI gives noisy latents to both, so that a decoder is trained for others than it is used
    with. Source: Minnen and Singh, "Channel-wise autoregressive entropy models for learned image
    compression", ICIP 2020 (mixed quantisation).
    """
    handles, inside = [], set()

    def enter(module: nn.Module, args: Any) -> None:
        inside.add(module)

    def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        inside.discard(module)
        if not module.training or output is None:
            return None
        with torch.no_grad():
            exact = module.forward(*args, **{**kwargs, "training": False})[0]
        noisy, *rest = output
        return (_straight_through(exact, noisy), *rest)

    def rounding(module: Any) -> Any:
        quantize = module.quantize

        def rounded(inputs: Tensor, mode: str, means: Tensor | None = None) -> Any:
            # Inside its forward pass, a model asks for the noise that the rate is computed with.
            if mode != "noise" or module in inside:
                return quantize(inputs, mode, means)
            exact = quantize(inputs.detach(), "dequantize", means)
            return _straight_through(exact, inputs)

        return rounded

    models: list[Any] = list(entropy_models(model))
    for module in models:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        module.quantize = rounding(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in models:
            del module.quantize


def _straight_through(exact: Tensor, like: Tensor) -> Tensor:
    """Return `exact` with the gradients of `like`, to the bit."""
    rounded: Tensor = exact.to(like.dtype) + (like - like.detach())
    return rounded
