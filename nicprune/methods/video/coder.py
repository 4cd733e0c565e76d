"""Code the frames of a video with a codec of images, each on its own (intra-only)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import check_codec, check_finite, unwrap
from nicprune.codecs.cdf import check_bottlenecks
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.float64_coding import Coder
from nicprune.common.errors import CodecError, FileError, RecipeError
from nicprune.methods.composition import Attached


class FrameCoder:
    """A codec made ready to code frames; see `video_coder`.

    Attributes:
        widths: number of widths that the codec has.
        width: the one that it codes at, 0 the widest.
        predicts: whether it codes a frame by the one before.
    """

    predicts = False

    def __init__(self, codec: nn.Module, width: int | None = None):
        check_codec(unwrap(codec))
        if isinstance(codec, Attached) and not codec.stays:
            raise CodecError("masks still decay on this codec: code with masked.harden()")
        own = codec.widths if isinstance(codec, Attached) else None
        if own is None and width is not None:
            raise RecipeError("this codec has one width: leave width out")
        self.widths = len(own) if own is not None else 1
        self.width = (own.resolve(width) if own is not None else None) or 0
        ready: Any = copy_codec(codec).float().eval().to(memory_format=torch.channels_last)
        check_finite(ready)
        check_bottlenecks(ready)
        ready.update()
        self._rate = {"width": self.width} if own is not None else {}
        self._coder = Coder(ready, point=self._rate)

    def compress(
        self, x: Tensor, previous: Tensor | None = None
    ) -> tuple[list[list[bytes]], tuple[int, ...], Tensor | None]:
        """Code one frame, (1, 3, H, W) in [0, 1], sides multiples of 64.

        Args:
            previous: what this returned for the frame before; not used.

        Returns:
            The strings, their shape, and the latents for the next frame: none.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        sent = self._coder.compress(x, **self._rate)
        return sent["strings"], sent["shape"], None

    def decompress(
        self, strings: list[list[bytes]], shape: tuple[int, ...], previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Decode one frame, (1, 3, H, W), from what `compress` returned."""
        if self._rate and (not strings or strings[0] != [bytes([self.width])]):
            raise FileError(f"it was not coded at width {self.width}")
        return self._coder.decompress(strings, shape), None


def video_coder(codec: nn.Module, width: int | None = None) -> FrameCoder:
    """Return what codes the frames of a video with this codec, at one of its widths."""
    return FrameCoder(codec, width)
