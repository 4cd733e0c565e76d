"""rANS coding of arrays of symbols, and CompressAI's coders: the symbols that they write and read,
and reads that stay inside a string.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
from compressai import ans

from nicprune.common.errors import CodecError

DIGEST_BYTES = 8


class Tables(NamedTuple):
    """CDF tables: a row for each distribution.

    Attributes:
        cdf: cumulative frequencies, int32, shape (rows, columns): from 0 to 65536.
        lengths: how many of each row there are, int32, shape (rows,).
        offsets: the symbol that each row begins with, int32, shape (rows,).
    """

    cdf: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, model: Any) -> Tables:
        """Return the tables of one of CompressAI's entropy models."""
        found = (model._quantized_cdf, model._cdf_length.reshape(-1), model._offset.reshape(-1))
        cdf, lengths, offsets = (t.detach().cpu().int().contiguous().numpy() for t in found)
        if len(lengths) != len(cdf) or len(offsets) != len(cdf):
            raise CodecError(DAMAGED)
        return cls(cdf, lengths, offsets)

    def lists(self) -> tuple[list[list[int]], list[int], list[int]]:
        """Return them as CompressAI's coders take them, without what lies behind each row."""
        lengths = self.lengths.tolist()
        rows = [row[:length].tolist() for row, length in zip(self.cdf, lengths, strict=True)]
        return rows, lengths, self.offsets.tolist()

    def check(self, indexes: np.ndarray) -> None:
        """Raise CodecError unless there is a row for each index."""
        lengths, (rows, columns) = self.lengths, self.cdf.shape
        fine = bool(((lengths >= 2) & (lengths <= columns)).all())
        if not fine or (indexes.size and not 0 <= indexes.min() <= indexes.max() < rows):
            raise CodecError(DAMAGED)


DAMAGED = "the CDF tables of this codec are damaged: they lack what the codec looks up"


_uncompiled = 0
"""Number of open blocks of `uncompiled`."""


def compiled() -> Any:
    """Return the compiled kernels; None where numba is not installed, and inside `uncompiled`."""
    if _uncompiled:
        return None
    from nicprune.codecs import kernels  # numba takes half a second to import

    return kernels if kernels.COMPILED else None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Code inside the block as where numba is not installed."""
    global _uncompiled
    _uncompiled += 1
    try:
        yield
    finally:
        _uncompiled -= 1


def encode(symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> bytes:
    """Write a string of symbols, the one that CompressAI's coder writes.

    Args:
        symbols, indexes: int32, shape (n,): the symbols, and the row of the table of each.

    Raises:
        CodecError: the tables lack a row, or give a symbol no probability.
    """
    kernels = compiled()
    if kernels is None:
        tables.check(indexes)
        coder = ans.RansEncoder()
        found: bytes = coder.encode_with_indexes(
            symbols.tolist(), indexes.tolist(), *tables.lists()
        )
        return found
    words = np.empty(2 * len(symbols) + 4, np.uint32)
    fault, first = kernels.write(symbols, indexes, *tables, words)
    if fault:
        raise CodecError(DAMAGED)
    string = words[first:].astype("<u4", copy=False).tobytes()
    for seen in _recording:
        seen.written += len(symbols)
        seen.whole(string, symbols)
    return string


def decode(string: bytes, indexes: np.ndarray, tables: Tables) -> np.ndarray:
    """Read a string of symbols, int32, shape (n,).

    Args:
        indexes: int32, shape (n,): the row of the table of each symbol.

    Raises:
        CodecError: the tables lack a row.
    """
    kernels = compiled()
    if kernels is None:
        tables.check(indexes)
        read = ans.RansDecoder().decode_with_indexes(string, indexes.tolist(), *tables.lists())
        return np.frombuffer(array("i", read), np.int32)
    symbols = np.empty(len(indexes), np.int32)
    if kernels.read(words_of(string), indexes, *tables, symbols):
        raise CodecError(DAMAGED)
    note_read(string, symbols)
    return symbols


def words_of(string: bytes) -> np.ndarray:
    """Return the words of a string, uint32, the last one filled up with zeros."""
    return np.frombuffer(string + bytes(-len(string) % 4), "<u4").astype(np.uint32)


def note_read(string: bytes, symbols: np.ndarray) -> None:
    """Note for `recorded_symbols` what was read without CompressAI's coders."""
    for seen in _recording:
        seen.whole(string, symbols)


Some = list[int] | np.ndarray


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

    def add(self, coder: Any, symbols: Some) -> None:
        """Note further symbols of the string that was begun."""
        if id(coder) not in self._open:
            self.start(coder)
        self._open[id(coder)][1].update(_bytes(symbols))

    def end(self, coder: Any, string: bytes | None = None) -> None:
        """Note that a string is complete, which for a writing coder is `string`."""
        if (found := self._open.pop(id(coder), None)) is not None:
            self._seen.add((found[0] if string is None else string, found[1].digest()))

    def whole(self, string: bytes, symbols: Some) -> None:
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


def _bytes(symbols: Some) -> bytes:
    return np.asarray(symbols, dtype="<i4").tobytes()


def _flat(strings: Any) -> Iterable[bytes]:
    if isinstance(strings, bytes):
        yield strings
    elif isinstance(strings, (list, tuple)):
        for string in strings:
            yield from _flat(string)


_recording: list[Symbols] = []
"""Records that are being made."""


@contextmanager
def recorded_symbols() -> Iterator[Symbols]:
    """Record what is written and read within it, by `encode`, `decode` and CompressAI's coders."""
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
        _recording.append(seen)
        stack.callback(_recording.remove, seen)
        yield seen


@contextmanager
def bounded_reads(symbols: int) -> Iterator[None]:
    """Within it, CompressAI's decoder reads zeros behind the end of a string, not what lies there
    in memory: it does not look where a string ends. Compiled kernels always do.

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
