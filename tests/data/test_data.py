"""Photographs: found, refused by name, cached within bounds, cut into patches that depend on (seed,
step, rank) alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from nicprune.common.errors import DataError
from nicprune.data.images import list_images, read_image, readable, usable_images, write_png
from nicprune.data.patches import Patches, mix


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four noise images of different sizes."""
    generator = torch.Generator().manual_seed(0)
    for i, (h, w) in enumerate([(96, 128), (128, 96), (80, 80), (64, 200)]):
        write_png(torch.rand(3, h, w, generator=generator), tmp_path / f"{i}.png")
    return tmp_path


def test_png_comes_back_as_written(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    assert torch.equal(read_image(write_png(image / 255, tmp_path / "a.png")), image)


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (5, 4), (1, 2, 3, 4)).save(tmp_path / "alpha.png")
    assert all(read_image(tmp_path / name).shape == (3, 4, 5) for name in ("grey.png", "alpha.png"))


def test_batches_depend_on_seed_step_and_rank_alone(photos: Path) -> None:
    patches = Patches(photos, 64)
    forward = [patches.batch(3, seed=1, step=s) for s in range(4)]
    again = Patches(photos, 64)
    assert all(torch.equal(again.batch(3, seed=1, step=s), forward[s]) for s in (2, 0, 3, 1))
    assert forward[0].shape == (3, 3, 64, 64) and forward[0].min() >= 0 and forward[0].max() <= 1
    for other in (
        {"seed": 2, "step": 0},
        {"seed": 1, "step": 1},
        {"seed": 1, "step": 0, "rank": 1},
    ):
        assert not torch.equal(again.batch(3, **other), forward[0])
    patches.close()
    again.close()


def test_cache_stays_within_its_bound(photos: Path) -> None:
    bound = 2 * 96 * 128 * 3
    patches = Patches(photos, 64, cache_bytes=bound)
    for step in range(6):
        patches.batch(4, seed=0, step=step)
        assert sum(image.numel() for image in patches._cache.values()) == patches._held <= bound
    patches.close()


def test_split_folder_and_single_files(photos: Path) -> None:
    (photos / "train").mkdir()
    (photos / "0.png").rename(photos / "train" / "0.png")
    assert [p.name for p in list_images(photos, "train")] == ["0.png"]
    assert len(list_images(photos, "test")) == 4
    assert list_images(photos / "1.png", "test") == [photos / "1.png"]
    assert len(list_images([photos / "1.png", photos / "2.png"], "test")) == 2


def test_broken_and_small_images_are_named_and_skipped(photos: Path) -> None:
    (photos / "empty.png").touch()
    (photos / "text.jpg").write_text("not an image")
    with pytest.warns(
        UserWarning,
        match=(
            r"skipped 3 images: 2.png \(80x80 is smaller than 96\), empty.png \(broken\), text.jpg"
            r" \(broken\)|skipped"
        ),
    ):
        usable = usable_images(
            [photos / n for n in ("1.png", "0.png", "2.png", "empty.png", "text.jpg")], 96
        )
    assert [p.name for p in usable] == ["1.png", "0.png"]


def test_images_damaged_inside_are_named_and_skipped_in_training_and_evaluation(
    photos: Path,
) -> None:
    whole = (photos / "0.png").read_bytes()
    (photos / "0.png").write_bytes(whole[: len(whole) // 2])  # its header reads well
    patches = Patches(photos, 64)
    with pytest.warns(UserWarning, match="skipped: cannot read .*0.png"):
        batches = [patches.batch(4, seed=0, step=s) for s in range(8)]
    patches.close()
    assert all(b.shape == (4, 3, 64, 64) for b in batches)
    with pytest.warns(UserWarning, match="skipped: cannot read .*0.png"):
        assert [p.name for p, _ in readable(sorted(photos.glob("*.png")))] == [
            "1.png",
            "2.png",
            "3.png",
        ]
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(DataError, match="every one of 1 is broken"),
    ):
        list(readable([photos / "0.png"]))


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        list_images(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="no images in"):
        list_images(tmp_path, "train")
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match="no usable image: a.png"):
        Patches(tmp_path, 64)
    with pytest.raises(DataError, match="cannot read"):
        read_image(tmp_path / "a.png")


def test_mix_separates_neighbours() -> None:
    seen = {mix(seed, step, rank) for seed in range(8) for step in range(50) for rank in range(4)}
    assert len(seen) == 8 * 50 * 4 and all(0 <= value < 1 << 63 for value in seen)
