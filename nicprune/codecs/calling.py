"""Call a codec with all that it takes.

A codec whose `forward`, `compress` or `decompress` needs more than an image (`qmap`, `lmbda`) says
what with a method, or an attribute that is a function:

    codec.example_arguments = lambda x: {"qmap": torch.full_like(x[:, :1], 0.5)}

It is asked for each batch of images x, (B, C, H, W), and each of the codec's methods is given the
arguments that it has. What `decompress` takes may depend on the shape of x alone: the decoder has
no image.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.common.errors import CodecError

EXAMPLE = "example_arguments"

WRAPS = "wraps_codec"
"""Attribute of a class whose attribute `codec` is the codec."""

KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def further_arguments(codec: nn.Module, x: Tensor, method: str) -> dict[str, Any]:
    """Return what a method of a codec is given beside the image.

    Args:
        codec: a codec; what `attach` returned asks the codec itself.
        x: images, shape (B, C, H, W).
        method: "forward", "compress" or "decompress".

    Raises:
        CodecError: it needs an argument that the codec gives no example of; or an argument of
            `decompress` depends on the image's values.
    """
    try:
        parameters = list(inspect.signature(getattr(codec, method)).parameters.values())
    except (AttributeError, TypeError, ValueError):
        return {}
    give = getattr(codec, EXAMPLE, None)
    given = give(x) if give is not None else {}
    if not isinstance(given, dict):
        raise CodecError(
            f"{EXAMPLE} of {type(codec).__name__} returns no dictionary but a"
            f" {type(given).__name__}"
        )
    images = 2 if method == "decompress" else 1
    names = {p.name for p in parameters[images:] if p.kind in KEYWORDS}
    needed = [
        p.name
        for p in parameters[images:]
        if p.kind in KEYWORDS and p.default is p.empty and p.name not in given
    ]
    if needed:
        what = "strings and shape" if method == "decompress" else "the image"
        raise CodecError(
            f"{method} of {type(codec).__name__} needs {', '.join(needed)} beside {what}: say what"
            f" it is run with, codec.{EXAMPLE} = lambda x: {{{needed[0]!r}: ...}}"
        )
    if method == "compress" and given:
        _check_known_to_decoder(codec, x, given)
    return {name: value for name, value in given.items() if name in names}


def _check_known_to_decoder(codec: nn.Module, x: Tensor, given: dict[str, Any]) -> None:
    """Raise CodecError where an argument that `decompress` takes is another one without x."""
    without = further_arguments(codec, torch.zeros_like(x), "decompress")
    for name, value in without.items():
        if not _equal(given.get(name), value):
            raise CodecError(
                f"{EXAMPLE} of {type(codec).__name__} returns another {name!r} for another image of"
                " the same shape, and decompress, which takes it, has no image"
            )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    return one is other or bool(one == other)


def run(model: Any, x: Tensor, **keywords: Any) -> Any:
    """Run the forward pass of a codec, or of what `attach` returned, on images."""
    return model(x, **further_arguments(model, x, "forward") | keywords)


def compress(model: Any, x: Tensor, **keywords: Any) -> Any:
    """Write a bitstream of images."""
    return model.compress(x, **further_arguments(model, x, "compress") | keywords)


def decompress(model: Any, strings: Any, shape: Any, like: Tensor, **keywords: Any) -> Any:
    """Read a bitstream.

    Args:
        like: a tensor of the shape of the images, on their device; its values do not count.
    """
    if getattr(type(model), WRAPS, False):  # it asks the codec inside
        return model.decompress(strings, shape, like=like, **keywords)
    given = further_arguments(model, torch.zeros_like(like), "decompress")
    return model.decompress(strings, shape, **given | keywords)
