"""The quality of decoded images, and the bytes that they took."""

from __future__ import annotations

import math
from typing import Any

from pytorch_msssim import ms_ssim
from torch import Tensor

MS_SSIM_SIDE = 176
"""Smallest side for five-scale MS-SSIM with an 11-pixel window; it is None for smaller images."""


def psnr(reference: Tensor, decoded: Tensor) -> float:
    """Return the PSNR in dB over all channels of two images in [0, 1], both rounded to 8 bits:
    CompressAI's definition.
    """
    a, b = (t.detach().cpu().clamp(0, 1).mul(255).round().double() for t in (reference, decoded))
    mse = float((a - b).square().mean())
    return math.inf if mse == 0 else 20 * math.log10(255) - 10 * math.log10(mse)


def structural_similarity(reference: Tensor, decoded: Tensor) -> float | None:
    """Return the MS-SSIM of two images (1, C, H, W) in [0, 1], both rounded to 8 bits; None below
    `MS_SSIM_SIDE` pixels.
    """
    if min(reference.shape[-2:]) < MS_SSIM_SIDE:
        return None
    a, b = (image.mul(255).round() for image in (decoded, reference))
    return float(ms_ssim(a, b, data_range=255.0))


def string_bytes(strings: Any) -> int:
    """Return the number of bytes in the nested lists of strings that `compress` returns."""
    return len(strings) if isinstance(strings, bytes) else sum(string_bytes(s) for s in strings)
