"""The parameters that are trained, by optimiser, and those that are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.layer_kinds.entropy import is_quantile, learns_density
from nicprune.codecs.layer_kinds.norms import learns_by_running
from nicprune.codecs.provenance import provenance
from nicprune.codecs.roles import on_side
from nicprune.common.errors import CodecError


def split_parameters(model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split trainable parameters into the network's and the entropy bottlenecks' quantiles, as
    CompressAI does.
    """
    apart = {id(p) for name, p in model.named_parameters() if is_quantile(name)}
    own = {id(p) for p in model.manually_updated()} if hasattr(model, "manually_updated") else set()
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    return [p for p in trainable if id(p) not in apart], [p for p in trainable if id(p) in apart]


def density_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters of the densities that entropy bottlenecks learn, those of
    methods too.
    """
    return [
        parameter
        for layer in model.modules()
        if learns_density(layer)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and not is_quantile(name)
    ]


def _is_trained(model: nn.Module, side: str | None) -> Callable[[str], bool]:
    """Return what says of a layer or parameter of the codec, by name, whether it is trained."""
    codec = unwrap(model)
    attached: Any = model if getattr(model, "pending", False) else None
    history = provenance(codec).history
    if side is None and attached is None and history:
        side = history[-1].get("side")
    one_side = side if side != "both" else None

    def is_trained(name: str) -> bool:
        return on_side(codec, name, one_side) and (
            side == "both" or attached is None or attached.trains(name)
        )

    return is_trained


def frozen_parameters(model: nn.Module, side: str | None) -> list[nn.Parameter]:
    """Return the parameters that are not trained: the codec's by `TrainSettings.side`, and what
    methods freeze.
    """
    is_trained = _is_trained(model, side)
    own = [p for name, p in unwrap(model).named_parameters() if not is_trained(name)]
    attached: Any = model if getattr(model, "pending", False) else None
    return own if attached is None else own + attached.frozen()


def set_training(model: nn.Module, side: str | None) -> None:
    """Set a model to training mode, but for layers that are not trained and would learn by running:
    a norm of a frozen encoder keeps its running mean.
    """
    model.train()
    is_trained = _is_trained(model, side)
    for name, layer in unwrap(model).named_modules():
        if learns_by_running(layer):
            layer.train(is_trained(name))


def check_float32(codec: nn.Module) -> None:
    """Raise CodecError if a codec has parameters of another precision, which training would end in
    an error of PyTorch's: `precision` is what it computes in, its weights are float32.
    """
    for name, parameter in codec.named_parameters():
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            do = (
                "keep its real and imaginary parts in one real parameter (torch.view_as_complex)"
                if parameter.is_complex()
                else "codec.float()"
            )
            raise CodecError(f"training takes weights in float32, {name} is {kind}: {do}")


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Disable the gradients of these parameters inside the block."""
    changed = [p for p in parameters if p.requires_grad]
    try:
        for parameter in changed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)
