"""Symbols by the strings that hold them: the same on both sides, whatever the order of calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressai import ans
from helpers import built, image

from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.rans import DIGEST_BYTES, _flat, recorded_symbols

CDF = [[0, 16384, 49152, 65535, 65536]]
"""A table of three symbols and one for all others."""
TABLE: tuple[Any, ...] = (CDF, [5], [-1])


def string_of(symbols: list[int]) -> bytes:
    found: bytes = ans.RansEncoder().encode_with_indexes(symbols, [0] * len(symbols), *TABLE)
    return found


def test_symbols_written_at_once_are_read_in_parts() -> None:
    symbols = [0, 1, -1, 0, 1, 1]
    buffered = ans.BufferedRansEncoder()
    with recorded_symbols() as written:
        for part in (symbols[:4], symbols[4:]):
            buffered.encode_with_indexes(part, [0] * len(part), *TABLE)
        string = buffered.flush()
        assert string_of(symbols) == string
    decoder = ans.RansDecoder()
    with recorded_symbols() as read:
        decoder.set_stream(string)
        for count in (1, 3, 2):
            decoder.decode_stream([0] * count, *TABLE)
    expected = written.digest([[string]])
    assert len(expected) == DIGEST_BYTES and read.digest([[string]]) == expected
    assert (written.written, read.written) == (12, 0)


def test_the_order_of_strings_does_not_matter_but_that_of_symbols_does() -> None:
    first, second = [0, 1, 1], [1, 0, -1, -1]
    with recorded_symbols() as one:
        strings = [string_of(first), string_of(second)]
    with recorded_symbols() as other:
        string_of(second)
        string_of(first)
        string_of([0] * 5)  # not sent: an encoder that tried it
    assert one.digest(strings) == other.digest([[strings[1]], [strings[0]]])
    assert one.digest(strings) != one.digest(strings[:1])
    with recorded_symbols() as third:
        string_of(first)
        third.whole(strings[1], second[::-1])
    assert third.digest(strings) != one.digest(strings)


def test_strings_of_another_coder_have_no_digest() -> None:
    with recorded_symbols() as written:
        string_of([0, 1, 1])
    assert written.digest([[b"other"]]) == b"" == written.digest([])


def test_coders_are_as_before_afterwards() -> None:
    own = ans.RansDecoder.decode_stream, ans.BufferedRansEncoder.flush
    with pytest.raises(KeyError), recorded_symbols():
        assert ans.RansDecoder.decode_stream is not own[0]
        raise KeyError
    assert own == (ans.RansDecoder.decode_stream, ans.BufferedRansEncoder.flush)


@pytest.mark.parametrize("name", ["bmshj2018-factorized", "mbt2018", "elic2022-official"])
@torch.no_grad()
def test_every_string_of_an_image_is_in_the_digest(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec: Any = built(name)[0]
    refresh_tables(codec)
    with recorded_symbols() as written:
        sent = codec.compress(image(codec, 1))
    digest = written.digest(sent["strings"])
    assert len(digest) == DIGEST_BYTES
    strings = set(_flat(sent["strings"]))
    assert len(strings) == {"bmshj2018-factorized": 1, "mbt2018": 2, "elic2022-official": 7}[name]
    for changed in (None, *strings):
        with recorded_symbols() as read:
            whole, start = read.whole, read.start
            # One symbol more than the string holds stands for any other symbols.
            monkeypatch.setattr(
                read,
                "whole",
                lambda s, symbols, c=changed, f=whole: f(s, [*symbols, 0] if s == c else symbols),
            )
            monkeypatch.setattr(
                read,
                "start",
                lambda coder, s=b"", c=changed, f=start, r=read: (
                    f(coder, s),
                    r.add(coder, [0] if s == c else []),
                ),
            )
            codec.decompress(sent["strings"], sent["shape"])
        assert (read.digest(sent["strings"]) == digest) == (changed is None)
