"""Images: every format, damaged, with numbers that are too large, or made to unpack to much."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nicprune.common.errors import NicpruneError
from nicprune.data.images import read_image, usable_images

from .damage import damaged
from .trial import Believed

SIGNATURE = b"\x89PNG\r\n\x1a\n"
ENDS = ("png", "jpg", "tif", "webp", "bmp", "ppm")


def _pictures() -> dict[str, bytes]:
    """Small whole files, by format and mode."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 4), dtype=np.uint8)
    smooth = np.indices((48, 40)).sum(0).astype(np.uint8)
    rgb, grey = Image.fromarray(noise[..., :3]), Image.fromarray(smooth)
    deep = Image.fromarray((smooth.astype(np.uint16) << 8) + 7)
    floats = Image.fromarray(smooth.astype(np.float32) / 255)
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "PNG", {}),
        (rgb, "PNG", {"dpi": (72, 72), "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}),
        (Image.fromarray(noise), "PNG", {}),
        (grey, "PNG", {}),
        (rgb.quantize(16), "PNG", {"transparency": 3}),
        (deep, "PNG", {}),
        (rgb, "JPEG", {"quality": 80}),
        (rgb, "JPEG", {"progressive": True, "subsampling": 0, "exif": _turned(6)}),
        (grey, "JPEG", {"optimize": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        *((rgb, "TIFF", {"compression": c}) for c in ("raw", "tiff_lzw", "tiff_deflate", "jpeg")),
        *((image, "TIFF", {}) for image in (grey, deep, floats, rgb.convert("CMYK"))),
        (rgb, "WEBP", {"quality": 60}),
        (Image.fromarray(noise), "WEBP", {"lossless": True}),
        (rgb, "BMP", {}),
        (grey, "BMP", {}),
        (rgb, "PPM", {}),
    ]
    found = {}
    for number, (image, kind, options) in enumerate(kinds):
        file = io.BytesIO()
        image.save(file, kind, **options)
        found[f"{kind} {number}"] = file.getvalue()
    return found


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a whole PNG."""
    found, at = [], len(SIGNATURE)
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


SIDES = (0, 1, 2, 63, 65, 1000, 9459, 20_000, 65_535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)


def bomb(size: int) -> bytes:
    """Zeros, deflated."""
    deflate = zlib.compressobj(9)
    pieces = [deflate.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*pieces, deflate.flush()])


class Inputs:
    """Image files."""

    lines = 1

    def __init__(self) -> None:
        self.whole = _pictures()
        self.pixels = {name: self._read(data) for name, data in self.whole.items()}
        self.bomb = bomb(64 << 20)
        self.ways: tuple[tuple[Callable[[random.Random], tuple[str, Any]], int], ...] = (
            (self._damaged, 6), (self._with_other_chunks, 2), (self._with_other_sides, 1),
            (self._with_other_tags, 1),
        )  # fmt: skip

    def make(self, draw: random.Random) -> tuple[str, Any]:
        """A file's end, its bytes, and the pixels that it must have if it is accepted."""
        ways, weights = zip(*self.ways, strict=True)
        return draw.choices(ways, weights)[0](draw)

    def use(self, given: Any) -> None:
        end, data, pixels = given
        path = Path(f"image.{end}")
        path.write_bytes(data)
        try:
            usable_images([path])
        except NicpruneError as error:
            assert "\n" not in str(error)
        found = read_image(path)
        assert found.dtype == torch.uint8 and found.dim() == 3 and found.shape[0] == 3
        if pixels is not None and not (found.shape == pixels.shape and torch.equal(found, pixels)):
            raise Believed(f"{tuple(found.shape)} pixels that are not the picture's")

    def _read(self, data: bytes) -> torch.Tensor:
        Path("whole").write_bytes(data)
        return read_image("whole")

    def _damaged(self, draw: random.Random) -> tuple[str, Any]:
        name = draw.choice([*self.whole])
        how, data = damaged(self.whole[name], draw)
        # Of these formats, PNG alone has checksums.
        checked = data.startswith(SIGNATURE) and name.startswith("PNG")
        end = draw.choice(ENDS)
        return f"{name}.{end}: {how}", (end, data, self.pixels[name] if checked else None)

    def _with_other_chunks(self, draw: random.Random) -> tuple[str, Any]:
        name = draw.choice([name for name in self.whole if name.startswith("PNG")])
        parts = chunks(self.whole[name])
        way = draw.choice(("text", "profile", "packed", "order", "chunk", "header"))
        if way in ("text", "profile"):
            kind = b"zTXt" if way == "text" else b"iCCP"
            parts.insert(1, (kind, b"a\0\0" + self.bomb))
        elif way == "packed":
            parts = [(kind, self.bomb if kind == b"IDAT" else content) for kind, content in parts]
        elif way == "order":
            draw.shuffle(parts)
        elif way == "chunk":
            at = draw.randrange(len(parts))
            kind, content = parts[at]
            kind = draw.choice(
                (kind, b"acTL", b"fcTL", b"tRNS", b"PLTE", b"eXIf", b"gAMA", b"tIME")
            )
            parts.insert(at, (kind, damaged(content or b"a", draw)[1]))
        else:
            parts[0] = (b"IHDR", damaged(parts[0][1], draw)[1])
        data = SIGNATURE + b"".join(chunk(*part) for part in parts)
        return f"{name}: {way} with right checksums", ("png", data, None)

    def _with_other_sides(self, draw: random.Random) -> tuple[str, Any]:
        width, height = draw.choice(SIDES), draw.choice(SIDES)
        kind = draw.choice(("PNG", "PPM", "BMP", "float PPM"))
        if kind == "PNG":
            depth, colour = draw.choice(((8, 2), (16, 2), (1, 0), (16, 0), (8, 6), (8, 3)))
            header = struct.pack(
                ">IIBBBBB", width, height, depth, colour, 0, 0, draw.choice((0, 1))
            )
            parts = [(b"IHDR", header), (b"IDAT", self.bomb), (b"IEND", b"")]
            data = SIGNATURE + b"".join(chunk(*part) for part in parts)
        elif kind == "BMP":
            data = bytearray(next(d for n, d in self.whole.items() if n.startswith("BMP")))
            data[18:26] = struct.pack("<II", width, height)
        else:
            start = draw.choice((b"P6", b"P5", b"P4", b"P3", b"P1")) if kind == "PPM" else b"PF"
            most = draw.choice((b"255", b"65535", b"1", b"0", b"-1.0", b"99999999999", b""))
            data = start + f"\n{width} {height}\n".encode() + most + b"\n" + draw.randbytes(64)
        return f"{kind} of {width}x{height}", (kind[-3:].lower(), bytes(data), None)

    def _with_other_tags(self, draw: random.Random) -> tuple[str, Any]:
        """A TIFF whose entries say something else: sizes, places, compression, bits."""
        name = draw.choice([name for name in self.whole if name.startswith("TIFF")])
        data = bytearray(self.whole[name])
        (start,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, start)
        told = []
        for _ in range(draw.choice((1, 1, 2))):
            at = start + 2 + 12 * draw.randrange(count)
            tag, kind, length, value = struct.unpack_from("<HHII", data, at)
            field = draw.choice(("type", "length", "value", "value", "value"))
            kind = draw.randrange(1, 20) if field == "type" else kind
            length = draw.choice((0, 2, 9, 1 << 16, 1 << 31)) if field == "length" else length
            odd = (0, 1, 5, 7, 8, 32773, 34925, 50000, 1 << 16, 1 << 31, value + 1)
            value = draw.choice(odd) if field == "value" else value
            struct.pack_into("<HHII", data, at, tag, kind, length, value)
            told.append(f"{field} of tag {tag}")
        return f"{name}: {', '.join(told)}", ("tif", bytes(data), None)
