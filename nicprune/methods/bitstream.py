"""Write and read bitstreams with a codec that has methods attached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.calling import EXAMPLE, further_arguments
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.example import example_image
from nicprune.codecs.fast_coding import fast_indexes
from nicprune.common.errors import CodecError


class Coding(nn.Module):
    """The part of `Attached` that codes images; `self` is an `Attached`."""

    @torch.no_grad()
    def compress(
        self: Any,
        x: Tensor,
        *args: Any,
        level: Any = None,
        lmbda: float | None = None,
        width: int | None = None,
        domain: str | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write a bitstream of images (B, 3, H, W) in [0, 1], sides multiples of 64: {"strings",
        "shape"}, as the codec's own compress.

        With a modulator, the first string says at which rate; with several widths, at which width;
        with an adaptation, that it is of the target domain. Bitstreams of the source domain are the
        source codec's own.
        With gates, the images of a batch are coded one by one: an image is then coded to the same
        strings in a batch and alone, where closed channels are left out of the computation.
        The operating point that is asked for stays set.
        CDF tables must be current: call update(force=True) after training of your own. Masks that
        still decay are folded into a copy for it, which is slow: harden for good.

        Raises:
            RecipeError: the codec has no such level, lambda or width.
        """
        # What both sides compute must not depend on whether the caller keeps gradients: gates skip
        # channels only without.
        coder = self._coder()
        point = coder.point(level=level, lmbda=lmbda, width=width, domain=domain)
        coder.set_point(point)
        header = [
            [written]
            for choice in coder.choices
            if choice.in_bitstream and (written := choice.write(getattr(point, choice.field)))
        ]
        own = not args and not kwargs
        with fast_indexes(), coder.active():
            sent = [
                coder.codec.compress(
                    one,
                    *args,
                    **further_arguments(coder.codec, one, "compress") if own else kwargs,
                )
                for one in coder._parts_of(x)
            ]
        strings = _joined([one["strings"] for one in sent])
        return {**sent[0], "strings": [*header, *strings]}

    @torch.no_grad()
    def decompress(
        self: Any,
        strings: Any,
        *args: Any,
        width: int | None = None,
        like: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read a bitstream that `compress` wrote and return {"x_hat"}, (B, 3, H, W). The width that
        is set stays.

        Args:
            like: a tensor of the shape of the images, for codecs that take further arguments; its
                values do not count. By default, of the shape that the codec codes to `shape`.

        Raises:
            CodecError: `like` is needed, and does not follow from the shape.
            FileError: the strings are of another codec, or of another width than is asked for.
        """
        coder, strings = self._coder(), list(strings or [])
        widths = coder.widths
        before = widths.now if widths is not None else None
        try:
            for choice in coder.choices:
                if choice.in_bitstream:
                    choice.take(strings, width if choice is widths else None)
            count = max(_count(strings), 1)
            own = len(args) < 2 and not kwargs.keys() - {"shape"}
            with fast_indexes(), coder.active():
                if own and like is None:
                    shape = args[0] if args else kwargs.get("shape")
                    like = _image_coded_to(coder.codec, shape, count)
                parts = count if coder.roles.gating else 1
                each = [
                    coder.codec.decompress(
                        strings if parts == 1 else _taken(strings, i),
                        *args,
                        **kwargs | _given(coder.codec, like, i, parts) if own else kwargs,
                    )
                    for i in range(parts)
                ]
            if parts == 1:
                return each[0]
            return {**each[0], "x_hat": torch.cat([one["x_hat"] for one in each])}
        finally:  # the width that a stream was written at is not the one to write at next
            if widths is not None:
                widths.now = before

    def _parts_of(self: Any, x: Tensor) -> Sequence[Tensor]:
        """Split a batch into what is coded at once."""
        return x.split(1) if self.roles.gating else [x]

    @contextmanager
    def active(self: Any) -> Iterator[None]:
        """Make the codec compute at the operating point that is set, inside the block."""
        with ExitStack() as stack:
            for part in self.roles.parts:
                stack.enter_context(part.active(self.codec))
            yield

    def _coder(self: Any) -> Any:
        """Return the codec that codes: this, or a copy with what does not stay folded in."""
        if self.stays:
            return self
        going = [pruner for pruner in self.roles.pruners if not pruner.stays]
        codec, twin = self._folded(going)
        staying = [method for method in twin._each if method.stays]
        coder = type(self)(codec, staying, self.groups, self.cost).eval()
        coder.attach_again()
        refresh_tables(coder)
        return coder


def _image_coded_to(codec: nn.Module, shape: Any, count: int) -> Tensor:
    """Return a tensor of the shape of the images whose strings have this `shape`, (count, C, H, W).

    Raises:
        CodecError: it does not follow from the shape, and the codec takes further arguments.
    """
    tile = example_image(codec)
    if getattr(codec, EXAMPLE, None) is None:
        return tile
    coded: Any = codec
    known = coded.compress(tile, **further_arguments(codec, tile, "compress"))["shape"]
    try:
        sides = [
            side * int(n) // int(each)
            for side, n, each in zip(tile.shape[2:], shape, known, strict=True)
        ]
    except (TypeError, ValueError, ZeroDivisionError):
        raise CodecError(
            f"{EXAMPLE} of {type(codec).__name__} is asked for images of the size of those that"
            f" were coded, which does not follow from the shape {shape!r}: give decompress"
            " like=images"
        ) from None
    return tile.new_zeros(count, tile.shape[1], *sides)


def _given(codec: nn.Module, like: Any, part: int, parts: int) -> dict[str, Any]:
    """Return the further arguments of `decompress` for all images, or for one of several parts."""
    some = like if parts == 1 or len(like) != parts else like[part : part + 1]
    return further_arguments(codec, torch.zeros_like(some), "decompress")


def _joined(each: list[Any]) -> Any:
    """Join the strings of several batches: the innermost lists hold a string for each image."""
    if len(each) == 1:
        return each[0]
    if all(isinstance(string, bytes) for strings in each for string in strings):
        return [string for strings in each for string in strings]
    return [_joined(list(strings)) for strings in zip(*each, strict=True)]


def _taken(strings: Any, index: int) -> Any:
    """Return the strings of one image of a batch."""
    if all(isinstance(string, bytes) for string in strings):
        return [strings[index]]
    return [_taken(one, index) for one in strings]


def _count(strings: Any) -> int:
    """Return the number of images that strings hold; 0 if they are not what `compress` returns."""
    while isinstance(strings, (list, tuple)) and strings:
        if all(isinstance(string, bytes) for string in strings):
            return len(strings)
        strings = strings[0]
    return 0
