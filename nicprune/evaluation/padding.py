"""Padding of images to the size that a codec needs."""

from __future__ import annotations

from compressai.ops import compute_padding
from torch import Tensor
from torch.nn import functional as F


def pad(x: Tensor, factor: int) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Pad an image (..., H, W) with zeros to multiples of `factor` (of a codec: its
    `size_multiple`), centred as CompressAI does.

    Returns:
        The padded image, and the padding (left, right, top, bottom).
    """
    height, width = x.shape[-2:]
    padding, _ = compute_padding(height, width, min_div=factor)
    return F.pad(x, padding), padding


def crop(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Undo `pad`."""
    left, right, top, bottom = padding
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
