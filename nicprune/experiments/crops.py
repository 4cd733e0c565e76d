"""Crops: the most detailed piece of a test image, original and decoded, as PNG files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nicprune.common.files import shortened
from nicprune.data.images import write_png
from nicprune.report.record_parts import Crop

SIZE = (192, 192)
"""Height and width of a crop, in pixels."""


def save_crop(
    folder: Path,
    number: int,
    original: Tensor,
    decoded: Tensor,
    base: Path,
    *,
    name: str,
    bpp: float,
    psnr_db: float,
) -> Crop:
    """Write the most detailed window of an image, original and decoded.

    Args:
        folder: the files go to crops/ below it.
        number: number of the image among those with crops.
        original, decoded: images (3, H, W) in [0, 1].
        base: folder that the paths of the crop are relative to.
        name, bpp, psnr_db: name of the image, bits per pixel and PSNR of the decoded one.
    """
    top, left, height, width = detailed_window(original)
    paths, stem = [], shortened(Path(name).stem, 200)
    for kind, image in (("original", original), ("decoded", decoded)):
        path = folder / "crops" / f"{number}-{stem}-{kind}.png"
        write_png(image[:, top : top + height, left : left + width], path)
        paths.append(str(path.relative_to(base)))
    return Crop(
        image=name,
        original=paths[0],
        decoded=paths[1],
        bpp=bpp,
        psnr_db=psnr_db,
    )


def detailed_window(image: Tensor) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the window with the most gradient energy.

    Windows lie on a grid of half their size.

    Args:
        image: (3, H, W).
    """
    height, width = min(SIZE[0], image.shape[1]), min(SIZE[1], image.shape[2])
    grey = image.mean(0)
    energy = torch.zeros_like(grey)
    energy[:-1, :-1] = (grey[1:, :-1] - grey[:-1, :-1]).abs() + (
        grey[:-1, 1:] - grey[:-1, :-1]
    ).abs()
    best = (-1.0, 0, 0)
    for top in range(0, image.shape[1] - height + 1, max(height // 2, 1)):
        for left in range(0, image.shape[2] - width + 1, max(width // 2, 1)):
            best = max(
                best, (float(energy[top : top + height, left : left + width].sum()), -top, -left)
            )
    return -best[1], -best[2], height, width
