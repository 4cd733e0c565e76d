"""File format of a coded video: a header, frames in order, and an end, written and read one by one.

    magic (4) | version (1) | records

    record: kind (1) | length of the body (4) | body | CRC-32 (4)

    header:    fingerprint of the codec (8) | CRC-32 of its CDF tables (4)
               | width, height, frames per second as a fraction, frames in a group
    I frame:   width of the codec and headers of its operating point, digest of the symbols, shape,
               strings
    P frame:   digest of the symbols, shape, strings
    end:       number of frames

A group of pictures is an I frame and the P frames behind it; each has a width of its own, where
the codec has several. The headers are those of the codec's bitstreams: the rate of a modulator,
the target domain of an adaptation. The CRC-32 of a record is that of all before it and its own,
without other CRC-32s, so that no record can be missing, twice or in another place. Fingerprint,
digest, shape and strings are those of a coded image (see `coded_image`), and values are stored as
`values`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from nicprune.codecs.rans import DIGEST_BYTES
from nicprune.common.errors import DataError, FileError
from nicprune.common.files import check_regular
from nicprune.data.images import check_size
from nicprune.storage.values import MISFIT, pack, unpack_all

MAGIC, VERSION = b"\x8bNPV", 1
"""The first byte is not ASCII, so that no text is taken for a video."""

START = MAGIC + bytes([VERSION])

SUFFIX = ".npv"

HEADER, INTRA, PREDICTED, END = range(4)
"""Kinds of records."""

MARK_BYTES, TABLES_BYTES = 8, 4

LARGEST = (1 << 32) - 1
"""Largest number in a header, and largest body of a record in bytes."""


@dataclass(frozen=True)
class VideoHeader:
    """A coded video but for its frames.

    Attributes:
        mark: which codec decodes it; see `identity.mark`.
        tables: CRC-32 of the codec's CDF tables.
        width, height: in pixels.
        fps: frames per second.
        gop: largest number of frames in a group of pictures.
    """

    mark: bytes
    tables: int
    width: int
    height: int
    fps: Fraction
    gop: int


@dataclass(frozen=True)
class CodedFrame:
    """A coded frame.

    Attributes:
        index: its number, from 0.
        group: number of its group of pictures.
        intra: whether it is an I frame.
        width: width of the codec in its group; None for a codec of one width.
        point: headers of its bitstreams in its group; see `FrameCoder.point`.
        digest: of its symbols; empty if it carries none.
        shape, strings: what the coder returned.
        at: byte of the file at which it begins.
    """

    index: int
    group: int
    intra: bool
    width: int | None
    digest: bytes
    shape: Any
    strings: Any
    at: int = 0
    point: tuple[bytes, ...] = ()

    def __str__(self) -> str:
        return f"frame {self.index} (group {self.group}, at byte {self.at:,})"


class CodedVideoWriter:
    """Write a coded video into an open file, frame by frame; `end` completes it.

    Attributes:
        frames, groups: numbers of frames and groups of pictures written so far.
        size: bytes written so far.
    """

    def __init__(self, file: BinaryIO, header: VideoHeader):
        self._file, self._checksum = file, zlib.crc32(START)
        self.frames = self.groups = self.size = 0
        self._put(START)
        rate = header.fps
        numbers = (header.width, header.height, rate.numerator, rate.denominator, header.gop)
        self._record(
            HEADER,
            header.mark
            + header.tables.to_bytes(TABLES_BYTES, "big")
            + b"".join(map(pack, numbers)),
        )

    def add(
        self,
        strings: Any,
        shape: Any,
        digest: bytes,
        *,
        intra: bool,
        width: int | None = None,
        point: Sequence[bytes] = (),
    ) -> None:
        """Write the next frame. `width` and `point` are those of its group, and are stored with an
        I frame.
        """
        values = [digest, shape, strings]
        if intra:
            values = [[*([] if width is None else [width]), *point], *values]
            self.groups += 1
        self._record(INTRA if intra else PREDICTED, b"".join(map(pack, values)))
        self.frames += 1

    def end(self) -> None:
        """Write the end, without which a file counts as cut short."""
        self._record(END, pack(self.frames))

    def _record(self, kind: int, body: bytes) -> None:
        if len(body) > LARGEST:
            raise FileError(f"a frame of {len(body):,} bytes is too large for this format")
        start = bytes([kind]) + len(body).to_bytes(4, "big")
        self._checksum = zlib.crc32(start + body, self._checksum)
        self._put(start + body + self._checksum.to_bytes(4, "big"))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.size += len(data)


class CodedVideo:
    """A coded video that is read frame by frame; `open_video` opens one.

    Attributes:
        header: what the file says of itself.
        size: bytes of the file.
    """

    def __init__(self, file: BinaryIO, where: str):
        self._file, self._where, self._checksum = file, where, zlib.crc32(START)
        self.size = os.fstat(file.fileno()).st_size
        start = file.read(len(MAGIC) + 1)
        if not start.startswith(MAGIC):
            told = "empty" if not start else "not a video that nicprune encoded"
            raise FileError(f"{where} is {told}")
        version = start[len(MAGIC)] if len(start) > len(MAGIC) else VERSION
        if version > VERSION:
            raise FileError(
                f"{where} has format version {version}; this nicprune reads up to {VERSION}:"
                " pip install --upgrade nicprune"
            )
        if version != VERSION:
            raise FileError(f"{where} is damaged: it has format version {version}")
        kind, body = self._record("its header")
        if kind != HEADER:
            raise FileError(f"{where} is damaged: it does not begin with a header")
        self.header = self._parsed(body)

    def _parsed(self, body: bytes) -> VideoHeader:
        start = MARK_BYTES + TABLES_BYTES
        try:
            numbers = unpack_all(body[start:], 5)
            if not all(isinstance(n, int) and 0 < n <= LARGEST for n in numbers):
                raise FileError(MISFIT)
            width, height, numerator, denominator, gop = numbers
            check_size(width, height, "the video")
        except (DataError, FileError) as error:
            raise FileError(f"{self._where} cannot be decoded here: {error}") from None
        return VideoHeader(
            body[:MARK_BYTES],
            int.from_bytes(body[MARK_BYTES:start], "big"),
            width,
            height,
            Fraction(numerator, denominator),
            gop,
        )

    def frames(self) -> Iterator[CodedFrame]:
        """Yield the frames in order.

        Raises:
            FileError: the file is damaged or cut short; says at which frame and byte. The frames
                before it are whole.
        """
        index, group = 0, -1
        width: int | None = None
        point: tuple[bytes, ...] = ()
        while True:
            at = self._file.tell()
            here = f"frame {index} (at byte {at:,})"
            kind, body = self._record(here)
            try:
                if kind == END:
                    if unpack_all(body, 1) != [index]:
                        raise FileError(MISFIT)
                    break
                if kind == INTRA:
                    told, *values = unpack_all(body, 4)
                    (width, point), group = _width_and_point(told), group + 1
                elif kind == PREDICTED and index:
                    values = unpack_all(body, 3)
                else:
                    raise FileError(MISFIT)
                digest, shape, strings = values
                if not isinstance(digest, bytes) or len(digest) not in (0, DIGEST_BYTES):
                    raise FileError(MISFIT)
            except FileError as error:
                raise FileError(f"{self._where} is damaged at {here}: {error}") from None
            yield CodedFrame(index, group, kind == INTRA, width, digest, shape, strings, at, point)
            index += 1
        if left := self.size - self._file.tell():
            raise FileError(f"{self._where} is damaged: {left:,} bytes lie behind its end")

    def _record(self, what: str) -> tuple[int, bytes]:
        """Read a record; `what` names it for messages."""
        start = self._read(5)
        length = int.from_bytes(start[1:], "big")
        if len(start) < 5 or length + 4 > self.size - self._file.tell():
            raise FileError(f"{self._where} is damaged or cut short at {what}")
        body = self._read(length)
        self._checksum = zlib.crc32(start + body, self._checksum)
        if self._read(4) != self._checksum.to_bytes(4, "big"):
            raise FileError(f"{self._where} is damaged at {what}: its checksum does not fit")
        return start[0], body

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise FileError(f"cannot read {self._where}: {error.strerror or error}") from None


@contextmanager
def open_video(path: str | Path) -> Iterator[CodedVideo]:
    """Open a coded video.

    Raises:
        FileError: the file cannot be read, is not a coded video, its header is damaged, or its
            frames are larger than `max_pixels`.
    """
    try:
        file = open(check_regular(path, "video"), "rb")  # noqa: SIM115
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None
    with file:
        yield CodedVideo(file, str(path))


def _width_and_point(told: Any) -> tuple[int | None, tuple[bytes, ...]]:
    """Return what an I frame says: a list of at most one width, and headers."""
    if not isinstance(told, (list, tuple)):
        raise FileError(MISFIT)
    width, *point = told if told and isinstance(told[0], int) else (None, *told)
    if not all(isinstance(header, bytes) for header in point):
        raise FileError(MISFIT)
    return width, tuple(point)
