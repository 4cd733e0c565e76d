"""The parameters that are trained, by optimiser, and those that are frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.layer_kinds.entropy import is_quantile
from nicprune.codecs.provenance import provenance
from nicprune.codecs.roles import on_side


def split_parameters(codec: nn.Module, model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split trainable parameters into the network's and the entropy bottlenecks' quantiles, as
    CompressAI does.
    """
    apart = {id(p) for name, p in model.named_parameters() if is_quantile(name)}
    own = {id(p) for p in model.manually_updated()} if hasattr(model, "manually_updated") else set()
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    return [p for p in trainable if id(p) not in apart], [p for p in trainable if id(p) in apart]


def frozen_parameters(model: nn.Module, side: str | None) -> list[nn.Parameter]:
    """Return the parameters that are not trained: the codec's by `TrainSettings.side`, and what
    methods freeze.
    """
    codec = unwrap(model)
    attached: Any = model if getattr(model, "pending", False) else None
    history = provenance(codec).history
    if side is None and attached is None and history:
        side = history[-1].get("side")
    one_side = side if side != "both" else None
    own = [
        p
        for name, p in codec.named_parameters()
        if not (
            on_side(codec, name, one_side)
            and (side == "both" or attached is None or attached.trains(name))
        )
    ]
    return own if attached is None else own + attached.frozen()


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
