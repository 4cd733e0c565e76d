"""Verify a codec's file, an adaptation's, a coded image or a coded video: whether it is whole, and
what made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nicprune.codecs.copying import copy_codec
from nicprune.common.errors import CodecError, FileError
from nicprune.common.files import check_regular
from nicprune.storage.adaptation import load_adaptation
from nicprune.storage.checkpoint import ADAPTATION, SUFFIX, load, read_contents
from nicprune.storage.coded_image import MAGIC, read_coded
from nicprune.storage.coded_video import MAGIC as VIDEO_MAGIC
from nicprune.storage.coded_video import VERSION as VIDEO_VERSION
from nicprune.storage.coded_video import CodedFrame, open_video
from nicprune.storage.container import ImageCoder
from nicprune.storage.identity import fingerprint, mark
from nicprune.storage.video_container import VideoCoder


@dataclass(frozen=True)
class Verified:
    """A file that is whole.

    Attributes:
        kind: "codec", "adaptation", "coded image" or "coded video".
        facts: what is known of it, by name.
    """

    kind: str
    facts: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        return "\n".join(f"  {name:{width}}  {value}" for name, value in self.facts.items())


def verify(path: str | Path, codec: nn.Module | None = None) -> Verified:
    """Verify a file that `save`, `save_adaptation`, `encode` or `encode_video` wrote.

    Args:
        path: the file.
        codec: decodes a coded image or video, and proves that its symbols are those that were
            encoded; or is the source codec of an adaptation, which is loaded over a copy of it.

    Raises:
        FileError: it is none of these, is damaged, or `codec` does not decode it or is not what it
            adapts.
    """
    try:
        with open(check_regular(path), "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None
    if start.startswith(MAGIC):
        return _image(path, codec)
    if start.startswith(VIDEO_MAGIC):
        return _video(path, codec)
    # A safetensors file begins with eight bytes of length and its header, in JSON.
    if Path(path).suffix != SUFFIX and start[8:] != b"{":
        raise FileError(
            f"{path} is neither a codec that nicprune saved nor an image or video it encoded"
        )
    return _saved(path, codec)


def _image(path: str | Path, codec: nn.Module | None) -> Verified:
    coded, _ = read_coded(path)
    size = Path(path).stat().st_size
    facts = {
        "format": f"version {coded.version}",
        "size": f"{coded.width}x{coded.height} pixels, {size:,} bytes,"
        f" {8 * size / (coded.width * coded.height):.4f} bpp",
        "codec": coded.mark.hex(),
        "entropy parameters": "float64" if coded.in_float64 else "float32",
        "symbols": f"digest {coded.digest.hex()}" if coded.digest else "no digest",
    }
    if coded.domain:
        facts["coded at"] = f"domain {coded.domain}"
    if codec is not None:
        coder = ImageCoder(codec)
        coder.decode(coded, str(path))
        if point := coder.point_of(coded):
            facts["coded at"] = ", ".join(point)
        facts["decoded"] = (
            "all symbols are the encoder's"
            if coded.digest
            else "without an error; whether the picture is the one encoded is not known"
        )
    return Verified("coded image", facts)


def _video(path: str | Path, codec: nn.Module | None) -> Verified:
    with open_video(path) as video:
        header, size = video.header, video.size
        frames = list(map(_without_strings, video.frames()))
    groups = [frame for frame in frames if frame.intra]
    widths = sorted({frame.width for frame in groups if frame.width is not None})
    pixels, rate = header.width * header.height * max(len(frames), 1), float(header.fps)
    facts = {
        "format": f"version {VIDEO_VERSION}",
        "size": f"{header.width}x{header.height} pixels, {len(frames)} frames, {rate:.4g} a second,"
        f" {size:,} bytes, {8 * size / pixels:.4f} bpp",
        "groups": f"{len(groups)} of up to {header.gop} frames; {len(groups)} I frames,"
        f" {len(frames) - len(groups)} P frames",
        "codec": header.mark.hex(),
        "symbols": "a digest for each frame" if all(f.digest for f in frames) else "no digest",
    }
    if widths:
        facts["widths"] = ", ".join(
            f"{width} ({sum(frame.width == width for frame in groups)} groups)" for width in widths
        )
    if codec is not None:
        with open_video(path) as video:
            for _ in VideoCoder(codec).decode_opened(video, str(path)):
                pass
        facts["decoded"] = (
            "all symbols are the encoder's"
            if all(frame.digest for frame in frames)
            else "without an error; whether the frames are those encoded is not known"
        )
    return Verified("coded video", facts)


def _without_strings(frame: CodedFrame) -> CodedFrame:
    return replace(frame, strings=None)


def _saved(path: str | Path, codec: nn.Module | None) -> Verified:
    header, tensors = read_contents(path)
    if ADAPTATION in header:
        return _adaptation(path, header, tensors, codec)
    return _codec(path, header, tensors)


def _adaptation(
    path: str | Path,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: nn.Module | None,
) -> Verified:
    told = header[ADAPTATION]
    if not isinstance(told, dict) or not header.get("methods"):
        raise FileError(f"{path} is damaged: it does not say which codec it adapts")
    quality = f", quality {told['quality']}" if told.get("quality") else ""
    facts = {
        "domain": str(told.get("domain")),
        "format": f"version {header['version']}",
        "digest": "fits",
        "of the codec": f"{told.get('source')!s:.16} ({told.get('codec')!s:.60}{quality})",
        "loaded": "not here: it needs its codec, which --codec names",
    }
    if source is not None:
        load_adaptation(copy_codec(source), path)
        facts["loaded"] = "over the codec that it adapts"
    return Verified("adaptation", facts | _tensors_and_methods(header, tensors))


def _tensors_and_methods(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    facts = {"tensors": f"{len(tensors)}, {sum(t.nbytes for t in tensors.values()):,} bytes"}
    if header.get("methods"):
        facts["methods"] = ", ".join(str(m["name"]) for m in header["methods"])
    return facts


def _codec(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Verified:
    facts = {
        "name": _name(header),
        "format": f"version {header['version']}",
        "made by": _versions(header),
        "digest": "fits" if "digest" in header else "none (an earlier version)",
    }
    try:
        codec = load(path)
    except CodecError as error:
        if "digest" not in header:
            raise
        facts["loaded"] = f"not here: {error}"
    else:
        facts["codec"] = mark(fingerprint(codec), codec).hex()
        facts["parameters"] = f"{sum(p.numel() for p in codec.parameters()):,}"
    facts |= _tensors_and_methods(header, tensors)
    for number, entry in enumerate(header.get("history") or [], 1):
        facts[f"step {number}"] = _step(entry)
    return Verified("codec", facts)


def _name(header: Mapping[str, Any]) -> str:
    quality = f", quality {header['quality']}" if header.get("quality") else ""
    build = header.get("build")
    made = build.get("class") or build.get("factory") if isinstance(build, dict) else None
    return f"{header.get('name')}{quality}, {header.get('metric', 'mse')} ({made})"


def _versions(header: Mapping[str, Any]) -> str:
    found = header.get("versions")
    if not isinstance(found, dict):
        return "not recorded (an earlier version)"
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _step(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "?"
    methods = entry.get("methods") or []
    names = ", ".join(str(m.get("name")) for m in methods if isinstance(m, dict))
    before, after = entry.get("macs_before"), entry.get("macs_after")
    fewer = f": {before / after:.2f}x fewer MACs" if before and after else ""
    return f"{names or '?'}{fewer}"
