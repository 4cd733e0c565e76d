"""A video file whose end is missing is refused, whatever its container; whole ones are read."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from helpers_video import moving, written

from nicprune.common.errors import DataError
from nicprune.data.clip_ends import check_end
from nicprune.data.clips import VideoClip
from nicprune.data.video_frames import from_rgb

FRAMES = 12

KINDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "mkv": ("matroska", "ffv1", {}),
    "streamed.mkv": ("matroska", "ffv1", {"live": "1", "cluster_size_limit": "4000"}),
    "webm": ("webm", "libvpx-vp9", {}),
    "avi": ("avi", "mpeg4", {}),
    "mp4": ("mp4", "libx264", {}),
    "front.mp4": ("mp4", "libx264", {"movflags": "faststart"}),
    "parts.mp4": ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "mov": ("mov", "libx264", {}),
    "y4m": ("yuv4mpegpipe", "wrapped_avframe", {}),
}
"""Container, encoder and options of the container, by the ends of names."""


def make(kind: str, folder: Path) -> Path:
    """A whole file of 12 frames; one of each group of four is a key frame."""
    import av

    container, encoder, options = KINDS[kind]
    path = folder / f"whole.{kind}"
    with av.open(str(path), "w", format=container, options=options) as file:
        group = {} if container == "yuv4mpegpipe" else {"g": "4"}
        stream: Any = file.add_stream(encoder, rate=25, options=group)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for number, image in enumerate(moving(FRAMES, 32, 48)):
            frame = from_rgb(image, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def count(path: Path) -> int:
    clip = VideoClip(path)
    found = list(clip.frames())
    assert len(found) == len(clip)
    return len(found)


def refuse(path: Path) -> None:
    with pytest.raises(DataError, match="is cut short: ") as caught:
        count(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_whose_end_is_missing_is_refused(kind: str, tmp_path: Path) -> None:
    whole = make(kind, tmp_path)
    assert count(whole) == FRAMES
    data = whole.read_bytes()
    path = tmp_path / f"cut.{kind}"
    for left in (0.5, 0.83):
        path.write_bytes(data[: int(len(data) * left)])
        refuse(path)
    path.write_bytes(data[:-7])
    refuse(path)


def without_sizes(data: bytes) -> bytes:
    """A Matroska whose segment and clusters are of unknown size, as browsers write them. Inside, an
    element that must be skipped by its size stays.
    """
    found = bytearray(data)
    for name in (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"):
        place = found.find(name)
        while place >= 0:
            first = found[place + 4]
            long = 9 - first.bit_length()
            found[place + 4 : place + 4 + long] = bytes([(1 << (8 - long)) | 0xFF >> long]) + (
                b"\xff" * (long - 1)
            )
            place = found.find(name, place + 4 + long)
    return bytes(found)


def test_of_unknown_sizes_the_parts_tell(tmp_path: Path) -> None:
    """Neither duration nor size: the last block that is there says how long it is."""
    data = without_sizes(make("streamed.mkv", tmp_path).read_bytes())
    path = tmp_path / "a.mkv"
    path.write_bytes(data)
    assert count(path) == FRAMES
    path.write_bytes(data[:-7])
    refuse(path)


def test_boxes_and_chunks_of_unknown_size_last_to_the_end(tmp_path: Path) -> None:
    data = bytearray(make("front.mp4", tmp_path).read_bytes())
    at = data.index(b"mdat") - 4
    data[at : at + 4] = bytes(4)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    assert count(path) == FRAMES
    path.write_bytes(data[:-7])  # the last frame is read in part
    refuse(path)
    data = bytearray(make("avi", tmp_path).read_bytes())
    data[4:8] = bytes(4)
    (tmp_path / "a.avi").write_bytes(data)
    assert count(tmp_path / "a.avi") == FRAMES


@pytest.mark.parametrize("kind", ["mkv", "avi", "mp4", "front.mp4"])
def test_what_stands_behind_the_end_is_left_alone(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(make(kind, tmp_path).read_bytes() + b"\x42\x86more than that" + bytes(50))
    assert count(path) == FRAMES


def test_large_boxes_have_sizes_of_64_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    box = b"\0\0\0\x01mdat" + (1 << 33).to_bytes(8, "big")
    path.write_bytes(b"\0\0\0\x08ftyp" + box + bytes(9))
    with pytest.raises(DataError, match=r"cut short: 33 of at least 8,589,934,600 bytes"):
        check_end(path)


def test_files_of_other_kinds_are_not_looked_at(tmp_path: Path) -> None:
    for content in (b"", b"R", b"RIFF", b"\x1a\x45\xdf\xa3", b"a text, no video"):
        (tmp_path / "a").write_bytes(content)
        check_end(tmp_path / "a")
    with pytest.raises(DataError, match="cannot read"):
        check_end(tmp_path / "nowhere")
    written(tmp_path / "a.y4m", moving(2))
    check_end(tmp_path / "a.y4m")
