"""The memory format of a codec's weights, and of the images that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import forward_for_analysis, unwrap
from nicprune.codecs.example import example_image
from nicprune.codecs.hooks import without_hooks
from nicprune.codecs.layer_kinds.convolutions import is_convolution_2d
from nicprune.codecs.modes import left_as_it_was
from nicprune.codecs.trusted import of_a_library

T = TypeVar("T", bound=nn.Module)


def to_channels_last(module: T) -> T:
    """Put weights of 2-D convolutions into channels_last, in place; return the module.

    `module.to(memory_format=torch.channels_last)` fails where there is a 3-D convolution, and
    changes parameters of four dimensions whose code reads them in their own order
    (`torch.view_as_complex`).
    """
    return in_format(module, torch.channels_last)


def to_contiguous(module: T) -> T:
    """Put weights back into torch's default format, in place; return the module."""
    return in_format(module, torch.contiguous_format)


def in_format(module: T, memory_format: torch.memory_format) -> T:
    """Put weights of 2-D convolutions into a memory format, in place; return the module."""
    for tensor in _of_convolutions(module):
        tensor.data = tensor.data.to(memory_format=memory_format)
    return module


def format_of(module: nn.Module) -> torch.memory_format:
    """Return the memory format that the weights of a module's 2-D convolutions are in."""
    last = any(not tensor.is_contiguous() for tensor in _of_convolutions(module))
    return torch.channels_last if last else torch.contiguous_format


def fast_format(codec: nn.Module) -> torch.memory_format:
    """Return the memory format in which a codec is run: channels_last, or torch's default format
    where its code takes that alone, as `x.view(b, c * h, w)` does.

    Code of one's own is tried on two images. The codec is left as it was; hooks of one's own see
    these calls.
    """
    bare = unwrap(codec)
    if all(of_a_library(type(module)) for module in bare.modules()):
        return torch.channels_last
    # The sides of activations are larger than 1, where the formats differ, if the codec takes that.
    for times in ((2, 2), (1, 1)):
        try:
            with left_as_it_was(bare), without_hooks(bare):
                x = example_image(bare, 0, times).repeat(2, 1, 1, 1)
                found = fast_format_on(bare.eval(), x, forward_for_analysis)
        except Exception:  # a foreign codec's own code may raise anything
            continue
        return found
    return torch.channels_last


def fast_format_on(
    module: nn.Module, x: Tensor, call: Any = lambda module, x: module(x)
) -> torch.memory_format:
    """Return the memory format in which a module is run on this input: see `fast_format`. It raises
    what the module does in both formats.
    """
    with torch.no_grad(), _formats_kept(module):
        try:
            call(to_channels_last(module), x.contiguous(memory_format=torch.channels_last))
        except Exception:  # a foreign module's own code may raise anything
            call(to_contiguous(module), x.contiguous())
            return torch.contiguous_format
    return torch.channels_last


@contextmanager
def _formats_kept(module: nn.Module) -> Iterator[None]:
    before = [(tensor, tensor.data) for tensor in _of_convolutions(module)]
    try:
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _of_convolutions(module: nn.Module) -> list[Tensor]:
    """Return the weights of 2-D convolutions, what they are computed from, and their masks."""
    return [
        tensor
        for layer in module.modules()
        if is_convolution_2d(layer)
        for tensor in (*layer.parameters(), *layer.buffers())
        if tensor.dim() == 4
    ]
