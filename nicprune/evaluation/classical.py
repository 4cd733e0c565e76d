"""JPEG and WebP as baselines, on the same images and by the same definitions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from nicprune.common.errors import CodecError, closest
from nicprune.data.images import list_images, readable, usable_images
from nicprune.evaluation.quality import psnr

FORMATS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG"},
    "jpeg-optimized": {"format": "JPEG", "optimize": True},
    "webp": {"format": "WEBP", "method": 6},
}
"""Arguments of Pillow's `save`. "jpeg" is measured as CompressAI does (4:2:0, standard Huffman
tables); optimised tables save up to 0.08 bpp.
"""

QUALITIES = (1, 2, 3, 5, 7, 10, 12, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90)


@dataclass(frozen=True)
class Point:
    """One setting of a classical codec: mean bpp of the whole files, mean PSNR in dB."""

    quality: int
    bpp: float
    psnr_db: float


def evaluate_classical(
    name: str, images: str | Path | Sequence[str | Path], qualities: Sequence[int] = QUALITIES
) -> list[Point]:
    """Encode and decode every image with Pillow at several settings.

    Args:
        name: one of `FORMATS`.
        images: folder(s) of images, files, or "samples".
        qualities: Pillow's quality settings.

    Raises:
        CodecError: the name is unknown, or Pillow was built without WebP.
        DataError: no image is usable.
    """
    if name not in FORMATS:
        raise CodecError(f"unknown classical codec {name!r}; {closest(name, FORMATS)}")
    if name == "webp" and not features.check("webp"):
        raise CodecError("this Pillow was built without WebP")
    originals = [image for _, image in readable(usable_images(list_images(images, "test")))]
    points = []
    for quality in qualities:
        rates, qualities_db = [], []
        for image in originals:
            buffer = io.BytesIO()
            to_pil_image(image).save(buffer, quality=quality, **FORMATS[name])
            decoded = pil_to_tensor(Image.open(buffer).convert("RGB"))
            rates.append(8 * buffer.tell() / (image.shape[1] * image.shape[2]))
            qualities_db.append(psnr(image / 255, decoded / 255))
        points.append(Point(quality, float(np.mean(rates)), float(np.mean(qualities_db))))
    return points


def psnr_at(points: Sequence[Point], bpp: float) -> float | None:
    """Return the PSNR at `bpp`, interpolated linearly in log rate; None outside the curve."""
    ordered = sorted(points, key=lambda p: p.bpp)
    rates = np.log([p.bpp for p in ordered])
    if not rates[0] <= np.log(bpp) <= rates[-1]:
        return None
    return float(np.interp(np.log(bpp), rates, [p.psnr_db for p in ordered]))
