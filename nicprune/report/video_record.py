"""The record of a codec on a set of clips."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from nicprune.common.config import explain
from nicprune.common.errors import FileError
from nicprune.report.column import column
from nicprune.report.record_parts import Number, RecordModel

FORMAT, VERSION = "nicprune-video-record", 1

Role = Literal["codec", "intra", "classical"]


class ClipResult(RecordModel):
    """One clip. The figures are defined as the means of `VideoRecord` are."""

    name: str
    frames: int
    width: int
    height: int
    fps: Number
    bpp: Number
    bpp_intra: Number | None = None
    bpp_predicted: Number | None = None
    kbits: Number
    psnr_db: Number
    psnr_yuv_db: Number
    psnr_y_db: Number
    psnr_u_db: Number
    psnr_v_db: Number
    ms_ssim: Number | None = None
    encode_s: Number
    decode_s: Number


class VideoRecord(RecordModel):
    """One codec at one setting on a set of clips. PSNR and rate are means over frames, then over
    clips.
    """

    format: Literal["nicprune-video-record"] = FORMAT  # type: ignore[assignment]
    version: Literal[1] = VERSION  # type: ignore[assignment]
    role: Role = column(
        "role",
        "codec; intra: the same codec with I frames alone, the control of what prediction saves;"
        " classical",
    )
    label: str = column("codec", "Name of the codec in tables")
    setting: str = column(
        "setting", "Width of a slimmable codec, 0 for the widest; constant rate factor"
    )
    width: int | None = column("width", "Index of a width", default=None)
    quality: int | None = column("q", "Quality level", default=None)
    gop: int = column("GOP", "Frames in a group of pictures")
    bpp: Number = column(
        "rate", "Bits of the strings divided by the pixels, mean over frames", "bpp", header="bpp"
    )
    bpp_intra: Number | None = column(
        "rate of I frames", "Rate of I frames alone", "bpp", header="I bpp", default=None
    )
    bpp_predicted: Number | None = column(
        "rate of P frames", "Rate of P frames alone", "bpp", header="P bpp", default=None
    )
    kbits: Number = column("bit rate", "Rate of the strings", "kbit/s", header="kbit/s")
    psnr_db: Number = column(
        "PSNR (RGB)", "PSNR over RGB, both images rounded to 8 bits", "dB", header="PSNR RGB dB"
    )
    psnr_yuv_db: Number = column(
        "PSNR (YUV 6:1:1)",
        "(6 PSNR of Y + PSNR of U + PSNR of V) / 8 in 4:2:0, planes converted from RGB",
        "dB",
        header="PSNR YUV dB",
    )
    ms_ssim: Number | None = column("MS-SSIM", "MS-SSIM over RGB", default=None)
    intra_encode_kmac: Number | None = column(
        "encoding an I frame", "MACs per pixel", "kMAC/pixel", header="I enc. kMAC/px", default=None
    )
    intra_decode_kmac: Number | None = column(
        "decoding an I frame", "MACs per pixel", "kMAC/pixel", header="I dec. kMAC/px", default=None
    )
    predicted_encode_kmac: Number | None = column(
        "encoding a P frame", "MACs per pixel", "kMAC/pixel", header="P enc. kMAC/px", default=None
    )
    predicted_decode_kmac: Number | None = column(
        "decoding a P frame", "MACs per pixel", "kMAC/pixel", header="P dec. kMAC/px", default=None
    )
    encode_peak_mb: Number | None = column(
        "encoding memory",
        "Peak size of the tensors alive while a frame of the first clip is encoded, the larger of I"
        " and P frames, weights not counted",
        "MB",
        header="enc. MB",
        default=None,
    )
    decode_peak_mb: Number | None = column(
        "decoding memory",
        "Peak size of the tensors alive while a frame of the first clip is decoded, the larger of I"
        " and P frames, weights not counted",
        "MB",
        header="dec. MB",
        default=None,
    )
    encode_ms: Number = column(
        "encoding time", "Time to encode a frame, entropy coding included", "ms", header="enc. ms"
    )
    decode_ms: Number = column(
        "decoding time", "Time to decode a frame, entropy coding included", "ms", header="dec. ms"
    )
    clips: list[ClipResult] = column("clips", "Results of each clip")
    counter: str | None = column("MAC counter", "Program that counted the MACs", default=None)
    device: str = column("device", "Device that ran the codec")
    threads: int = column("thread count", "CPU threads during evaluation")
    busy: Number | None = column(
        "busy", "Fraction of the processor (0 to 1) that other programs used", default=None
    )
    machine: str = column("machine", "Processor, cores, memory and operating system")
    versions: dict[str, str] = column("versions", "Versions of the packages")
    command: str | None = column("command", "Command that made the record", default=None)
    date: str = column("evaluated", "Time of the evaluation (ISO 8601, UTC)")

    def tested_on(self) -> tuple[str, ...]:
        """Return the clips, each with its size, frames and frame rate, in order of their names."""
        return tuple(
            sorted(
                f"{clip.name} ({clip.width}x{clip.height}, {clip.frames} at {clip.fps:g}/s)"
                for clip in self.clips
            )
        )

    @classmethod
    def parse(cls, content: Any, source: str | Path) -> VideoRecord:
        """Return the record with this content.

        Raises:
            FileError: it is not a record, or a value is missing or of the wrong type.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise FileError(f"{source} holds no records of videos")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise FileError(
                f"{source} is a damaged record: {explain(cls, error)[:300]}; evaluate again"
            ) from None


def read_video_records(paths: Sequence[str | Path]) -> list[VideoRecord]:
    """Return the records of videos in report folders or record files; empty where the first is a
    report of images.

    Raises:
        FileError: a record is damaged, or of images beside videos.
    """
    records: list[VideoRecord] = []
    for path in map(Path, paths):
        file = path / "records.json" if path.is_dir() else path
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError):  # reading it as records of images says why
            return []
        first = content[0] if isinstance(content, list) and content else content
        if not isinstance(first, Mapping) or first.get("format") != FORMAT:
            if records:
                raise FileError(f"{file} holds no records of videos, as those before it do")
            return []
        records += [
            VideoRecord.parse(one, file)
            for one in (content if isinstance(content, list) else [content])
        ]
    return records
