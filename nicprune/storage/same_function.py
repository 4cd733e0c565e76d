"""Comparison of two codecs as functions: by their layers, latents and outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import forward_for_analysis, unwrap
from nicprune.codecs.example import example_image
from nicprune.codecs.layer_kinds.entropy import entropy_models
from nicprune.codecs.nested_tensors import tensors_in
from nicprune.codecs.structure import differences, structure
from nicprune.methods.composition import Attached


def difference(expected: nn.Module, found: nn.Module) -> str:
    """Describe the difference of two models: layers and settings, then latents and outputs."""
    told = differences(structure(unwrap(expected)), structure(unwrap(found)))
    if told:
        return "; ".join(told[:2])
    first = _trace(expected)
    if _same(first, _trace(found)) or not _same(first, _trace(expected)):
        return ""  # what is not the same twice cannot be compared
    return "its layers are the same, but latents or outputs differ"


@torch.no_grad()
def _trace(model: nn.Module) -> list[Tensor]:
    """Return the inputs of a model's entropy models for an image, and its outputs."""
    seen: list[Tensor] = []
    image = example_image(unwrap(model), seed=0)  # runs the codec, before anything is recorded
    if isinstance(model, Attached):
        model.set_width(0 if model.widths is not None else None)
    handles = [
        entropy_model.register_forward_pre_hook(
            lambda module, args: seen.extend(t.clone() for t in tensors_in(args))
        )
        for entropy_model in entropy_models(model)
    ]
    torch.default_generator.manual_seed(0)  # and no other device's
    try:
        seen.extend(t.clone() for t in tensors_in(forward_for_analysis(model.eval(), image)))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))
