"""How a codec with methods on it writes and reads bitstreams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.cdf import fast_indexes, refresh_tables


class Coding(nn.Module):
    """The part of `Attached` that codes images; the rest of it is what `self` stands for."""

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
        level, width = self._point(level, width)
        coder.set_width(width)
        header = (
            [[coder.widths.write(width)]]
            if coder.widths is not None and coder.widths.travels
            else []
        )
        if coder.levels is not None:
            header.append([coder.levels.write(level, lmbda)])
        else:
            coder._set(level, lmbda)
        with fast_indexes(), coder._narrowed():
            sent = coder.codec.compress(x, *args, **kwargs)
        return {**sent, "strings": [*header, *sent["strings"]]}

    @torch.no_grad()
    def decompress(
        self: Any, strings: Any, *args: Any, width: int | None = None, **kwargs: Any
    ) -> Any:
        """Read a bitstream that `compress` wrote: {"x_hat"}, (B, 3, H, W); the width that is set
        stays.

        Raises:
            FileError: the strings are of another codec, or of another width than is asked for.
        """
        coder, strings = self._coder(), list(strings or [])
        before = coder.widths.now if coder.widths is not None else None
        try:
            return self._read(coder, strings, width, *args, **kwargs)
        finally:  # the width that a stream was written at is not the one to write at next
            if coder.widths is not None:
                coder.widths.now = before

    def _read(
        self: Any, coder: Any, strings: list[Any], width: int | None, *args: Any, **kwargs: Any
    ) -> Any:
        if coder.widths is not None and coder.widths.travels:
            coder.widths.read(_header(strings), width)
        if coder.levels is not None:
            coder.levels.read(_header(strings))
        with fast_indexes(), coder._narrowed():
            return coder.codec.decompress(strings, *args, **kwargs)

    @contextmanager
    def _narrowed(self: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.roles.parts:
                stack.enter_context(part.narrowed(self.codec))
            yield

    def _coder(self: Any) -> Any:
        """What codes images: this, or a copy that has what does not stay folded in."""
        if self.stays:
            return self
        going = [pruner for pruner in self.roles.pruners if not pruner.stays]
        codec, twin = self._folded(going)
        staying = [method for method in twin._each if method.stays]
        coder = type(self)(codec, staying, self.groups, self.cost).eval()
        coder.hang()
        refresh_tables(coder)
        return coder


def _header(strings: list[Any]) -> bytes:
    """Take the next header off a bitstream's strings."""
    found = strings.pop(0) if strings else b""
    return found[0] if isinstance(found, list) and found else b""
