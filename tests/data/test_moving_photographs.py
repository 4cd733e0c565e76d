"""Clips made of photographs: the same for the same files, still where they are said to be, and
moving as they say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nicprune.common.errors import DataError
from nicprune.data.clip_patches import ClipPatches, ClipSampling
from nicprune.data.clips import ImageClip
from nicprune.data.images import read_image, write_png
from nicprune.data.moving_photographs import (
    LARGEST_SIDE,
    MOTION,
    NOISE,
    Camera,
    MovingObject,
    MovingPhotograph,
    moving_photographs,
)


def photograph(height: int, width: int, seed: int = 0) -> Tensor:
    """A soft picture, (3, height, width) in [0, 1]."""
    small = torch.rand(1, 3, height // 6, width // 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, size=(height, width), mode="bicubic")[0].mul(0.8).add(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred photographs of 48x56 pixels."""
    folder = tmp_path_factory.mktemp("photographs")
    for seed in range(100):
        write_png(photograph(48, 56, seed), folder / f"{seed:03}.png")
    return folder


@pytest.fixture
def still(tmp_path: Path) -> MovingPhotograph:
    """A clip of 60x72 pixels and five frames in which nothing moves."""
    write_png(photograph(60, 72), tmp_path / "still.png")
    clip = MovingPhotograph(tmp_path / "still.png", 5)
    clip.camera, clip.object, clip.fade, clip.noise = Camera(), None, (0.0, 0.0), 0.0
    return clip


def in_float(clip: MovingPhotograph) -> Tensor:
    return torch.stack(clip.read(range(len(clip)))).float()


def test_frames_depend_on_the_files_and_the_index_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    first, second = moving_photographs(folder, 5), moving_photographs(folder, 5)
    for one, other in zip(first[:20], second[:20], strict=True):
        in_order = one.read([0, 1, 2, 3, 4])
        alone = [other.read([i])[0] for i in (3, 1, 4, 0, 2)]
        assert all(torch.equal(in_order[i], f) for i, f in zip((3, 1, 4, 0, 2), alone, strict=True))
        assert all(f.shape == (3, 48, 56) and f.dtype == torch.uint8 for f in in_order)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({clip.camera for clip in first}) > 40, "each photograph has a motion of its own"


def test_clips_are_as_different_as_the_documentation_says(folder: Path) -> None:
    clips = moving_photographs(folder, 7)
    fastest = MOTION * 48
    moving = [clip for clip in clips if clip.camera != Camera()]
    assert 45 <= len(moving) <= 75
    speeds = [math.hypot(*clip.camera.velocity) for clip in moving]
    assert fastest / 2 < max(speeds) <= fastest and sorted(speeds)[len(speeds) // 2] < fastest / 2
    objects = [clip.object for clip in clips if clip.object is not None]
    assert 35 <= len(objects) <= 65 and {thing.ellipse for thing in objects} == {False, True}
    assert all(4.8 <= side <= 24 for thing in objects for side in thing.size)
    noise = [clip.noise for clip in clips if clip.noise]
    assert 35 <= len(noise) <= 65 and NOISE / 2 < max(noise) <= NOISE
    assert 8 <= sum(clip.fade != (0, 0) for clip in clips) <= 35


def test_a_still_camera_films_the_photograph_itself_but_for_noise(still: MovingPhotograph) -> None:
    assert all(torch.equal(f, read_image(still.path)) for f in still.read(range(5)))
    exact = in_float(still)
    still.noise = 2.0
    difference = in_float(still) - exact
    assert abs(float(difference.std()) - 2.02) < 0.1 and abs(float(difference.mean())) < 0.1
    between = (difference[1:] - difference[:-1]).std() / difference.std()
    assert abs(float(between) - math.sqrt(2)) < 0.05, "noise is drawn anew for each frame"


def test_a_fade_changes_brightness_and_contrast_steadily(still: MovingPhotograph) -> None:
    exact = in_float(still)
    still.fade = (0.02, 3.0)
    fading = in_float(still)
    for time, (before, after) in enumerate(zip(exact, fading, strict=True), -2):
        expected = (before - 128) * (1 + 0.02 * time) + 128 + 3.0 * time
        assert float((after - expected.clamp(0, 255)).abs().max()) <= 0.51


def test_the_content_moves_by_the_velocity(still: MovingPhotograph) -> None:
    still.camera = Camera(velocity=(3.0, -2.0))
    frames = in_float(still)
    for before, after in zip(frames, frames[1:], strict=False):
        back = after[:, :-2, 3:]
        assert float((back - before[:, 2:, :-3]).abs().max()) <= 1
    assert torch.equal(frames[2].byte(), read_image(still.path)), "the middle of the clip"


def test_fractions_of_a_pixel_move_too(still: MovingPhotograph) -> None:
    still.camera = Camera(velocity=(0.5, 0.0))
    frames = in_float(still)
    assert float((frames[2, :, :, 1:] - frames[0, :, :, :-1])[..., 8:-8].abs().mean()) < 0.5
    halfway = (frames[0] + frames[2]) / 2
    apart = (frames[1] - frames[0]).abs().mean()
    assert float((frames[1] - halfway).abs().mean() / apart) < 0.25


def test_drawn_cameras_move_as_they_say(folder: Path) -> None:
    checked = 0
    for clip in moving_photographs(folder, 5):
        if math.hypot(*clip.camera.velocity) < 0.4:
            continue
        dx, dy = (round(4 * v) for v in clip.camera.velocity)
        clip.object, clip.noise, clip.fade = None, 0.0, (0.0, 0.0)
        clip.camera = replace(clip.camera, zoom=0, rotation=0)
        before, after = (f.float() for f in clip.read([0, 4]))
        back = torch.roll(after, (-dy, -dx), (1, 2))
        inside = (slice(None), slice(8, -8), slice(8, -8))
        assert (back - before)[inside].abs().mean() < (after - before)[inside].abs().mean() * 0.8
        checked += 1
    assert checked >= 15


def bright(frame: Tensor) -> tuple[float, float]:
    """The centre of gravity of what is bright, (x, y) from the centre of the frame."""
    weight = (frame.float().mean(0) - 60).clamp(min=0)
    y, x = (torch.arange(n) + 0.5 - n / 2 for n in weight.shape)
    return float((weight.sum(0) * x).sum() / weight.sum()), float(
        (weight.sum(1) * y).sum() / weight.sum()
    )


def test_zoom_and_rotation_are_about_the_centre(tmp_path: Path) -> None:
    picture = torch.full((3, 200, 240), 0.1)
    picture[:, 96:105, 176:185] = 0.9  # 60.5 right of the centre, 0.5 below
    write_png(picture, tmp_path / "spot.png")
    clip = MovingPhotograph(tmp_path / "spot.png", 7)
    clip.object, clip.fade, clip.noise = None, (0.0, 0.0), 0.0
    clip.camera = Camera(zoom=0.015, rotation=math.radians(2))
    for time, frame in enumerate(clip.read(range(7)), -3):
        x, y = bright(frame)
        assert abs(math.hypot(x, y) - math.hypot(60.5, 0.5) * 1.015**time) < 0.1
        assert abs(math.degrees(math.atan2(y, x) - math.atan2(0.5, 60.5)) - 2 * time) < 0.1


@pytest.mark.parametrize("ellipse", [False, True])
def test_an_object_moves_in_front_on_its_own(
    ellipse: bool, still: MovingPhotograph, tmp_path: Path
) -> None:
    write_png(torch.full((3, 80, 80), 1.0), tmp_path / "white.png")
    plain = MovingPhotograph(tmp_path / "white.png", 5)
    behind = in_float(still)
    still.object = MovingObject(
        source=plain.path,
        size=(16.0, 12.0),
        centre=(36.0, 30.0),
        velocity=(3.0, -2.0),
        cut_from=(0.5, 0.5),
        ellipse=ellipse,
        softness=1.0,
        mirrored=False,
    )
    opacity = ((in_float(still) - behind) / (255 - behind)).mean(1)
    area = 16 * 12 * (math.pi / 4 if ellipse else 1)
    for time, mask in enumerate(opacity, -2):
        y, x = (torch.arange(n) + 0.5 for n in mask.shape)
        assert abs(float(mask.sum()) - area) < 0.06 * area
        assert abs(float((mask.sum(0) * x).sum() / mask.sum()) - 36 - 3 * time) < 0.3
        assert abs(float((mask.sum(1) * y).sum() / mask.sum()) - 30 + 2 * time) < 0.3
    still.object = replace(still.object, centre=(200.0, -90.0))
    assert torch.equal(in_float(still), behind), "out of sight"


def test_an_object_is_of_another_photograph_or_mirrored(folder: Path) -> None:
    paths = sorted(folder.iterdir())
    for path, other in zip(paths, paths[1:], strict=False):
        among_two, alone = MovingPhotograph(path, 5, [other, path]), MovingPhotograph(path, 5)
        assert among_two.object is None or among_two.object.source == other
        assert alone.object is None or (alone.object.source == path and alone.object.mirrored)


def test_what_an_object_shows_moves_with_it(still: MovingPhotograph, tmp_path: Path) -> None:
    write_png(photograph(60, 72, 5), tmp_path / "other.png")
    still.object = MovingObject(
        tmp_path / "other.png",
        (20.0, 20.0),
        (36.0, 30.0),
        (2.0, 1.0),
        (0.5, 0.5),
        False,
        1.0,
        False,
    )
    exact = read_image(tmp_path / "other.png")[:, 22:38, 28:44]
    for time, frame in enumerate(still.read(range(5)), -2):
        piece = frame[:, 22 + time : 38 + time, 28 + 2 * time : 44 + 2 * time]
        assert int((piece.int() - exact.int()).abs().max()) <= 1
    still.object = replace(still.object, mirrored=True)
    assert int((still.read([2])[0][:, 22:38, 28:44].int() - exact.flip(-1).int()).abs().max()) <= 1


def test_frames_are_as_large_as_the_photograph_and_at_most_768(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LARGEST_SIDE == 768
    monkeypatch.setattr("nicprune.data.moving_photographs.LARGEST_SIDE", 64)
    write_png(photograph(48, 100), tmp_path / "large.png")
    clip = MovingPhotograph(tmp_path / "large.png", 3)
    clip.camera, clip.object, clip.fade, clip.noise = Camera(), None, (0.0, 0.0), 0.0
    assert (clip.height, clip.width) == (48, 64)
    frame, whole = clip.read([0])[0], read_image(clip.path)
    assert any(torch.equal(frame, whole[:, :, left : left + 64]) for left in range(37))
    clip.camera = Camera(velocity=(2.0, 0.0))
    left = next(n for n in range(37) if torch.equal(clip.read([1])[0], whole[:, :, n : n + 64]))
    seen = whole[:, :, max(0, left - 2) : left - 2 + 64]  # of the photograph, beyond the frame
    assert int((clip.read([2])[0][..., -seen.shape[2] :].int() - seen.int()).abs().max()) <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [0, *range(1, 9), 9])  # 0 and 9 mean nothing
def test_clips_of_images_are_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    size = (40, 30) if 5 <= orientation <= 8 else (30, 40)
    for clip in (
        MovingPhotograph(path, 3),
        ImageClip([path], "turned"),
    ):
        assert (clip.height, clip.width) == size == clip.read([0])[0].shape[1:]


def test_beyond_the_border_the_photograph_is_mirrored(still: MovingPhotograph) -> None:
    still.camera = Camera(velocity=(4.0, 0.0))
    last, whole = still.read([4])[0], read_image(still.path)  # moved by 8 columns
    assert int((last[:, :, :8].int() - whole[:, :, :8].flip(-1).int()).abs().max()) <= 1


def change(path: Path) -> None:
    write_png(1 - read_image(path).float() / 255, path)


def test_what_a_run_learns_from_is_known_by_the_files(tmp_path: Path) -> None:
    for seed in range(8):
        write_png(photograph(48, 56, seed), tmp_path / f"{seed}.png")
    sampling = ClipSampling((1, 2), 5, 3, "photographs")

    def sources(count: int = 5) -> list[list[str]]:
        return ClipPatches(moving_photographs(tmp_path, count), 32, sampling).sources()

    first = sources()
    assert [name for name, _ in first] == [f"{seed}.png" for seed in range(8)]
    assert sources() == first and sources(6) != first
    clip = next(c for c in moving_photographs(tmp_path, 5) if c.object is not None)
    assert clip.object is not None
    digest = clip.digest()
    change(clip.object.source)
    again = MovingPhotograph(clip.path, 5, [clip.path, clip.object.source])
    assert again.digest() != digest, "the object's photograph counts"
    change(clip.path)
    assert sources()[int(clip.path.stem)] != first[int(clip.path.stem)]


def unreadable(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda folder: None, "no images in "),
        (lambda folder: (folder / "clip.mp4").write_bytes(b"video"), "no images in "),
        (unreadable, r"no usable image: broken.png \(broken\)"),
        (
            lambda f: write_png(torch.rand(3, 40, 20), f / "a.png"),
            "a.png .20x40 is smaller than 32",
        ),
    ],
    ids=["empty", "videos", "broken", "small"],
)
def test_a_folder_without_photographs_gives_one_line(
    fill: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    fill(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        moving_photographs(tmp_path, 7, 32)
    assert "\n" not in str(caught.value)


def test_a_damaged_photograph_and_a_missing_frame_give_one_line(
    still: MovingPhotograph, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"still.png has 5 frames, and none of index 5"):
        still.read([0, 5])
    still.path.write_bytes(still.path.read_bytes()[:-200])
    with pytest.raises(DataError, match="cannot read .*still.png as an image"):
        MovingPhotograph(still.path, 5).read([0])
    with pytest.raises(DataError, match="cannot read|no such|is missing"):
        MovingPhotograph(tmp_path / "none.png", 5)


def test_samples_are_the_packages_photographs() -> None:
    names = [clip.name for clip in moving_photographs("samples", 7)]
    assert "astronaut.png" in names and len(names) == 6
