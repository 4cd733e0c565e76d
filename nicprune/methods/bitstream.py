"""Write and read bitstreams with a codec that has methods attached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.calling import further_arguments
from nicprune.codecs.cdf import fast_indexes, refresh_tables
from nicprune.codecs.example import example_image


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
        **kwargs: Any,
    ) -> Any:
        """Write a bitstream of images (B, 3, H, W) in [0, 1], sides multiples of 64: {"strings",
        "shape"}, as the codec's own compress.

        With a modulator, the first string says at which rate; with several widths, at which width.
        CDF tables must be current: call update(force=True) after training of your own. Masks that
        still decay are folded into a copy for it, which is slow: harden for good.

        Raises:
            RecipeError: the codec has no such level, lambda or width.
        """
        # What both sides compute must not depend on whether the caller keeps gradients: gates skip
        # channels only without.
        coder = self._coder()
        point = coder.point(level=level, lmbda=lmbda, width=width)
        coder.set_point(point)
        header = [
            [choice.write(getattr(point, choice.field))]
            for choice in coder.choices
            if choice.in_bitstream
        ]
        if not args and not kwargs:
            kwargs = further_arguments(coder.codec, x, "compress")
        with fast_indexes(), coder.active():
            sent = coder.codec.compress(x, *args, **kwargs)
        return {**sent, "strings": [*header, *sent["strings"]]}

    @torch.no_grad()
    def decompress(
        self: Any, strings: Any, *args: Any, width: int | None = None, **kwargs: Any
    ) -> Any:
        """Read a bitstream that `compress` wrote and return {"x_hat"}, (B, 3, H, W). The width that
        is set stays.

        Raises:
            FileError: the strings are of another codec, or of another width than is asked for.
        """
        coder, strings = self._coder(), list(strings or [])
        widths = coder.widths
        before = widths.now if widths is not None else None
        try:
            for choice in coder.choices:
                if choice.in_bitstream:
                    choice.read(_header(strings), width if choice is widths else None)
            if len(args) < 2 and not kwargs.keys() - {"shape"}:
                image = example_image(coder.codec)
                kwargs |= further_arguments(coder.codec, image, "decompress")
            with fast_indexes(), coder.active():
                return coder.codec.decompress(strings, *args, **kwargs)
        finally:  # the width that a stream was written at is not the one to write at next
            if widths is not None:
                widths.now = before

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


def _header(strings: list[Any]) -> bytes:
    """Remove the next header from a bitstream's strings and return it."""
    found = strings.pop(0) if strings else b""
    return found[0] if isinstance(found, list) and found else b""
