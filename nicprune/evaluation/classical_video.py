"""x264 and x265 as baselines, by PyAV, on the same clips and by the same definitions.

Groups of pictures of the same length and low delay: no B frames, no look-ahead (tune zerolatency),
I frames at the same places and nowhere else. Frames are given as 4:2:0, which these codecs are
used with; what that costs is part of their PSNR over RGB. 4:2:0 needs even sides: an odd one is
coded with its last row or column twice, and cropped before it is scored. The rate is that of the
elementary stream, parameter sets included; x264's note of its own settings (some 700 bytes) is not
counted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nicprune.common.errors import CodecError, closest
from nicprune.common.machine import others_share, processor_time
from nicprune.data.clips import Clip
from nicprune.data.video_frames import BT601, BT709, from_rgb, is_bt709, name_colours, pyav, to_rgb
from nicprune.evaluation.video import ClipScore, FrameScores, VideoEvaluation, check_settings

ENCODERS = {"x264": ("libx264", "h264"), "x265": ("libx265", "hevc")}
"""FFmpeg's names of encoder and decoder."""

CRFS = (17, 22, 27, 32, 37)
"""Constant rate factors."""

PRESET = "medium"

NOTE = 6
"""Type of H.264's NAL units that hold supplemental information."""


def evaluate_classical_video(
    name: str,
    clips: Sequence[Clip],
    *,
    gop: int = 32,
    frames: int | None = None,
    crfs: Sequence[int] = CRFS,
    preset: str = PRESET,
) -> list[VideoEvaluation]:
    """Encode and decode clips with x264 or x265, once for each constant rate factor.

    Args:
        name: "x264" or "x265".
        clips, gop, frames: as for `evaluate_video`.
        crfs: constant rate factors.
        preset: the encoder's, from ultrafast to placebo.

    Raises:
        CodecError: the name is unknown, PyAV was built without it, or it refuses the clip.
        DataError: PyAV is not installed; there is no clip, or a frame cannot be read.
    """
    check_settings(clips, gop, frames)
    check_encoder(name, clips, preset)
    found = []
    for crf in crfs:
        before = processor_time()
        scores = tuple(_score(name, clip, gop, frames, crf, preset) for clip in clips)
        found.append(
            VideoEvaluation(
                name,
                None,
                f"crf {crf}",
                None,
                gop,
                scores,
                None,
                None,
                "cpu",
                torch.get_num_threads(),
                others_share(before, processor_time()),
            )
        )
    return found


def check_encoder(name: str, clips: Sequence[Clip], preset: str = PRESET) -> None:
    """Raise unless there is a classical codec of this name that takes clips of these sizes.

    Raises:
        CodecError: the name or the preset is unknown, PyAV was built without it, or it refuses the
            size of a clip.
        DataError: PyAV is not installed.
    """
    if name not in ENCODERS:
        raise CodecError(f"unknown classical codec {name!r}; {closest(name, ENCODERS)}")
    for clip in clips:
        with _refusals(name, clip):
            _encoder(pyav(), name, clip, 1, CRFS[0], preset).open()


@contextmanager
def _refusals(name: str, clip: Clip) -> Iterator[None]:
    """Turn errors of PyAV inside the block into a CodecError."""
    try:
        yield
    except (pyav().error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CodecError(f"{name} does not code {clip.name}: {reason:.200}") from None


def _score(name: str, clip: Clip, gop: int, frames: int | None, crf: int, preset: str) -> ClipScore:
    av: Any = pyav()
    scores, encoding, decoding = FrameScores(clip), _Stopwatch(), _Stopwatch()
    with _refusals(name, clip):
        encoder = _encoder(av, name, clip, gop, crf, preset)
        packets = list(_encoded(encoder, clip.frames(0, frames), _matrix(clip), encoding))
        decoder = av.CodecContext.create(ENCODERS[name][1], "r")
        decoder.thread_count = torch.get_num_threads()
        decoded = _decoded(decoder, packets, decoding)
        for index, (reference, packet, picture) in enumerate(
            zip(clip.frames(0, frames), packets, decoded, strict=True)
        ):
            if packet.is_keyframe != (index % gop == 0):
                raise CodecError(f"{name} put an I frame elsewhere than every {gop} frames")
            scores.add(
                reference.unsqueeze(0) / 255,
                picture[:, : clip.height, : clip.width].unsqueeze(0) / 255,
                8 * rate_bytes(name, bytes(packet)),
                intra=packet.is_keyframe,
            )
    return scores.result(encoding.seconds, decoding.seconds)


def _encoder(av: Any, name: str, clip: Clip, gop: int, crf: int, preset: str) -> Any:
    """Return an encoder with low delay and I frames every `gop` frames alone."""
    encoder = av.CodecContext.create(ENCODERS[name][0], "w")
    rate = clip.fps.limit_denominator(1 << 16)
    encoder.width, encoder.height = clip.width + clip.width % 2, clip.height + clip.height % 2
    encoder.pix_fmt = "yuv420p"
    encoder.framerate, encoder.time_base = rate, 1 / rate
    encoder.thread_count = torch.get_num_threads()
    name_colours(encoder, clip.height, _matrix(clip))
    given = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0"
    if name == "x264":  # zerolatency cuts a frame into a slice for each thread, which costs bits
        given += ":sliced-threads=0"
    if name == "x265":
        pools = torch.get_num_threads()
        given += f":open-gop=0:info=0:log-level=error:pools={pools}"
    encoder.options = {
        "preset": preset,
        "tune": "zerolatency",
        "crf": str(crf),
        f"{name}-params": given,
    }
    return encoder


def _encoded(
    encoder: Any, frames: Iterator[Tensor], matrix: int, time_spent: _Stopwatch
) -> Iterator[Any]:
    """Yield a packet for each frame."""
    for number, image in enumerate(frames):
        frame = from_rgb(_even(image), "yuv420p", matrix)
        frame.pts, frame.time_base = number, encoder.time_base
        yield from time_spent(encoder.encode, frame)
    yield from time_spent(encoder.encode, None)


def _even(image: Tensor) -> Tensor:
    """Return an image (3, H, W) with its last row and column twice where their number is odd."""
    _, height, width = image.shape
    rows = torch.arange(height + height % 2).clamp(max=height - 1)
    columns = torch.arange(width + width % 2).clamp(max=width - 1)
    return image[:, rows][:, :, columns]


def _matrix(clip: Clip) -> int:
    """Return the number of the matrix of a clip, by its own height where its file names none: with
    a row more it might be another.
    """
    return BT709[0] if is_bt709(clip.height, clip.matrix) else BT601[1]


def _decoded(decoder: Any, packets: Sequence[Any], time_spent: _Stopwatch) -> Iterator[Tensor]:
    for packet in (*packets, None):
        for frame in time_spent(decoder.decode, packet):
            yield to_rgb(frame)


def rate_bytes(name: str, packet: bytes) -> int:
    """Return the bytes of a packet that count: in H.264, without supplemental information."""
    if name != "x264":
        return len(packet)
    starts = [found.span() for found in re.finditer(b"\0?\0\0\1", packet)]
    ends = [*(start for start, _ in starts[1:]), len(packet)]
    units = zip(starts, ends, strict=True)
    return sum(end - start for (start, body), end in units if packet[body] & 31 != NOTE)


class _Stopwatch:
    """Seconds that the codec itself takes, without conversions of colour."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args)
        finally:
            self.seconds += time.perf_counter() - started
