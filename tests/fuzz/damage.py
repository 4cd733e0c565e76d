"""Damage to bytes, as disks, networks and hands do it."""

from __future__ import annotations

import random
from collections.abc import Callable

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62)


def _place(data: bytearray, draw: random.Random) -> int:
    """A place in it; headers are short, and are hit as often as all that follows."""
    return draw.randrange(min(len(data), 256) if draw.random() < 0.5 else len(data))


def _span(data: bytearray, draw: random.Random) -> slice:
    start = _place(data, draw)
    return slice(start, start + 1 + int(draw.paretovariate(0.5)) % max(1, len(data) - start))


def flip_bits(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[_place(data, draw)] ^= 1 << draw.randrange(8)


def change_bytes(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 4, 16))):
        data[_place(data, draw)] = draw.randrange(256)


def zero(data: bytearray, draw: random.Random) -> None:
    span = _span(data, draw)
    data[span] = bytes(len(data[span]))


def cut_off(data: bytearray, draw: random.Random) -> None:
    del data[_place(data, draw) :]


def cut_out(data: bytearray, draw: random.Random) -> None:
    del data[_span(data, draw)]


def insert(data: bytearray, draw: random.Random) -> None:
    at = _place(data, draw)
    data[at:at] = draw.randbytes(draw.choice((1, 3, 64)))


def repeat(data: bytearray, draw: random.Random) -> None:
    span = _span(data, draw)
    data[span] = bytes(data[span]) * draw.choice((2, 2, 50))


def exchange(data: bytearray, draw: random.Random) -> None:
    one, other = sorted((_place(data, draw), _place(data, draw)))
    length = min(other - one, len(data) - other, draw.choice((1, 8, 512)))
    data[one : one + length], data[other : other + length] = (
        data[other : other + length],
        data[one : one + length],
    )


def write_number(data: bytearray, draw: random.Random) -> None:
    size = draw.choice((1, 2, 4, 8))
    number = draw.choice(EXTREMES) & ((1 << 8 * size) - 1)
    at = _place(data, draw)
    data[at : at + size] = number.to_bytes(size, draw.choice(("little", "big")))


WAYS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip_bits, change_bytes, zero, cut_off, cut_out, insert, repeat, exchange, write_number,
)  # fmt: skip


def damaged(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Return other bytes than these, made in one way or two, and the names of the ways."""
    while True:
        found, ways = bytearray(data), []
        for _ in range(draw.choice((1, 1, 1, 2))):
            if found:
                way = draw.choice(WAYS)
                way(found, draw)
                ways.append(way.__name__)
        if found != data:
            return ", ".join(ways), bytes(found)
