"""Notice video files whose end is missing, by the sizes that their containers declare.

FFmpeg reads such a file as a shorter video. Durations do not tell: of many files none is known, and
sound may be longer than the pictures. But each container is a row of parts that say how long they
are: boxes of MP4 and QuickTime (ISO/IEC 14496-12, 4.2), elements of Matroska and WebM (RFC 8794),
chunks of AVI (RIFF). Only these sizes are read here. What stands behind the last part that is known
is left alone, since players leave it alone too.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from nicprune.common.errors import DataError

BOXES = {b"ftyp", b"styp", b"moov", b"mdat", b"moof", b"mfra", b"sidx", b"free", b"skip", b"wide"}
"""Boxes that stand at the top of a file, of which `mdat` and `moof` hold what is shown."""

EBML, SEGMENT, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
"""Elements of Matroska: its head, all the rest, and a part of the frames."""

ABSENT_SIZES = (0, 0xFFFFFFFF)
"""Sizes in RIFF of what was written without going back to the start."""


def check_end(path: Path) -> None:
    """Raise DataError if a video file ends before its container says.

    Files of other containers, and parts whose size is not declared, are accepted.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            start = file.read(12)
            file.seek(0)
            if start[4:8] in BOXES:
                end = _end_of_boxes(file, size)
            elif int.from_bytes(start[:4], "big") == EBML:
                end = _end_of_elements(file, size)
            elif start[:4] == b"RIFF":
                end = _end_of_chunks(file, size)
            else:
                return
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if end > size:
        raise cut_short(path, f"{size:,} of at least {end:,} bytes are there")


def cut_short(path: Path, found: str) -> DataError:
    """Return the error of a file whose end is missing."""
    return DataError(
        f"{path} is cut short: {found}. Get the whole file, or write what is left to another"
        " (ffmpeg -i ... -c copy ...)"
    )


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Return where the last box ends by its own size, from the start of the file."""
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if head[4:8] not in BOXES or length < 8:  # 0: it lasts to the end of the file
            break
        place += length
    return place


def _end_of_chunks(file: BinaryIO, size: int) -> int:
    """Return where the last RIFF of an AVI ends; large files have several."""
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length in ABSENT_SIZES:
            break
        place += 8 + length
    # A writer may count the byte after a chunk of odd size without writing it.
    return place - 1


def _end_of_elements(file: BinaryIO, size: int) -> int:
    """Return where the last element ends. Of a segment or cluster without a size, as programs write
    that cannot go back, the elements inside are looked at.
    """
    place, inside = 0, False
    while place < size:
        file.seek(place)
        head = file.read(12)
        width = _width(head[:1])
        kind = int.from_bytes(head[:width], "big")
        long = _width(head[width : width + 1])
        if not width or not long or not (inside or kind in (EBML, SEGMENT)):
            break
        length = int.from_bytes(head[width : width + long], "big") & ((1 << 7 * long) - 1)
        place += width + long
        if length == (1 << 7 * long) - 1:  # unknown
            if kind not in (SEGMENT, CLUSTER):
                break
            inside = True
        else:
            place += length
    return place


def _width(first: bytes) -> int:
    """Return the bytes of a number of EBML, which begins with as many bits; 0 for none."""
    return 9 - first[0].bit_length() if first and first[0] else 0
