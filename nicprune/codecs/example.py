"""The image that a codec is traced, counted and verified with."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import check_not_compiled, forward_for_analysis
from nicprune.codecs.hooks import without_hooks
from nicprune.codecs.layer_kinds.kind import kinds_in
from nicprune.codecs.modes import left_as_it_was
from nicprune.common.errors import CodecError

SIZES = (64, 128, 256, 512)
"""Sides of the images that are tried, in pixels."""

OTHER_SIZES = (192, 320, 384, 448)
"""Sides that are tried where images of `SIZES` come back in other sizes: of strides that are no
power of two.
"""

ATTRIBUTE = "_nicprune_image"
"""Name of the attribute on a codec that keeps what was found: channels, side and multiple."""


def image_shape(codec: nn.Module) -> tuple[int, int]:
    """Return the channels of a codec's images, and the smallest side of `SIZES` that it runs on
    and gives back an image of that size.

    Raises:
        CodecError: it runs on none (names the module that raised, and what), is compiled, or needs
            an argument that is not known (see `calling`).
    """
    return _found(codec)[:2]


def _found(codec: nn.Module) -> tuple[int, int, int]:
    """Return channels, side and `size_multiple`; 0 in its place if no image comes back in its
    size.
    """
    check_not_compiled(codec)
    layers = _layers(codec)
    known, made_of = codec.__dict__.get(ATTRIBUTE, (None, None))
    if known is not None and made_of == layers:
        return known  # type: ignore[no-any-return]
    first = other = None
    read = _first_input(codec)
    for size in (*SIZES, *OTHER_SIZES):
        if size not in SIZES and other is None:
            break
        for channels in dict.fromkeys(c for c in (3, read, 1) if c is not None):
            failed, same = _tried(codec, channels, size)
            if failed is None and same:
                found = channels, size, _multiple(codec, channels, size)
                codec.__dict__[ATTRIBUTE] = found, layers
                return found
            if failed is None:  # smaller than the codec's stride, or never of the image's size
                other = other or (channels, size, 0)
            elif first is None or channels == read:
                first = f"{failed[0]} raised {failed[1]} on {channels} x {size} x {size}"
    if other is not None:
        codec.__dict__[ATTRIBUTE] = other, layers
        return other
    raise CodecError(
        f"the forward pass of {type(codec).__name__} cannot be followed: it runs on no image of"
        f" {', '.join(map(str, SIZES))} pixels a side; {first}"
    )


def _layers(codec: nn.Module) -> int:
    """Return a checksum of a codec's modules and their classes, which the user may change."""
    names = (f"{name} {type(module).__qualname__}" for name, module in codec.named_modules())
    return zlib.crc32("\n".join(names).encode())


def example_image(
    codec: nn.Module, seed: int | None = None, times: tuple[int, int] = (1, 1)
) -> Tensor:
    """Return an image that the codec runs on, shape (1, C, S, S), on the codec's device and in its
    type: noise by a seed, or grey.

    Args:
        times: height and width as multiples of S. The codec may not run on other sizes.
    """
    channels, size = image_shape(codec)
    shape = 1, channels, times[0] * size, times[1] * size
    parameter = next((p for p in codec.parameters() if p.is_floating_point()), torch.zeros(()))
    if seed is None:
        return torch.full(shape, 0.5).to(parameter)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).to(parameter)


def size_multiple(codec: nn.Module) -> int:
    """Return what the sides of a codec's images must be a multiple of, in pixels: 64, or its total
    stride where that is larger.

    Raises:
        CodecError: as in `image_shape`, or no image comes back in its size.
    """
    multiple = _found(codec)[2]
    if not multiple:
        raise CodecError(
            f"{type(codec).__name__} decodes to images of another size, whatever the size of the"
            f" image (tried: {', '.join(map(str, sorted((*SIZES, *OTHER_SIZES))))} pixels a side)"
        )
    return multiple


def _multiple(codec: nn.Module, channels: int, size: int) -> int:
    """Return the smallest side by which an image of this side may be larger. A codec that needs an
    image of some size need not have its stride.
    """
    for step in sorted((*SIZES, *OTHER_SIZES)):
        if step < size and _tried(codec, channels, size + step) == (None, True):
            return step
    return size


def forget_image(codec: nn.Module) -> None:
    """Find out anew what a codec runs on: its parts may have been replaced."""
    codec.__dict__.pop(ATTRIBUTE, None)


def _first_input(codec: nn.Module) -> int | None:
    """Return the input channels of the first convolution of the analysis, or of the codec."""
    modules = dict(codec.named_modules())
    found = [(name, kind) for name, kind in kinds_in(codec).items() if kind.convolution]
    analysis = [pair for pair in found if "g_a" in pair[0].split(".")]
    return next((kind.widths(modules[name])[1] for name, kind in analysis or found), None)


def _tried(codec: nn.Module, channels: int, size: int) -> tuple[tuple[str, str] | None, bool]:
    """Return the module that raised while the codec ran on a grey image of this side, and the
    error, or None if it ran; and whether what came out has the size of the image.
    """
    parameter = next((p for p in codec.parameters() if p.is_floating_point()), torch.zeros(()))
    image = torch.full((1, channels, size, size), 0.5).to(parameter)
    stack: list[str] = []
    try:
        with (
            left_as_it_was(codec),
            torch.no_grad(),
            without_hooks(codec),
            module_names(codec, stack),
        ):
            out = forward_for_analysis(codec.eval(), image)
    except CodecError:
        raise
    except Exception as error:  # a foreign codec's own code may raise anything
        told = (str(error) or "").splitlines()
        where = stack[-1] if stack else type(codec).__name__
        kind = type(error).__name__
        return (where, f"{kind}: {told[0]}" if told else kind), False
    x_hat = out.get("x_hat") if isinstance(out, Mapping) else None
    return None, not isinstance(x_hat, Tensor) or x_hat.shape[-2:] == image.shape[-2:]


@contextmanager
def module_names(codec: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the names of the modules that run now, the innermost last: after an error, of those that
    raised it. The codec itself goes by its class.
    """

    def enter(name: str) -> Any:
        return lambda module, args: stack.append(name)

    handles = []
    for name, module in codec.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name or type(codec).__name__)))
        handles.append(
            module.register_forward_hook(lambda module, args, output: stack.pop() and None)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
