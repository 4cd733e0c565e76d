"""Coded videos: damaged, which their checksums show; and made on purpose, with right ones."""

from __future__ import annotations

import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any, cast

import torch
from compressai.models import FactorizedPrior, ScaleHyperprior
from helpers_video import Frames
from torch import Tensor

from nicprune.common.errors import FileError
from nicprune.methods import attach
from nicprune.storage.video_container import VideoCoder

from .coded_images import _changed, _packed, unpacked
from .damage import damaged
from .trial import Believed

START = 5
"""Bytes before the first record."""

MARKS = 12
"""Bytes of the header's body before its values."""


def records(data: bytes) -> list[tuple[int, bytes]]:
    """The kind and the body of each record."""
    at, found = START, []
    while at < len(data):
        kind, length = struct.unpack_from(">BI", data, at)
        found.append((kind, data[at + 5 : at + 5 + length]))
        at += 9 + length
    return found


def sealed(start: bytes, made: list[tuple[int, bytes]]) -> bytes:
    """These records with right checksums."""
    data, checksum = start, zlib.crc32(start)
    for kind, body in made:
        record = struct.pack(">BI", kind, len(body)) + body
        checksum = zlib.crc32(record, checksum)
        data += record + checksum.to_bytes(4, "big")
    return data


class Inputs:
    """Coded videos of codecs of images, of one with widths, and of two that predict."""

    lines = 1

    def __init__(self) -> None:
        os.environ["NICPRUNE_MAX_PIXELS"] = str(1 << 20)
        torch.manual_seed(0)
        widths = cast("Any", {"widths": [1.0, 0.5], "round_to": 1})
        codecs = {
            "images": ScaleHyperprior(4, 6),
            "widths": attach(ScaleHyperprior(4, 6), "slimmable", **widths),
            "predicting": attach(ScaleHyperprior(4, 6), "temporal_entropy_model"),
            "of one latent": attach(FactorizedPrior(2, 3), "temporal_entropy_model"),
        }
        draw = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (5, 3, 64, 130), generator=draw).byte()
        self.coders: dict[str, VideoCoder] = {}
        self.whole: dict[str, bytes] = {}
        self.frames: dict[str, list[Tensor]] = {}
        for name, codec in codecs.items():
            with torch.no_grad():
                for key, value in codec.named_parameters():
                    if key.endswith("weight"):  # so that latents are not all zero
                        value.mul_(3)
            self.coders[name] = VideoCoder(codec.eval())
            path = Path("whole")
            order = [0, 1, 0] if name == "widths" else None
            self.coders[name].encode(Frames([*noise]), path, gop=2, width=order)
            self.whole[name] = path.read_bytes()
            self.frames[name] = list(self.coders[name].decode(path))

    def make(self, draw: random.Random) -> tuple[str, Any]:
        name = draw.choice([*self.whole])
        data = self.whole[name]
        if draw.random() < 0.3:
            how, made = damaged(data, draw)
            return f"{name}: {how}", (name, made, False)
        parts = records(data)
        number = draw.randrange(len(parts))
        kind, body = parts[number]
        kept, body = (body[:MARKS], body[MARKS:]) if number == 0 else (b"", body)
        values = unpacked(body)
        way = draw.random()
        if way < 0.1:
            kind, how = draw.randrange(5), "another kind"
        elif way < 0.2:
            parts.insert(number, parts[draw.randrange(len(parts))])
            number += 1
            how = "a record more"
        elif values is None or way < 0.4:
            how, body = damaged(body, draw)
        else:
            how = _changed(values, draw)
            body = b"".join(map(_packed, values))
        parts[number] = kind, kept + body
        made = sealed(data[:START], parts)
        return f"{name}: record {number}: {how}, right checksums", (name, made, True)

    def use(self, given: Any) -> None:
        name, data, aimed = given
        path, found = Path("coded"), list[Tensor]()
        path.write_bytes(data)
        try:
            for frame in self.coders[name].decode(path):
                found.append(frame)
        except FileError:
            whole = zip(found, self.frames[name], strict=False)
            if not aimed and not all(torch.equal(a, b) for a, b in whole):
                raise Believed("frames before the damage are others") from None
            raise
        if not aimed and data != self.whole[name]:
            raise Believed(f"damage was not seen, {len(found)} frames")
