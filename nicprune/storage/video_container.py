"""Encode a clip with a codec into a file, and decode it: see `coded_video` for what is stored."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.example import image_shape, size_multiple
from nicprune.codecs.rans import bounded_reads, recorded_symbols
from nicprune.common.errors import DataError, FileError, RecipeError, enough_memory
from nicprune.common.files import write_atomically
from nicprune.data.clips import Clip
from nicprune.data.images import to_channels
from nicprune.evaluation.padding import crop, pad
from nicprune.methods.video.coder import FrameCoder, check_codes_frames, video_coder
from nicprune.storage.coded_video import (
    LARGEST,
    CodedFrame,
    CodedVideo,
    CodedVideoWriter,
    VideoHeader,
    open_video,
)
from nicprune.storage.container import OTHER_SYMBOLS, coding_copy, shape_fits
from nicprune.storage.identity import earlier_mark, fingerprint, mark, tables
from nicprune.storage.values import MISFIT

GOP = 32
"""Frames in a group of pictures unless said otherwise, as learned video codecs are compared."""


@dataclass(frozen=True)
class Encoded:
    """A coded video in numbers.

    Attributes:
        frames, groups: numbers of frames and of groups of pictures.
        bytes: size of the file.
        bpp: bits of the file per pixel.
        kbits: kbit/s.
    """

    frames: int
    groups: int
    bytes: int
    bpp: float
    kbits: float


def encode_video(
    codec: nn.Module,
    clip: Clip,
    output: str | Path,
    *,
    gop: int = GOP,
    width: int | Sequence[int] | None = None,
    frames: int | None = None,
    progress: bool = False,
) -> Encoded:
    """Encode a clip into a file; `decode_video` with the same codec reads it.

    Args:
        codec: as `encode` takes it, at its highest rate and in the domain that is set. With the
            method `temporal_entropy_model`, frames are coded by the latents of the frame before;
            without, each on its own (all of them I frames).
        clip: the frames; see `clips_in`.
        output: file to write.
        gop: frames in a group of pictures: an I frame every so many.
        width: with a slimmable codec, the width; a list gives that of each group, its last item
            also that of all further ones. By default the one that is set.
        frames: number of frames to code, from the first; by default all.
        progress: show each frame on a terminal.

    Raises:
        CodecError: not a codec, or masks still decay on it.
        DataError: the clip has no frame, or one cannot be read.
        RecipeError: the codec has no such width.
        FileError: the file cannot be written.
    """
    coder = VideoCoder(codec)
    written: list[Encoded] = []

    def write(path: Path) -> None:
        written.append(
            coder.encode(clip, path, gop=gop, width=width, frames=frames, progress=progress)
        )

    write_atomically(output, write)
    return written[0]


def decode_video(codec: nn.Module, path: str | Path) -> Iterator[Tensor]:
    """Yield the frames of a video that `encode_video` wrote: uint8 RGB, shape (3, H, W), on the
    CPU.

    Args:
        codec: the codec that encoded it. Widths, rate and domain are read from the file.
        path: the file.

    Raises:
        CodecError: not a codec, or masks still decay on it.
        FileError: the file is missing, damaged, not made by `encode_video`, or encoded with
            another codec; or the symbols decoded are not the encoder's. Frames before the damage
            come first, and the message says which frame it hit.
    """
    return VideoCoder(codec).decode(path)


class VideoCoder:
    """A codec made ready for coding, for many videos: see `encode_video` and `decode_video`.

    Args:
        codec: as `encode_video` takes it. It is copied: changes made later do not count.
    """

    def __init__(self, codec: nn.Module):
        check_codes_frames(codec)
        self._ready = ready = coding_copy(codec)
        refresh_tables(ready)  # those that frames are coded with
        self._mark, self._tables = mark(fingerprint(ready), ready), tables(ready)
        self._channels, self._side = image_shape(unwrap(ready))
        self._multiple = size_multiple(unwrap(ready))
        self._device = next(ready.parameters()).device
        self._coders: dict[tuple[int | None, tuple[bytes, ...] | None], _Coder] = {}
        self._point: tuple[bytes, ...] | None = None
        self._point = tuple(self._coder(None, None).frames.point)

    @torch.no_grad()
    def encode(
        self,
        clip: Clip,
        path: str | Path,
        *,
        gop: int = GOP,
        width: int | Sequence[int] | None = None,
        frames: int | None = None,
        progress: bool = False,
    ) -> Encoded:
        """Encode a clip into a file, which is not written atomically; see `encode_video`."""
        if not 1 <= gop <= LARGEST or (frames is not None and frames < 1):
            raise RecipeError(
                f"groups of pictures and videos have one frame or more (got a group of {gop} and"
                f" {frames if frames is not None else 'all'} frames)"
            )
        count = min(len(clip), frames or len(clip))
        if not count:
            raise DataError(f"{clip.name} holds no frame")
        each = [width] if width is None or isinstance(width, int) else list(width)
        for one in each:  # refused before the work
            self._coder(one, self._point)
        header = VideoHeader(
            self._mark,
            self._tables,
            clip.width,
            clip.height,
            clip.fps.limit_denominator(1 << 20),
            gop,
        )
        with open(path, "wb") as file:
            writer = CodedVideoWriter(file, header)
            previous: Tensor | None = None
            for index, frame in enumerate(clip.frames(0, count)):
                if index % gop == 0:
                    previous = None
                    coder = self._coder(each[min(index // gop, len(each) - 1)], self._point)
                intra = previous is None
                with enough_memory(f"coding a frame of {clip.width}x{clip.height} pixels"):
                    x = self._input(frame)
                    with recorded_symbols() as seen:
                        strings, shape, latents = coder.frames.compress(x, previous)
                previous = latents if coder.frames.predicts else None
                digest = seen.digest(strings)
                writer.add(
                    strings, shape, digest, intra=intra, width=coder.width, point=coder.frames.point
                )
                if progress and sys.stderr.isatty():
                    print(f"\r{index + 1}/{count} frames\033[K", end="", file=sys.stderr)
            writer.end()
        if progress and sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        bpp = 8 * writer.size / (count * clip.width * clip.height)
        seconds = count / float(clip.fps)
        return Encoded(count, writer.groups, writer.size, bpp, 8 * writer.size / seconds / 1000)

    def decode(self, path: str | Path) -> Iterator[Tensor]:
        """Yield the frames of a file; see `decode_video`."""
        with open_video(path) as video:
            yield from self.decode_opened(video, str(path))

    def decode_opened(self, video: CodedVideo, where: str) -> Iterator[Tensor]:
        """Yield the frames of a file that is open; `where` is its name for messages."""
        self._check_made_for(video.header, where)
        header, previous, told = video.header, None, False
        like = torch.empty(1, self._channels, header.height, header.width, device="meta")
        padded, padding = pad(like, self._multiple)
        for frame in video.frames():
            try:
                x_hat, previous = self._decoded(frame, padded, previous)
            except (DataError, FileError, RecipeError) as error:
                raise FileError(f"{where} cannot be decoded at {frame}: {error}") from None
            except Exception as error:  # a codec may raise anything on data that it did not write
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise FileError(
                    f"{where} cannot be decoded at {frame} ({reason:.200}): was it coded with other"
                    " library versions, or on other hardware?"
                ) from error
            if not frame.digest and not told:
                told = True
                warnings.warn(
                    f"{where} was coded by a codec with an entropy coder of its own and carries no"
                    " digest of its symbols: if it was coded with other software or CPU kernels,"
                    " frames may be wrong without an error",
                    stacklevel=3,
                )
            yield (
                crop(x_hat, padding)[0].clamp(0, 1).mul(255).round().byte().cpu().expand(3, -1, -1)
            )

    @torch.no_grad()
    def _decoded(
        self, frame: CodedFrame, padded: Tensor, previous: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return a frame, (1, C, H, W), padded, and the latents for the next."""
        coder = self._coder(frame.width, frame.point)
        if not frame.intra and (previous is None or not coder.frames.predicts):
            raise FileError("it is predicted from the frame before, which this codec does not do")
        usual = coder.intra if frame.intra else coder.predicted
        tiles = -(-padded.shape[-2] // self._side), -(-padded.shape[-1] // self._side)
        if not shape_fits(frame.shape, usual.shape, tiles) or not _strings(frame.strings):
            raise FileError(MISFIT)
        with (
            enough_memory(f"a frame of {padded.shape[-1]}x{padded.shape[-2]} pixels"),
            bounded_reads(2 * usual.symbols * tiles[0] * tiles[1]),
            recorded_symbols() as read,
        ):
            x_hat, latents = coder.frames.decompress(
                frame.strings, frame.shape, None if frame.intra else previous
            )
        if frame.digest and read.digest(frame.strings) != frame.digest:
            raise FileError(OTHER_SYMBOLS)
        if x_hat.shape != padded.shape:
            raise ValueError(f"decoded {tuple(x_hat.shape)}, expected {tuple(padded.shape)}")
        if not bool(torch.isfinite(x_hat).all()):
            raise ValueError("decoded values that are not finite")
        return x_hat, latents

    def _check_made_for(self, header: VideoHeader, where: str) -> None:
        """Raise FileError where another codec coded a video."""
        if header.mark != self._mark and header.mark != earlier_mark(self._ready):
            raise FileError(
                f"{where} was coded with another codec (fingerprint {header.mark.hex()}, this one"
                f" has {self._mark.hex()}): decode with the codec that encoded it"
            )
        if header.tables != self._tables:
            raise FileError(
                f"{where} was coded with other CDF tables than this codec has now: they were"
                " updated since, or made by other library versions or hardware; save the codec,"
                " and decode with that file"
            )

    def _input(self, frame: Tensor) -> Tensor:
        """Return a frame as the codec takes it: (1, C, H, W) in [0, 1], padded."""
        picture = to_channels(frame, self._channels)
        return pad(picture.unsqueeze(0).to(self._device).float().div(255), self._multiple)[0]

    @property
    def _tile(self) -> Tensor:
        """The smallest image that the codec takes, of noise."""
        draw = torch.Generator().manual_seed(0)
        tile = torch.rand(1, self._channels, self._side, self._side, generator=draw)
        return tile.to(self._device)

    def _coder(self, width: int | None, point: tuple[bytes, ...] | None) -> _Coder:
        """Return what codes frames at a width, where headers say; by default at what is set. Of
        other points than that, those of the last are kept: a file may name any number.
        """
        if (width, point) not in self._coders:
            kept = (None, self._point, point)
            self._coders = {key: one for key, one in self._coders.items() if key[1] in kept}
            made = _Coder(video_coder(self._ready, width, point), self._tile)
            for key in ((width, point), (made.width, tuple(made.frames.point))):
                self._coders[key] = made
        return self._coders[width, point]


@dataclass(frozen=True)
class _Usual:
    """The shape and the number of symbols of the smallest image that a codec takes."""

    shape: Any
    symbols: int


class _Coder:
    """Coder of frames at one width, and the size of its bitstreams."""

    def __init__(self, frames: FrameCoder, tile: Tensor):
        self.frames, self._tile = frames, tile
        self.width = frames.width if frames.widths > 1 else None

    @cached_property
    def _latents(self) -> tuple[_Usual, Tensor | None]:
        return self._tried(None)

    @property
    def intra(self) -> _Usual:
        return self._latents[0]

    @cached_property
    def predicted(self) -> _Usual:
        return self._tried(self._latents[1])[0]

    @torch.no_grad()
    def _tried(self, previous: Tensor | None) -> tuple[_Usual, Tensor | None]:
        with recorded_symbols() as seen:
            _, shape, latents = self.frames.compress(self._tile, previous)
        return _Usual(shape, seen.written), latents


def _strings(strings: Any) -> bool:
    """Return whether these are what a coder returns: strings in nested lists."""
    return isinstance(strings, list) and all(
        isinstance(one, bytes) or _strings(one) for one in strings
    )
