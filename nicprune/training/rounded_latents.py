"""Rounded latents in training: what decodes is given the latents that it will be given in use."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.entropy import entropy_models
from nicprune.pruning.views import override_attributes


@contextmanager
def rounded_latents(model: nn.Module) -> Iterator[None]:
    """Inside the block, give all that reads latents in training the rounded ones: synthesis and
    hyper-synthesis transforms, context models. Gradients are those of noisy latents, and so is the
    rate, which could not be learnt from rounded ones.

    CompressAI gives noisy latents to both, so that a decoder is trained for others than it is used
    with. Source: Minnen and Singh, "Channel-wise autoregressive entropy models for learned image
    compression", ICIP 2020 (mixed quantisation).

    Serial context models (mbt2018, cheng2020-anchor and -attn) keep noisy y: in use, y is rounded
    relative to means that are only known pixel by pixel.
    """
    inside: set[nn.Module] = set()
    models: list[Any] = list(entropy_models(model))
    with override_attributes(
        [
            (module, {"forward": _forward(module, inside), "quantize": _quantize(module, inside)})
            for module in models
        ]
    ):
        yield


def _forward(module: Any, inside: set[nn.Module]) -> Callable[..., Any]:
    """Return the forward pass of an entropy model whose latents are rounded in training."""
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        inside.add(module)
        try:
            latents, *rest = own(*args, **kwargs)
            if not module.training:
                return (latents, *rest)
            given = inspect.signature(own).bind(*args, **kwargs)
            given.arguments.pop("training", None)
            module.training = False
            try:
                with torch.no_grad():
                    exact = own(*given.args, **given.kwargs)[0]
            finally:
                module.training = True
            return (_straight_through(exact, latents), *rest)
        finally:
            inside.discard(module)

    return forward


def _quantize(module: Any, inside: set[nn.Module]) -> Callable[..., Any]:
    """Return `quantize` of an entropy model, which rounds where it is asked for noise from outside
    of the forward pass; in there, the rate is computed with the noise.
    """
    own = module.quantize

    def quantize(inputs: Tensor, mode: str, means: Tensor | None = None) -> Any:
        noisy = own(inputs, mode, means)
        # Without means it is a serial context model that asks.
        if mode != "noise" or means is None or module in inside:
            return noisy
        with torch.no_grad():
            exact = own(inputs, "dequantize", means)
        return _straight_through(exact, noisy)

    return quantize


def _straight_through(exact: Tensor, like: Tensor) -> Tensor:
    """Return `exact` to the bit, with the gradients of `like`."""
    return exact.to(like.dtype) + (like - like.detach())
