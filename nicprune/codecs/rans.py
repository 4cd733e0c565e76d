"""CompressAI's rANS coders: the symbols that they write and read, and reads that stay inside a
string.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from compressai import ans

DIGEST_BYTES = 8


class Symbols:
    """The symbols of each string that was written or read, as hashes.

    The coders return the symbols of a string in the order in which they were given, whatever the
    order of the strings and of the calls for each of them.

    Attributes:
        written: number of symbols that were written.
    """

    def __init__(self) -> None:
        self.written = 0
        self._open: dict[int, tuple[bytes, Any]] = {}
        self._seen: set[tuple[bytes, bytes]] = set()

    def start(self, coder: Any, string: bytes = b"") -> None:
        """Begin a string that a coder writes or reads in parts."""
        self._open[id(coder)] = (string, _hash())

    def add(self, coder: Any, symbols: list[int]) -> None:
        """Note further symbols of the string that was begun."""
        if id(coder) not in self._open:
            self.start(coder)
        self._open[id(coder)][1].update(_bytes(symbols))

    def end(self, coder: Any, string: bytes | None = None) -> None:
        """Note that a string is complete, which for a writing coder is `string`."""
        if (found := self._open.pop(id(coder), None)) is not None:
            self._seen.add((found[0] if string is None else string, found[1].digest()))

    def whole(self, string: bytes, symbols: list[int]) -> None:
        """Note a string with all its symbols."""
        self._seen.add((string, _hash(_bytes(symbols)).digest()))

    def digest(self, strings: Any) -> bytes:
        """Return eight bytes that stand for the symbols of some strings, in nested lists; empty if
        none of them was written or read by these coders.
        """
        for coder in list(self._open):
            string, hashed = self._open.pop(coder)
            self._seen.add((string, hashed.digest()))
        wanted = set(_flat(strings))
        found = sorted(hashed for string, hashed in self._seen if string in wanted)
        return _hash(b"".join(found)).digest() if found else b""


def _hash(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES)


def _bytes(symbols: list[int]) -> bytes:
    return np.array(symbols, dtype="<i4").tobytes()


def _flat(strings: Any) -> Iterable[bytes]:
    if isinstance(strings, bytes):
        yield strings
    elif isinstance(strings, (list, tuple)):
        for string in strings:
            yield from _flat(string)


@contextmanager
def recorded_symbols() -> Iterator[Symbols]:
    """Record what CompressAI's coders write and read within it."""
    seen = Symbols()

    def encoding(encode: Callable[..., Any]) -> Callable[..., Any]:
        def encoded(self: Any, symbols: list[int], *args: Any) -> Any:
            string = encode(self, symbols, *args)
            seen.written += len(symbols)
            seen.whole(string, symbols)
            return string

        return encoded

    def buffering(encode: Callable[..., Any]) -> Callable[..., Any]:
        def buffered(self: Any, symbols: list[int], *args: Any) -> Any:
            seen.written += len(symbols)
            seen.add(self, symbols)
            return encode(self, symbols, *args)

        return buffered

    def flushing(flush: Callable[..., Any]) -> Callable[..., Any]:
        def flushed(self: Any) -> Any:
            string = flush(self)
            seen.end(self, string)
            return string

        return flushed

    def decoding(decode: Callable[..., Any]) -> Callable[..., Any]:
        def decoded(self: Any, string: bytes, *args: Any) -> Any:
            symbols = decode(self, string, *args)
            seen.whole(string, symbols)
            return symbols

        return decoded

    def opening(set_stream: Callable[..., Any]) -> Callable[..., Any]:
        def opened(self: Any, string: bytes) -> Any:
            seen.end(self)
            seen.start(self, string)
            return set_stream(self, string)

        return opened

    def streaming(decode: Callable[..., Any]) -> Callable[..., Any]:
        def streamed(self: Any, *args: Any) -> Any:
            symbols = decode(self, *args)
            seen.add(self, symbols)
            return symbols

        return streamed

    with ExitStack() as stack:
        _exchange(stack, ans.RansEncoder, "encode_with_indexes", encoding)
        _exchange(stack, ans.BufferedRansEncoder, "encode_with_indexes", buffering)
        _exchange(stack, ans.BufferedRansEncoder, "flush", flushing)
        _exchange(stack, ans.RansDecoder, "decode_with_indexes", decoding)
        _exchange(stack, ans.RansDecoder, "set_stream", opening)
        _exchange(stack, ans.RansDecoder, "decode_stream", streaming)
        yield seen


@contextmanager
def bounded_reads(symbols: int) -> Iterator[None]:
    """Within it, CompressAI's decoder reads zeros behind the end of a string, not what lies there
    in memory: it does not look where a string ends.

    A step of its coder reads one word of four bytes at the most, and a symbol outside its table up
    to fifteen times as many bytes as the string has.

    Args:
        symbols: how many a string may hold.
    """

    def padded(string: bytes) -> bytes:
        return string + bytes(4 * symbols + 16 * len(string) + 4096)

    def padding(read: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, string, *args: read(self, padded(string), *args)

    with ExitStack() as stack:
        for name in ("set_stream", "decode_with_indexes"):
            _exchange(stack, ans.RansDecoder, name, padding)
        yield


def _exchange(
    stack: ExitStack, cls: Any, name: str, change: Callable[[Callable[..., Any]], Any]
) -> None:
    """Exchange a method for as long as the stack lasts."""
    own = getattr(cls, name)
    setattr(cls, name, change(own))
    stack.callback(setattr, cls, name, own)
