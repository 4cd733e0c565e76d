"""Crops of test images: which window, and what is written."""

from __future__ import annotations

from pathlib import Path

import torch

from nicprune.data.images import read_image
from nicprune.experiments.crops import SIZE, detailed_window, save_crop


def test_the_window_has_the_most_detail() -> None:
    image = torch.full((3, 400, 600), 0.5)
    noise = torch.rand(3, 100, 100, generator=torch.Generator().manual_seed(0))
    image[:, 290:390, 390:490] = noise
    top, left, height, width = detailed_window(image)
    assert (height, width) == SIZE and (top, left) == (192, 384)
    image[:, 290:390, 390:490] = 0.5
    image[:, :100, :100] = noise
    assert detailed_window(image)[:2] == (0, 0)


def test_a_small_image_is_its_own_crop() -> None:
    assert detailed_window(torch.rand(3, 64, 80)) == (0, 0, 64, 80)


def test_both_pieces_are_written_below_the_folder(tmp_path: Path) -> None:
    original, decoded = torch.rand(3, 64, 80), torch.rand(3, 64, 80)
    crop = save_crop(
        tmp_path / "level-1",
        2,
        original,
        decoded,
        tmp_path,
        name="photos.v2/a.b.png",
        bpp=0.3,
        psnr_db=30.5,
    )
    assert crop.model_dump() == {
        "image": "photos.v2/a.b.png",
        "original": "level-1/crops/2-a.b-original.png",
        "decoded": "level-1/crops/2-a.b-decoded.png",
        "bpp": 0.3,
        "psnr_db": 30.5,
    }
    for path, image in ((crop.original, original), (crop.decoded, decoded)):
        assert torch.equal(read_image(tmp_path / path), (255 * image).round().to(torch.uint8))
