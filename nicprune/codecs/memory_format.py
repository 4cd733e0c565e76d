"""The memory format of a codec's convolutions."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from nicprune.codecs.layer_kinds.convolutions import is_convolution_2d

T = TypeVar("T", bound=nn.Module)


def to_channels_last(module: T) -> T:
    """Put weights of 2-D convolutions into channels_last, in place; return the module.

    `module.to(memory_format=torch.channels_last)` fails where there is a 3-D convolution, and
    changes parameters of four dimensions whose code reads them in their own order
    (`torch.view_as_complex`).
    """
    return _in_format(module, torch.channels_last)


def to_contiguous(module: T) -> T:
    """Put weights back into torch's default format, in place; return the module."""
    return _in_format(module, torch.contiguous_format)


def _in_format(module: T, memory_format: Any) -> T:
    for layer in filter(is_convolution_2d, module.modules()):
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.to(memory_format=memory_format)
    return module
