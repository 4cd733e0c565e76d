"""Write a clip as it is decoded: PNG files in a folder, .y4m or .mp4.

PNG keeps the frames as they are. A .y4m holds luma and chroma of full resolution, rounded to 8
bits: values come back to within a few levels of 256. A .mp4 is coded anew, to be looked at.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from nicprune.common.errors import FileError, NicpruneError
from nicprune.common.files import check_writable, write_atomically
from nicprune.data.images import write_png
from nicprune.data.video_frames import from_rgb, name_colours, pyav

MP4_CRF = 12
"""Constant rate factor of x264 for what is to be looked at: hardly any loss is visible."""

FRAME = re.compile(r"frame_[0-9]{6,}\.png")
"""Names of frames in a folder."""

FINEST_RATE = 1 << 20
"""Largest denominator of frames per second that is written."""


def is_folder_of_frames(path: Path) -> bool:
    """Return whether frames go to this path as PNG files: it has no suffix."""
    return not path.suffix


def check_clip_output(path: Path, *, force: bool = False) -> None:
    """Raise unless frames may be written to `path`: a .y4m, a .mp4, or a folder that is new, empty
    or holds frames alone. With `force`, its other files stay beside the frames.

    Raises:
        DataError: PyAV is not installed, which .y4m and .mp4 need.
        FileError: another suffix, or a folder of other files, or one that cannot be written into.
    """
    suffix = path.suffix.lower()
    if suffix in (".y4m", ".mp4"):
        pyav()
        return
    if not is_folder_of_frames(path):
        raise FileError(
            f"decode writes frames into a folder, a .y4m or a .mp4; {path} has another suffix"
        )
    if path.exists() and not path.is_dir():
        raise FileError(f"{path} exists and is no folder; name another output")
    others = (
        [one for one in path.iterdir() if not FRAME.fullmatch(one.name)] if path.exists() else []
    )
    if others and not force:
        raise FileError(
            f"{path} holds other files than frames ({others[0].name}); name another folder, or"
            " write into it with --force"
        )
    check_writable(path.parent)  # frames are written beside the folder first
    check_writable(path)


def write_clip(frames: Iterator[Tensor], path: str | Path, fps: Fraction) -> int:
    """Write frames, uint8 RGB (3, H, W), as they come; return their number.

    Args:
        frames: all of one size.
        path: a .y4m, a .mp4, or a folder for PNG files, whose earlier frames are replaced.
        fps: frames per second.

    Raises:
        FileError: the output cannot be written; or the source of the frames raised an error of
            nicprune: the frames before it are written, and the message says how many.
    """
    path, failed, count = Path(path), list[NicpruneError](), 0

    def until_failure() -> Iterator[Tensor]:
        nonlocal count
        try:
            for frame in frames:
                yield frame
                count += 1
        except NicpruneError as error:
            failed.append(error)

    source = until_failure()
    first = next(source, None)
    if first is not None:
        if is_folder_of_frames(path):
            _write_folder(first, source, path)
        else:
            kind = _write_y4m if path.suffix.lower() == ".y4m" else _write_mp4
            write_atomically(path, lambda temporary: kind(first, source, temporary, fps))
    if failed:
        where = f"; the {count} frames before it are in {path}" if count else ""
        raise FileError(f"{failed[0]}{where}") from failed[0]
    return count


def _write_folder(first: Tensor, rest: Iterator[Tensor], folder: Path) -> None:
    """Write PNG files beside the folder first, so that it never holds a part of two clips."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:100]}."))
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror or error}") from None
    try:
        for number, frame in enumerate(_chained(first, rest)):
            write_png(frame.float() / 255, temporary / f"frame_{number:06}.png")
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            if FRAME.fullmatch(old.name):
                old.unlink()
        for new in sorted(temporary.iterdir()):
            os.replace(new, folder / new.name)
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_y4m(first: Tensor, rest: Iterator[Tensor], path: Path, fps: Fraction) -> None:
    _write_video(first, rest, path, fps, ("yuv4mpegpipe", "wrapped_avframe", "yuv444p"), {})


def _write_mp4(first: Tensor, rest: Iterator[Tensor], path: Path, fps: Fraction) -> None:
    odd = first.shape[1] % 2 or first.shape[2] % 2  # 4:2:0 takes even sizes alone
    kind = ("mp4", "libx264", "yuv444p" if odd else "yuv420p")
    _write_video(first, rest, path, fps, kind, {"crf": str(MP4_CRF)})


def _write_video(
    first: Tensor,
    rest: Iterator[Tensor],
    path: Path,
    fps: Fraction,
    kind: tuple[str, str, str],
    options: dict[str, str],
) -> None:
    """Write frames by PyAV; `kind` names the container, the encoder and the format of pixels."""
    av: Any = pyav()
    rate = fps.limit_denominator(FINEST_RATE)
    try:
        with av.open(os.fspath(path), "w", format=kind[0]) as container:
            stream = container.add_stream(kind[1], rate=rate, options=options)
            stream.height, stream.width = first.shape[1:]
            stream.pix_fmt = kind[2]
            name_colours(stream.codec_context, first.shape[1])
            for number, image in enumerate(_chained(first, rest)):
                frame = from_rgb(image, kind[2])
                frame.pts, frame.time_base = number, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except (av.error.FFmpegError, ValueError) as error:
        with contextlib.suppress(OSError):
            path.unlink()
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"cannot write {path.suffix or kind[0]} of this clip: {reason}") from None


def _chained(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest
