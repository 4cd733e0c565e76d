"""Entropy coding compiled by numba, an extra: `pip install 'nicprune[fast]'`.

`write` and `read` are CompressAI's coder, to the byte, on arrays instead of lists: rANS with a
state of 64 bits that moves words of 32, after F. Giesen's `rans64.h`; probabilities of 16 bits;
symbols outside a table escaped in steps of four bits. `code_positions` runs a context model over
the positions of an image, for encoder and decoder alike.

Sums are added up in the order in which they are written here: without `fastmath`, the compiler
neither reorders them nor fuses products into them, so that every processor computes the same.

Machine code is kept where numba keeps it: in `__pycache__` beside this file, or in the user's cache
folder where that cannot be written. It is kept for one file, so that all kernels are in this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

try:
    import numba
except ImportError:
    numba = None

COMPILED = numba is not None and not numba.config.DISABLE_JIT
"""True if the functions below are compiled. If not, they are plain Python, and very slow."""


def _compiled(function: Callable[..., Any]) -> Any:
    if not COMPILED:
        return function
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep machine code
        return numba.njit(**options)(function)


DONE, NO_TABLE, NO_PROBABILITY, BAD_SCALE, BAD_LATENT = 0, 1, 2, 3, 4
"""Results of a kernel: no fault; an index without a table; a symbol of probability zero; a scale
that is not finite; a latent that is not finite or too large to be written.
"""

LOWEST = np.uint64(1 << 31)
"""Smallest state of the coder between two symbols."""

ZERO, FOUR, SIXTEEN, WORD = np.uint64(0), np.uint64(4), np.uint64(16), np.uint64(32)
LOW_4, LOW_16, LOW_32 = np.uint64(0xF), np.uint64(0xFFFF), np.uint64(0xFFFFFFFF)
STEP = np.uint64(1 << 47)
"""A symbol of frequency f is put on a state below f times this, a step of 16 bits."""

ESCAPE_STEP = np.uint64(1 << 59)
"""Four bits are put on a state below this."""


@_compiled
def _put_bits(state: Any, words: Any, place: int, value: int) -> Any:
    """Put four bits on the state; return it, and where the last word was written."""
    if state >= ESCAPE_STEP:
        place -= 1
        words[place] = state & LOW_32
        state >>= WORD
    return (state << FOUR) | np.uint64(value), place


@_compiled
def write(
    symbols: Any, indexes: Any, cdf: Any, lengths: Any, offsets: Any, words: Any
) -> tuple[int, int]:
    """Write symbols from the end of `words` towards its beginning.

    Args:
        symbols, indexes: int32, shape (n,): the symbols, and the row of the table of each.
        cdf, lengths, offsets: int32: cumulative frequencies, shape (rows, columns), how many of
            each row there are, and the symbol that each row begins with.
        words: uint32, shape (2 n + 4,).

    Returns:
        A fault, and where the first word is.
    """
    state, place = LOWEST, len(words)
    nibbles = np.empty(16, np.int64)
    for i in range(len(symbols) - 1, -1, -1):
        row = indexes[i]
        if row < 0 or row >= len(cdf):
            return NO_TABLE, place
        last = lengths[row] - 2
        if last < 0 or last + 1 >= cdf.shape[1]:
            return NO_TABLE, place
        value, rest = np.int64(symbols[i]) - offsets[row], np.int64(-1)
        if value < 0:
            rest, value = -2 * value - 1, np.int64(last)
        elif value >= last:
            rest, value = 2 * (value - last), np.int64(last)
        if rest >= 0:
            rest &= 0xFFFFFFFF
            count = 0
            while rest:
                nibbles[count] = rest & 15
                rest >>= 4
                count += 1
            for j in range(count - 1, -1, -1):
                state, place = _put_bits(state, words, place, nibbles[j])
            state, place = _put_bits(state, words, place, count)
        low = cdf[row, value]
        frequency = np.uint64((cdf[row, value + 1] - low) & 0xFFFF)
        if frequency == ZERO:
            return NO_PROBABILITY, place
        if state >= STEP * frequency:
            place -= 1
            words[place] = state & LOW_32
            state >>= WORD
        start = np.uint64(low & 0xFFFF)
        state = ((state // frequency) << SIXTEEN) + state % frequency + start
    place -= 2
    words[place] = state & LOW_32
    words[place + 1] = state >> WORD
    return DONE, place


@_compiled
def _refilled(state: Any, words: Any, place: int) -> Any:
    """Move a word into the state where it is low, a zero behind the end of the string."""
    if state < LOWEST:
        state <<= WORD
        if place < len(words):
            state |= np.uint64(words[place])
        place += 1
    return state, place


@_compiled
def _get_bits(state: Any, words: Any, place: int) -> Any:
    """Take four bits from the state; return it, the next word's place, and the bits."""
    value = np.int64(state & LOW_4)
    state, place = _refilled(state >> FOUR, words, place)
    return state, place, value


@_compiled
def _started(words: Any) -> Any:
    """Return the state that a string begins with."""
    low = words[0] if len(words) > 0 else np.uint32(0)
    high = words[1] if len(words) > 1 else np.uint32(0)
    return np.uint64(low) | (np.uint64(high) << WORD)


@_compiled
def _read_symbol(state: Any, words: Any, place: int, line: Any, length: int, offset: int) -> Any:
    """Read a symbol by a row of the table; return the state, the next word's place, the symbol."""
    last = length - 2
    wanted = np.int64(state & LOW_16)
    low, high = np.int64(0), np.int64(last + 1)  # line[low] <= wanted < line[high]
    middle = min(max(np.int64(-offset), low), np.int64(last))  # the most probable symbol
    while True:
        if wanted < line[middle]:
            high = middle
        elif middle + 1 < high and wanted >= line[middle + 1]:
            low = middle + 1
        else:
            low = middle
            break
        if high - low < 2:
            break
        middle = (low + high) >> 1
    start = np.uint64(np.int64(line[low]))
    frequency = np.uint64(np.int64(line[low + 1]) - np.int64(line[low]))
    state = frequency * (state >> SIXTEEN) + (state & LOW_16) - start
    state, place = _refilled(state, words, place)
    value = low
    if low == last:
        state, place, nibble = _get_bits(state, words, place)
        count = nibble
        while nibble == 15:
            state, place, nibble = _get_bits(state, words, place)
            count += nibble
        rest = np.int64(0)
        for j in range(count):  # those after the eighth, which no encoder writes, as x86 shifts
            state, place, nibble = _get_bits(state, words, place)
            rest |= (nibble << ((4 * j) & 31)) & 0xFFFFFFFF
        if rest > 0x7FFFFFFF:
            rest -= 0x100000000
        half = rest >> 1
        value = -half - 1 if rest & 1 else half + last
    value += offset
    return state, place, ((value + 0x80000000) & 0xFFFFFFFF) - 0x80000000


@_compiled
def read(words: Any, indexes: Any, cdf: Any, lengths: Any, offsets: Any, symbols: Any) -> int:
    """Read symbols, zeros behind the end of the string; return a fault.

    Args:
        words: uint32, the string.
        indexes, cdf, lengths, offsets: as `write` takes them.
        symbols: int32, shape (n,): to be filled.
    """
    state, place = _started(words), 2
    for i in range(len(indexes)):
        row = indexes[i]
        if row < 0 or row >= len(cdf):
            return NO_TABLE
        length = lengths[row]
        if length < 2 or length > cdf.shape[1]:
            return NO_TABLE
        state, place, symbols[i] = _read_symbol(state, words, place, cdf[row], length, offsets[row])
    return DONE


@_compiled
def first_rows(table: Any) -> Any:
    """Return where the search for a positive number in a sorted table begins, by the number's
    uppermost 16 bits: behind the entries whose own are lower.
    """
    keys = table.view(np.int64) >> 48
    found = np.zeros(1 << 15, np.int32)
    row = 0
    for key in range(len(found)):
        while row < len(table) and (table[row] <= 0 or keys[row] < key):
            row += 1
        found[key] = row
    return found


@_compiled
def _row_of(value: float, key: int, begin: Any, table: Any) -> int:
    """Return how many entries of a sorted table are smaller than a finite value.

    Args:
        key: its uppermost 16 bits.
        begin: `first_rows` of the table.
    """
    row = begin[key] if value > 0 else 0
    while row < len(table) and table[row] < value:
        row += 1
    return row


@_compiled
def find_rows(scales: Any, bound: float, table: Any, begin: Any, rows: Any) -> int:
    """Find the CDF table of each scale; return a fault.

    Args:
        scales: float64, shape (n,): changed to what is at least the bound.
        bound: smaller scales count as this.
        table: float64, sorted: the scale table without its last entry.
        begin: `first_rows` of it.
        rows: int32, shape (n,): to be filled.
    """
    for i in range(len(scales)):
        if not np.isfinite(scales[i]):
            return BAD_SCALE
        scales[i] = max(scales[i], bound)
    keys = scales.view(np.int64)
    for i in range(len(scales)):
        rows[i] = _row_of(scales[i], keys[i] >> 48, begin, table)
    return DONE


@_compiled
def _copy(values: Any, out: Any) -> None:
    """Fill an array with the first of some values."""
    for o in range(len(out)):
        out[o] = values[o]


@_compiled
def _add_products(out: Any, x: Any, weights: Any) -> None:
    """Add to each output the products of all inputs with their weights, one input after the other.

    Args:
        out: float64, shape (outputs,).
        x: float64, shape (inputs,).
        weights: float32 or float64, shape (inputs * outputs,).
    """
    n, inputs = len(out), len(x)
    whole = inputs - inputs % 4
    for i in range(0, whole, 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        w0 = weights[i * n : i * n + n]
        w1 = weights[i * n + n : i * n + 2 * n]
        w2 = weights[i * n + 2 * n : i * n + 3 * n]
        w3 = weights[i * n + 3 * n : i * n + 4 * n]
        for o in range(n):
            out[o] = out[o] + x0 * w0[o] + x1 * w1[o] + x2 * w2[o] + x3 * w3[o]
    for i in range(whole, inputs):
        x0 = x[i]
        w0 = weights[i * n : i * n + n]
        for o in range(n):
            out[o] = out[o] + x0 * w0[o]


@_compiled
def _add_row(out: Any, x: Any, step: int, inputs: int, weights: Any) -> None:
    """Do as `_add_products` for each position of a row, by tiles that stay in the cache.

    Args:
        out: float64, shape (positions, outputs).
        x: float64, shape (n,): the inputs of a position begin `step` after those before.
        inputs: number of inputs of a position.
        weights: shape (inputs * outputs,).
    """
    n = out.shape[1]
    for first in range(0, len(out), 8):
        for i in range(0, inputs, 4):
            some = min(4, inputs - i)
            part = weights[i * n : (i + some) * n]
            for w in range(first, min(first + 8, len(out))):
                _add_products(out[w], x[w * step + i : w * step + i + some], part)


@_compiled
def code_positions(
    reading: bool,
    height: int,
    width: int,
    border: int,
    latents: Any,
    decoded: Any,
    params: Any,
    above: Any,
    left: Any,
    context_bias: Any,
    of_params: Any,
    dense: Any,
    sizes: Any,
    widest: int,
    biases: Any,
    slopes: Any,
    largest: float,
    bound: float,
    table: Any,
    cdf: Any,
    lengths: Any,
    offsets: Any,
    words: Any,
    symbols: Any,
    indexes: Any,
) -> int:
    """Code the latents of an image position by position, row by row.

    A masked convolution of what is decoded, and the hyperprior's parameters, go through pointwise
    layers to scales and means (Minnen et al., "Joint Autoregressive and Hierarchical Priors for
    Learned Image Compression", NeurIPS 2018). What depends on the rows above, or on the parameters
    alone, is computed for a whole row at once.

    Args:
        reading: read symbols from `words`; if not, find them, and `write` is called afterwards.
        height, width: H and W of the latents.
        border: p, how far the convolution reaches.
        latents: float64, shape (H, W C): what is coded; not used when reading.
        decoded: float64, shape (H + 2 p, (W + 2 p) C), zeros: filled with what is decoded, with a
            border of zeros.
        params: float64, shape (H, W P): parameters of the hyperprior.
        above, left: weights of the convolution, (inputs * O,): those of the p rows above, and those
            of the p positions to the left.
        context_bias: float64, shape (O,).
        of_params: weights of the first pointwise layer for `params`, (P * outputs,).
        dense: its weights for the O outputs of the convolution, and those of the other layers, one
            after the other.
        sizes: int64: O, and the outputs of each layer; the last one is 2 C.
        widest: the largest of them.
        biases: float64, of all layers, one after the other.
        slopes: float64: of the leaky ReLU before each layer but the first.
        largest: latents are below it.
        bound, table: as `find_rows` takes them.
        cdf, lengths, offsets, words: as `read` takes them.
        symbols, indexes: int32, shape (H W, C): to be filled.

    Returns:
        A fault.
    """
    for row in range(len(cdf)):
        if lengths[row] < 2 or lengths[row] > cdf.shape[1]:
            return NO_TABLE
    if len(table) >= len(cdf):
        return NO_TABLE
    channels, outputs, first_outputs = symbols.shape[1], sizes[0], sizes[1]
    row_inputs, param_inputs = (2 * border + 1) * channels, params.shape[1] // width
    context, first = np.empty((width, outputs)), np.empty((width, first_outputs))
    hidden = np.empty((2, widest))
    state, place, begin = _started(words), 2, first_rows(table)
    for h in range(height):
        for w in range(width):
            _copy(context_bias, context[w])
            _copy(biases, first[w])
        for r in range(border):
            part = above[r * row_inputs * outputs : (r + 1) * row_inputs * outputs]
            _add_row(context, decoded[h + r], channels, row_inputs, part)
        _add_row(first, params[h], param_inputs, param_inputs, of_params)
        line = decoded[h + border]
        for w in range(width):
            x = context[w]
            _add_products(x, line[w * channels : (w + border) * channels], left)
            out = first[w]
            used, biased = outputs * first_outputs, first_outputs
            _add_products(out, x, dense[:used])
            for layer in range(1, len(sizes) - 1):
                x = out
                slope = slopes[layer - 1]
                for o in range(len(x)):
                    x[o] = x[o] if x[o] > 0 else slope * x[o]
                out = hidden[layer % 2][: sizes[layer + 1]]
                _copy(biases[biased:], out)
                _add_products(out, x, dense[used : used + len(x) * len(out)])
                used, biased = used + len(x) * len(out), biased + len(out)
            position = h * width + w
            if find_rows(out[:channels], bound, table, begin, indexes[position]):
                return BAD_SCALE
            for c in range(channels):
                mean, row = out[channels + c], indexes[position, c]
                if reading:
                    state, place, symbol = _read_symbol(
                        state, words, place, cdf[row], lengths[row], offsets[row]
                    )
                else:
                    centred = latents[h, w * channels + c] - mean
                    if not abs(centred) < largest:
                        return BAD_LATENT
                    symbol = np.int64(np.rint(centred))
                symbols[position, c] = symbol
                line[(w + border) * channels + c] = symbol + mean
    return DONE
