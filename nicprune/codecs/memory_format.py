"""The memory format of a codec's parameters."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T", bound=nn.Module)


def to_channels_last(module: T) -> T:
    """Put weights of 2-D convolutions into channels_last, in place; return the module.

    `module.to(memory_format=torch.channels_last)` fails where there is a 3-D convolution.
    """
    return _in_format(module, torch.channels_last)


def to_contiguous(module: T) -> T:
    """Put weights back into torch's default format, in place; return the module."""
    return _in_format(module, torch.contiguous_format)


def _in_format(module: T, memory_format: Any) -> T:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=memory_format)
    return module
