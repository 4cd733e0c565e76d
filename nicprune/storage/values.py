"""Nested values as bytes: numbers, strings, lists and tables of them.

A value is a varint n << 2 | kind, followed by n values (list), n bytes (string), n pairs of values
(table), or nothing (the integer n).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nicprune.common.errors import CodecError, FileError

INTEGER, LIST, STRING, TABLE = range(4)

DEEPEST = 8
"""Largest depth of nested values; strings and shapes of codecs have at most three levels."""

MISFIT = "its contents do not fit together"


def _number(n: int) -> bytes:
    """Return a varint: seven bits per byte, the lowest first; the top bit is set where more bytes
    follow.
    """
    found = bytearray()
    while n > 127:
        found.append(n & 127 | 128)
        n >>= 7
    return bytes([*found, n])


def pack(value: Any) -> bytes:
    """Return a value, with all values in it, as bytes."""
    if isinstance(value, int) and value >= 0:
        return _number(value << 2 | INTEGER)
    if isinstance(value, bytes):
        return _number(len(value) << 2 | STRING) + value
    if isinstance(value, (list, tuple)):
        return _number(len(value) << 2 | LIST) + b"".join(map(pack, value))
    if isinstance(value, Mapping):
        return _number(len(value) << 2 | TABLE) + b"".join(
            pack(str(key).encode()) + pack(item) for key, item in value.items()
        )
    raise CodecError(
        f"the codec's compress() returned {value!r:.60}, which cannot be stored in a file: expected"
        " bytes and sizes, in lists or dicts"
    )


def unpack_all(data: bytes, count: int) -> list[Any]:
    """Return `count` values.

    Raises:
        FileError: the data have another structure.
    """
    values, at = [], 0
    for _ in range(count):
        value, at = _unpack(data, at, 0)
        values.append(value)
    if at != len(data):
        raise FileError(MISFIT)
    return values


def _unpack(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    n = shift = 0
    while True:
        if at >= len(data) or shift > 56 or depth > DEEPEST:
            raise FileError(MISFIT)
        byte = data[at]
        n |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            break
    n, kind = n >> 2, n & 3
    if kind == INTEGER:
        return n, at
    if kind == STRING:
        return data[at : at + n], at + n
    items = []
    for _ in range(n if kind == LIST else 2 * n):
        item, at = _unpack(data, at, depth + 1)
        items.append(item)
    if kind == TABLE:
        keys = [key.decode(errors="replace") for key in items[::2] if isinstance(key, bytes)]
        if len(keys) < n:
            raise FileError(MISFIT)
        return dict(zip(keys, items[1::2], strict=True)), at
    sizes = bool(items) and all(isinstance(item, int) for item in items)
    return torch.Size(items) if sizes else items, at
