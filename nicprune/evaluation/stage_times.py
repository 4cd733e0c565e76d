"""The seconds that the parts of a codec take to encode and decode one image."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.calling import compress, decompress
from nicprune.codecs.fast_coding import fast_indexes
from nicprune.codecs.float64_coding import Coder
from nicprune.codecs.layer_kinds.entropy import entropy_models
from nicprune.codecs.roles import transform_in
from nicprune.evaluation.times import REST


def _part_of(codec: nn.Module, name: str, module: nn.Module, layers: bool) -> str | None:
    """Return the name under which a module's seconds are added: its transform, or with `layers` its
    path.

    With `layers`, None for a module inside a layer and for one that contains layers.
    """
    if not layers:
        return transform_in(codec, name)
    depth = name.count(".")
    return name if depth == 1 or (depth == 0 and not any(module.children())) else None


def _parts(model: nn.Module, layers: bool) -> dict[nn.Module, str]:
    """Return modules by the name under which their seconds are added: the transform or layer; those
    of a method's modules by its name.
    """
    coders = {id(part) for coder in entropy_models(model) for part in coder.modules()}
    codec = unwrap(model)
    parts = {
        module: part
        for name, module in codec.named_modules()
        if name and (part := _part_of(codec, name, module, layers)) is not None
    }
    for method in getattr(model, "methods", ()):
        parts = {module: str(method.name) for module in method.modules()} | parts
    return {module: part for module, part in parts.items() if id(module) not in coders}


@contextmanager
def watched(parts: Mapping[nn.Module, str], spent: dict[str, float]) -> Iterator[None]:
    """Add the seconds of modules to `spent` by their names. A module that runs inside another
    counts with the outer one.
    """
    depth, started, hooks = 0, 0.0, []

    def before(module: nn.Module, args: Any) -> None:
        nonlocal depth, started
        depth += 1
        if depth == 1:
            started = _now()

    def after(part: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                spent[part] = spent.get(part, 0.0) + _now() - started

        return hook

    try:
        for module, part in parts.items():
            # The first pre-hook and the last hook, so that gates count with their transform.
            hooks += [
                module.register_forward_pre_hook(before, prepend=True),
                module.register_forward_hook(after(part)),
            ]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def stage_times(
    codec: Any,
    image: Tensor,
    *,
    layers: bool = False,
    parts: Mapping[nn.Module, str] | None = None,
    **rate: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    """Encode and decode one image; return the seconds of each, by transform and for `REST`.

    Args:
        codec: a codec with up-to-date CDF tables; or a `Coder` of one, which computes in float64
            what encoder and decoder must compute alike, as `encode` and `decode` do.
        image: shape (1, C, H, W) with as many channels as the codec takes, H and W multiples of 64.
        layers: by layer ("g_a.0") instead of by transform; time between layers counts as `REST`.
        parts: the modules to time, and their names, instead of the transforms.
        rate: arguments of `compress`.
    """
    coder = codec if isinstance(codec, Coder) else None
    model = codec if coder is None else coder.model
    parts = _parts(model, layers) if parts is None else parts
    with fast_indexes():
        with _timed(parts) as encode:
            sent = (
                compress(model, image, **rate) if coder is None else coder.compress(image, **rate)
            )
        with _timed(parts) as decode:
            if coder is None:
                decompress(model, sent["strings"], sent["shape"], image)
            else:
                coder.decompress(sent["strings"], sent["shape"], image)
    return encode, decode


@contextmanager
def _timed(parts: Mapping[nn.Module, str]) -> Iterator[dict[str, float]]:
    spent: dict[str, float] = {}
    with watched(parts, spent):
        started = _now()
        yield spent
        spent[REST] = _now() - started - sum(spent.values())
