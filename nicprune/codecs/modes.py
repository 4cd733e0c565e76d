"""Modes of modules, and what running them changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
    statistics) and random numbers, those of its device too. Attributes that are no buffers, such
    as the last latents, stay.
    """
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in codec.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device.index or 0 for p in codec.parameters() if p.device.type == "cuda"}
    with modes_restored(codec), torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for module, name, buffer, before in kept:
                module._buffers[name] = buffer
                if buffer.shape != before.shape:
                    buffer.resize_(before.shape)
                if not torch.equal(buffer, before):  # written to, it could not be backpropagated
                    with torch.no_grad():
                        buffer.copy_(before)
