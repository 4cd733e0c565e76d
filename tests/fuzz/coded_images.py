"""Coded images: damaged, which their checksum shows; and made on purpose, with a right one."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path
from typing import Any, cast

import torch
from compressai.models import (
    Cheng2020AnchorCheckerboard,
    FactorizedPrior,
    JointAutoregressiveHierarchicalPriors,
    ScaleHyperprior,
)
from torch import nn

from nicprune.methods import attach
from nicprune.storage.coded_image import HEADER
from nicprune.storage.container import decode, encode

from .damage import damaged
from .trial import Believed

NUMBERS = (0, 1, 2, 3, 63, 64, 65, 128, 1000, 1 << 14, 1 << 20, 1 << 26, 1 << 31, 1 << 40, 1 << 57)


def codecs() -> dict[str, nn.Module]:
    """Codecs whose decoders read strings in different ways."""
    torch.manual_seed(0)
    rates, widths = {"qualities": [1, 2]}, {"widths": [1.0, 0.5], "round_to": 1}
    found = {
        "factorized": FactorizedPrior(2, 3),
        "hyperprior": ScaleHyperprior(4, 6),
        "autoregressive": JointAutoregressiveHierarchicalPriors(4, 6),
        "checkerboard": Cheng2020AnchorCheckerboard(4),
        "scaled": attach(FactorizedPrior(2, 3), "bottleneck_scaling", **cast("Any", rates)),
        "slimmable": attach(ScaleHyperprior(4, 6), "slimmable", **cast("Any", widths)),
    }
    for codec in found.values():
        with torch.no_grad():
            for name, value in codec.named_parameters():
                if name.endswith("weight"):  # so that latents are not all zero
                    value.mul_(3)
        codec.eval()
    return cast("dict[str, nn.Module]", found)


class Inputs:
    """Coded images."""

    lines = 1

    def __init__(self) -> None:
        # A file of a few bytes may say that its image is as large as any that is read.
        os.environ["NICPRUNE_MAX_PIXELS"] = str(1 << 20)
        self.codecs = codecs()
        draw = torch.Generator().manual_seed(0)
        pictures = [
            torch.randint(0, 256, (3, *size), generator=draw).byte()
            for size in ((64, 64), (70, 130))
        ]
        self.whole = {
            (name, number): encode(codec, picture)
            for name, codec in self.codecs.items()
            for number, picture in enumerate(pictures)
        }

    def make(self, draw: random.Random) -> tuple[str, Any]:
        key = draw.choice([*self.whole])
        data = self.whole[key]
        if draw.random() < 0.3:
            how, made = damaged(data, draw)
            return f"{key}: {how}", (key, made, False)
        body = data[HEADER.size : -4]
        values = unpacked(body)
        if values is None or draw.random() < 0.3:
            how, body = damaged(body, draw)
        else:
            how = _changed(values, draw)
            body = b"".join(map(_packed, values))
        made = data[: HEADER.size] + body
        return f"{key}: {how}, right checksum", (
            key,
            made + zlib.crc32(made).to_bytes(4, "big"),
            True,
        )

    def use(self, given: Any) -> None:
        key, data, aimed = given
        path = Path("coded")
        path.write_bytes(data)
        codec = self.codecs[key[0]]
        found = decode(codec, path)
        if not aimed and data != self.whole[key]:
            raise Believed(f"damage was not seen, {tuple(found.shape)}")
        if aimed and not torch.equal(found, decode(codec, path)):
            raise Believed("a picture that is another each time")


def unpacked(body: bytes) -> list[Any] | None:
    """The values of a coded image as [kind, number, what follows]; None if they have another form
    than `nicprune.storage.container` gives them.
    """
    values, place = [], 0
    try:
        while place < len(body):
            value, place = _value(body, place)
            values.append(value)
    except IndexError:
        return None
    return values


def _value(body: bytes, place: int) -> tuple[list[Any], int]:
    number = shift = 0
    while True:
        byte = body[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            break
    kind, number = number & 3, number >> 2
    if kind == 0:
        return [kind, number, None], place
    if kind == 2:
        return [kind, number, body[place : place + number]], place + number
    items = []
    for _ in range(number if kind == 1 else 2 * number):
        item, place = _value(body, place)
        items.append(item)
    return [kind, number, items], place


def _packed(value: list[Any]) -> bytes:
    kind, number, content = value
    head = number << 2 | kind
    found = bytearray()
    while head > 127:
        found.append(head & 127 | 128)
        head >>= 7
    start = bytes([*found, head])
    if kind == 2:
        return start + content
    return start + b"".join(map(_packed, content or []))


def _all(values: list[Any]) -> list[Any]:
    return [found for v in values for found in [v, *(_all(v[2]) if isinstance(v[2], list) else [])]]


def _changed(values: list[Any], draw: random.Random) -> str:
    """Change some values in place; return what was done."""
    told = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = draw.choice(_all(values))
        kind, number, content = value
        if kind == 0:
            value[1] = draw.choice((*NUMBERS, number + 1, 2 * number, max(0, number - 1)))
            told.append(f"{number} is {value[1]}")
        elif kind == 2:
            way = draw.choice(("empty", "short", "damaged", "long", "length", "zeros"))
            made = {
                "empty": b"", "short": content[: draw.randrange(len(content) + 1)],
                "damaged": damaged(content, draw)[1] if content else b"\0",
                "long": content * draw.choice((2, 1000)), "length": content,
                "zeros": bytes(draw.choice((4, 64, 4096))),
            }[way]  # fmt: skip
            value[1:] = [len(made) if way != "length" else draw.choice(NUMBERS), made]
            told.append(f"{way} string")
        else:
            way = draw.choice(("repeated", "emptied", "count", "nested", "turned"))
            made = {
                "repeated": content * draw.choice((2, 300)), "emptied": [], "count": content,
                "nested": [[kind, number, content]], "turned": content[::-1],
            }[way]  # fmt: skip
            count = len(made) if kind == 1 else len(made) // 2
            value[1:] = [count if way != "count" else draw.choice(NUMBERS), made]
            told.append(f"list {way}")
    return ", ".join(told)
