"""Modes of modules, and what running them changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

OF_TORCH = nn.Module().__dict__.keys()
"""Attributes that torch itself keeps on a module."""


@contextmanager
def modes_restored(*models: nn.Module) -> Iterator[None]:
    """Give every module the mode back that it has before the block, whatever is set inside it."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def left_as_it_was(codec: nn.Module) -> Iterator[None]:
    """Undo what running a codec inside the block changes: modes, buffers (counters, running
    statistics), attributes (the last latents, the image size that a buffer was made for) and random
    numbers, those of its device too.
    """
    before = [(module, dict(module._buffers), _own(module)) for module in codec.modules()]
    values = {
        id(buffer): buffer.detach().clone()
        for _, buffers, _ in before
        for buffer in buffers.values()
        if buffer is not None
    }
    devices = {p.device.index or 0 for p in codec.parameters() if p.device.type == "cuda"}
    with modes_restored(codec), torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for module, buffers, attributes in before:
                for name in _own(module).keys() - attributes.keys():
                    del module.__dict__[name]
                module.__dict__.update(attributes)
                for name in module._buffers.keys() - buffers.keys():
                    delattr(module, name)
                module._buffers.update(buffers)
                for buffer in buffers.values():
                    if buffer is not None:
                        _write(buffer, values[id(buffer)])


def _own(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are neither torch's nor nicprune's."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in OF_TORCH and not name.startswith("_nicprune")
    }


@torch.no_grad()
def _write(buffer: torch.Tensor, value: torch.Tensor) -> None:
    if buffer.shape != value.shape:
        buffer.resize_(value.shape)
    if not torch.equal(buffer, value):  # written to, it could not be backpropagated through
        buffer.copy_(value)
