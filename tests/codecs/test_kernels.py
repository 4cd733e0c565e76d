"""The compiled coder: CompressAI's to the byte, for what it wrote and for anything else; and the
arithmetic as it is written.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compressai import ans

from nicprune.codecs import kernels
from nicprune.codecs.rans import (
    Tables,
    bounded_reads,
    compiled,
    decode,
    encode,
    recorded_symbols,
    uncompiled,
)
from nicprune.common.errors import CodecError

needs_numba = pytest.mark.skipif(not kernels.COMPILED, reason="numba is not installed")


def drawn(seed: int, count: int = 300) -> tuple[np.ndarray, np.ndarray, Tables]:
    """Symbols, some of them far outside their tables, and tables of any widths."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 8))
    lengths = rng.integers(3, 40, rows).astype(np.int32)
    cdf = np.zeros((rows, int(lengths.max()) + int(rng.integers(3))), np.int32)
    for row, length in zip(cdf, lengths, strict=True):
        inner = rng.choice(np.arange(1, 1 << 16), length - 2, replace=False)
        row[1 : length - 1] = np.sort(inner)
        row[length - 1] = 1 << 16
    offsets = -rng.integers(-3, 30, rows).astype(np.int32)
    indexes = rng.integers(0, rows, count).astype(np.int32)
    symbols = rng.integers(0, lengths[indexes] - 2) + offsets[indexes]
    far = rng.random(count) < 0.2
    symbols[far] = (rng.standard_normal(far.sum()) * 10.0 ** rng.integers(0, 8, far.sum())).round()
    edge = [2**26, -(2**26), 0, int(offsets[indexes[3]]) - 1, int(offsets[indexes[4]])]
    symbols[: len(edge)] = edge
    return symbols.astype(np.int32), indexes, Tables(cdf, lengths, offsets)


def by_compressai(symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> bytes:
    whole = tables.cdf.tolist(), tables.lengths.tolist(), tables.offsets.tolist()
    found: bytes = ans.RansEncoder().encode_with_indexes(symbols.tolist(), indexes.tolist(), *whole)
    return found


def damaged(string: bytes, rng: np.random.Generator) -> bytes:
    """What may be in a file: bits that changed, an end that is missing, noise, ones alone."""
    kind = rng.integers(4)
    if kind == 0 and string:
        changed = bytearray(string)
        changed[rng.integers(len(string))] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind == 1:
        return string[: rng.integers(len(string) + 1)]
    size = int(rng.integers(0, 300))
    return rng.bytes(size) if kind == 2 else b"\xff" * size


@needs_numba
@pytest.mark.parametrize("seed", range(20))
def test_strings_are_those_of_compressai(seed: int) -> None:
    symbols, indexes, tables = drawn(seed)
    expected = by_compressai(symbols, indexes, tables)
    assert encode(symbols, indexes, tables) == expected
    assert np.array_equal(decode(expected, indexes, tables), symbols)
    with uncompiled():
        assert compiled() is None
        assert encode(symbols, indexes, tables) == expected
        assert np.array_equal(decode(expected, indexes, tables), symbols)
    assert compiled() is kernels
    empty = symbols[:0], indexes[:0], tables
    assert encode(*empty) == np.array([1 << 31, 0], "<u4").tobytes()
    assert decode(b"", *empty[1:]).size == 0


@needs_numba
@pytest.mark.parametrize("seed", range(20))
def test_what_nobody_wrote_is_read_as_compressai_reads_it_with_zeros_behind(seed: int) -> None:
    """Numbers of four bits that follow an escape among them, more than fit into a symbol."""
    symbols, indexes, tables = drawn(seed)
    rng = np.random.default_rng(seed)
    string = by_compressai(symbols, indexes, tables)
    for _ in range(20):
        crafted = damaged(string, rng)
        with uncompiled(), bounded_reads(len(indexes)):
            expected = decode(crafted, indexes, tables)
        assert np.array_equal(decode(crafted, indexes, tables), expected)


@pytest.mark.parametrize("fast", [pytest.param(True, marks=needs_numba), False])
def test_what_is_coded_is_recorded(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    symbols, indexes, tables = drawn(1)
    monkeypatch.setattr(kernels, "COMPILED", fast)
    with recorded_symbols() as outer, recorded_symbols() as written:
        string = encode(symbols, indexes, tables)
    with recorded_symbols() as read:
        decode(string, indexes, tables)
    with recorded_symbols() as expected:
        by_compressai(symbols, indexes, tables)
    encode(symbols[:5], indexes[:5], tables)  # outside
    assert written.written == outer.written == len(symbols) and read.written == 0
    digest = expected.digest([string])
    assert digest and all(one.digest([string]) == digest for one in (written, outer, read))


WRONG: dict[str, Any] = {
    "a row that is not there": lambda i, t: (np.full_like(i, len(t.cdf)), t),
    "a row before the first": lambda i, t: (np.full_like(i, -1), t),
    "longer than the table": lambda i, t: (
        i, t._replace(lengths=np.full_like(t.lengths, t.cdf.shape[1] + 1)),
    ),
    "much longer": lambda i, t: (i, t._replace(lengths=np.full_like(t.lengths, 2**31 - 1))),
    "too short": lambda i, t: (i, t._replace(lengths=np.ones_like(t.lengths))),
    "of negative length": lambda i, t: (i, t._replace(lengths=np.full_like(t.lengths, -5))),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("fast", [pytest.param(True, marks=needs_numba), False])
def test_tables_are_not_read_where_they_end(
    what: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    symbols, indexes, tables = drawn(2)
    string = by_compressai(symbols, indexes, tables)
    indexes, tables = WRONG[what](indexes, tables)
    monkeypatch.setattr(kernels, "COMPILED", fast)
    with pytest.raises(CodecError, match="CDF tables of this codec are damaged"):
        encode(symbols, indexes, tables)
    with pytest.raises(CodecError, match="CDF tables of this codec are damaged"):
        decode(string, indexes, tables)


@needs_numba
@pytest.mark.parametrize("seed", range(10))
def test_tables_of_noise_are_read_inside_their_rows(seed: int) -> None:
    """Whatever frequencies say: symbols come from the row, or are refused, or are an escape."""
    rng = np.random.default_rng(seed)
    symbols, indexes, tables = drawn(seed)
    noise = rng.integers(-(2**31), 2**31, tables.cdf.shape, dtype=np.int64).astype(np.int32)
    decode(rng.bytes(200), indexes, tables._replace(cdf=noise))
    flat = tables._replace(cdf=np.zeros_like(tables.cdf))
    with pytest.raises(CodecError, match="damaged"):
        encode(symbols, indexes, flat)
    decode(rng.bytes(200), indexes, flat)


def fresh(monkeypatch: pytest.MonkeyPatch, numba: Any) -> Any:
    """The file of the kernels, imported anew with another numba, None for none."""
    monkeypatch.setitem(sys.modules, "numba", numba)
    spec: Any = importlib.util.spec_from_file_location("kernels_anew", str(kernels.__file__))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_numba_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fresh(monkeypatch, None)
    assert not plain.COMPILED and not hasattr(plain.write, "py_func")


@needs_numba
def test_numba_that_is_switched_off_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    assert not fresh(monkeypatch, numba).COMPILED


@needs_numba
def test_machine_code_that_cannot_be_kept_is_made_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import numba

    made, own = [], numba.njit

    def nowhere(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        made.append(options)
        return own(**options)

    monkeypatch.setattr(numba, "njit", nowhere)
    again = fresh(monkeypatch, numba)
    assert again.COMPILED and made
    assert again.first_rows(np.array([0.5, 1.0]))[-1] == 2


def context_model(seed: int, short: bool) -> list[Any]:
    """Arguments of `code_positions`: a context model of few channels."""
    rng = np.random.default_rng(seed)
    height, width, border, channels, given, outputs, hidden = 3, 4, 2, 5, 6, 7, 9

    def weights(inputs: int, outs: int) -> np.ndarray:
        drawn = rng.standard_normal(inputs * outs) / np.sqrt(inputs)
        return drawn.astype(np.float32 if short else np.float64)

    last = weights(hidden, 2 * channels)
    _, _, tables = drawn(seed)
    rows = len(tables.cdf)
    return [
        height,
        width,
        border,
        rng.standard_normal((height, width * channels)) * 4,
        np.zeros((height + 2 * border, (width + 2 * border) * channels)),
        rng.standard_normal((height, width * given)),
        weights(border * 5 * channels, outputs),
        weights(border * channels, outputs),
        rng.standard_normal(outputs),
        weights(given, hidden),
        np.concatenate([weights(outputs, hidden), last]),
        np.array([outputs, hidden, 2 * channels]),
        2 * channels,
        rng.standard_normal(hidden + 2 * channels),
        np.array([0.01]),
        2.0**26,
        0.11,
        np.sort(rng.random(rows - 1) * 2),
        *tables,
        np.empty(0, np.uint32),
        np.zeros((height * width, channels), np.int32),
        np.zeros((height * width, channels), np.int32),
    ]


@needs_numba
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_sums_are_added_up_as_they_are_written(
    seed: int, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled kernel computes what plain Python does, to the bit: nothing is reordered, and
    no product fused into a sum, by whatever instructions this processor has.
    """
    plain = fresh(monkeypatch, None)
    monkeypatch.undo()
    found, expected = context_model(seed, short), context_model(seed, short)
    assert kernels.code_positions(False, *found) == kernels.DONE
    with np.errstate(over="ignore"):
        assert plain.code_positions(False, *expected) == kernels.DONE
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)
    decoded, symbols = found[4], found[-2]
    assert len(np.unique(decoded)) > 40 and symbols.any()


@pytest.mark.parametrize("fast", [pytest.param(True, marks=needs_numba), False])
def test_both_sides_of_a_context_model_are_one_kernel(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    code: Any = kernels if fast else fresh(monkeypatch, None)
    writing, reading = context_model(5, True), context_model(5, True)
    assert code.code_positions(False, *writing) == code.DONE
    tables, (symbols, rows) = writing[18:21], writing[-2:]
    words = np.empty(2 * symbols.size + 4, np.uint32)
    with np.errstate(over="ignore"):
        fault, first = code.write(symbols.reshape(-1), rows.reshape(-1), *tables, words)
        assert fault == code.DONE
        reading[-3], reading[3] = words[first:].copy(), np.empty((0, 0))
        assert code.code_positions(True, *reading) == code.DONE
    assert np.array_equal(reading[-2], symbols) and np.array_equal(reading[-1], rows)
    assert np.array_equal(reading[4], writing[4])


def test_nothing_is_kept_for_two_files() -> None:
    """Machine code is kept with the time of one file: a function of another one would grow old."""
    source = Path(str(kernels.__file__)).read_text(encoding="utf-8")
    assert "import nicprune" not in source and "from nicprune" not in source
