"""Container for one coded image: what `compress` returns, the size of the image, and which codec
can decode it.

    magic (4) | version (1) | fingerprint of the codec (8) | CRC-32 of its CDF tables (4)
    | width, height, shape, strings | CRC-32 of all before (4)

The fingerprint is that of the weights; since version 2 its second half is combined (exclusive or)
with the CRC-32 of the layers' types and settings. Width, height, shape and strings are stored as
values. A value is a varint n << 2 | kind, followed by n values (list), n bytes (string), n pairs of
values (table), or nothing (the integer n).
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import (
    CDF_BUFFERS,
    ENCODER_ONLY,
    SIZE_MULTIPLE,
    check_codec,
    check_finite,
    transform_of,
    unwrap,
)
from nicprune.codecs.calling import compress, decompress
from nicprune.codecs.cdf import bounded_reads, check_bottlenecks, counted_symbols, fast_indexes
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import example_image, image_shape
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.structure import checksum, structure
from nicprune.common.errors import CodecError, DataError, FileError, enough_memory
from nicprune.common.files import check_regular
from nicprune.data.images import check_size, read_image, to_channels
from nicprune.evaluation.padding import crop, pad
from nicprune.methods.composition import Attached, resolve_point

MAGIC, VERSION = b"\x8bNIC", 2
"""The first byte is not ASCII, so that no text is taken for an image."""

HEADER = struct.Struct(">4sB8sI")

INTEGER, LIST, STRING, TABLE = range(4)

DEEPEST = 8
"""Largest depth of nested values; strings and shapes of codecs have at most three levels."""

MISFIT = "its contents do not fit together"


@torch.no_grad()
def encode(
    codec: nn.Module,
    image: Tensor | str | Path,
    *,
    level: Any = None,
    lmbda: float | None = None,
    width: int | None = None,
) -> bytes:
    """Encode one image; `decode` with the same codec reads it.

    Args:
        codec: a `CompressionModel`, pruned or not, or one with gates or a modulator on it, as
            returned by `attach`, `harden` or `load`. A float32 copy is used. After training, call
            `codec.update(force=True)` first, as for `compress`.
        image: uint8 RGB, shape (3, H, W), of any size; or an image file. A codec of one channel
            takes (1, H, W) too, and the luma (BT.601) of RGB.
        level, lmbda: with a modulator, the rate, as in `Attached.forward`; by default the highest.
            The bitstream holds it. With a scalable encoder, the level; the original codec decodes
            the bitstreams of every level.
        width: with a slimmable codec, the width; by default the one that is set. The bitstream
            holds it.

    Raises:
        CodecError: not a codec, or masks still decay on it.
        DataError: the image has another shape or type, or the file cannot be read.
        RecipeError: the codec was not trained for this rate, or has no modulator or widths.
    """
    _check(codec)
    asked = {"level": level, "lmbda": lmbda, "width": width}
    resolve_point(codec, **asked)  # refused before the image is read
    asked = {name: value for name, value in asked.items() if value is not None}
    if not isinstance(image, Tensor):
        image = read_image(image)
    channels = image_shape(unwrap(codec))[0]
    fits = image.ndim == 3 and image.shape[0] in (3, channels)
    if image.dtype != torch.uint8 or not fits or not image.numel():
        raise DataError(
            f"expected a uint8 image of shape ({channels}, H, W), got"
            f" {str(image.dtype).removeprefix('torch.')} of shape {tuple(image.shape)}"
        )
    check_size(image.shape[2], image.shape[1], "the image")
    image, ready = to_channels(image, channels), _ready(codec)
    height, width_ = image.shape[1:]
    with fast_indexes(), enough_memory(f"coding an image of {width_}x{height} pixels"):
        x = image.unsqueeze(0).to(next(ready.parameters()).device).float().div(255)
        sent = compress(ready, pad(x)[0], **asked)
    header = HEADER.pack(MAGIC, VERSION, _mark(fingerprint(ready), ready), _tables(ready))
    data = header + b"".join(
        _pack(value) for value in (image.shape[2], image.shape[1], sent["shape"], sent["strings"])
    )
    return data + zlib.crc32(data).to_bytes(4, "big")


@torch.no_grad()
def decode(codec: nn.Module, data: bytes | str | Path) -> Tensor:
    """Decode an image that `encode` wrote; return it as uint8 RGB, shape (3, H, W), on the CPU. A
    codec of one channel gives (1, H, W).

    As with every learned codec, decoding repeats the encoder's floating-point arithmetic to find
    the distribution of each symbol. It is guaranteed only where this arithmetic gives the same
    bits: with the same library versions on the same kind of hardware.

    Args:
        codec: the codec that encoded the image. The rate is read from `data`.
        data: what `encode` returned; or a file of it.

    Raises:
        CodecError: not a codec, or masks still decay on it.
        FileError: `data` is missing, damaged, not made by `encode`, or encoded with another codec.
    """
    where = "this bitstream" if isinstance(data, bytes) else str(data)
    _check(codec)
    if not isinstance(data, bytes):
        try:
            data = check_regular(data).read_bytes()
        except OSError as error:
            raise FileError(f"cannot read {where}: {error.strerror or error}") from None
    if not data.startswith(MAGIC):
        raise FileError(
            f"{where} is {'empty' if not data else 'not an image that nicprune encoded'}"
        )
    if len(data) > len(MAGIC) and data[len(MAGIC)] > VERSION:
        raise FileError(
            f"{where} has format version {data[len(MAGIC)]}; this nicprune reads up to {VERSION}:"
            " pip install --upgrade nicprune"
        )
    if len(data) < HEADER.size + 4 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "big"):
        raise FileError(f"{where} is damaged or cut short: its checksum does not fit")
    _, version, wanted, tables = HEADER.unpack_from(data)
    ready = _ready(codec)
    own = fingerprint(ready)
    accepted = [own, fingerprint(ready, encoder=True)] if version < 2 else [_mark(own, ready)]
    if wanted not in accepted:
        if wanted[:4] == own[:4]:
            raise FileError(
                f"{where} was coded with another codec: one of the same weights, whose layers are"
                " of other types or settings"
            )
        raise FileError(
            f"{where} was coded with another codec (fingerprint {wanted.hex()}, this one has"
            f" {accepted[0].hex()}): decode with the codec that encoded it"
        )
    if _tables(ready) != tables:
        raise FileError(
            f"{where} was coded with other CDF tables than this codec has now: they were updated"
            " since, or made by other library versions or hardware; save the codec, and decode"
            " with that file"
        )
    try:
        width, height, shape, strings = _unpack_all(data[HEADER.size : -4], 4)
        if not isinstance(width, int) or not isinstance(height, int) or not width * height:
            raise FileError(MISFIT)
        check_size(width, height, "the image")
        channels = image_shape(unwrap(ready))[0]
        padded, padding = pad(torch.empty(1, channels, height, width, device="meta"))
        with fast_indexes(), enough_memory(f"an image of {width}x{height} pixels"):
            tiles = padded.shape[-2] // SIZE_MULTIPLE, padded.shape[-1] // SIZE_MULTIPLE
            usual, symbols = _tile(ready)
            if not _may_be(shape, usual, tiles):
                raise FileError(MISFIT)
            with bounded_reads(2 * symbols * tiles[0] * tiles[1]):
                x_hat = decompress(ready, strings, shape, example_image(unwrap(ready)))["x_hat"]
        if x_hat.shape != padded.shape:
            raise ValueError(f"decoded {tuple(x_hat.shape)}, expected {tuple(padded.shape)}")
        if not bool(torch.isfinite(x_hat).all()):
            raise ValueError("decoded values that are not finite")
    except (DataError, FileError) as error:
        raise FileError(f"{where} cannot be decoded here: {error}") from None
    except Exception as error:  # a codec may raise anything on data that its encoder did not write
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileError(
            f"{where} cannot be decoded here ({reason}): was it coded with other library versions,"
            " or on other hardware?"
        ) from error
    with enough_memory(f"an image of {width}x{height} pixels"):
        return crop(x_hat, padding)[0].clamp(0, 1).mul(255).round().byte().cpu()


def _tile(ready: Any) -> tuple[Any, int]:
    """The shape that a codec gives for the smallest image, and how many symbols it writes."""
    image = torch.zeros_like(example_image(unwrap(ready))[..., :SIZE_MULTIPLE, :SIZE_MULTIPLE])
    with counted_symbols() as counts:
        sent = compress(ready, image)
    return sent["shape"], sum(counts)


def _may_be(shape: Any, usual: Any, tiles: tuple[int, int]) -> bool:
    """Return whether a codec may give a shape for an image of so many tiles, if it gives the usual
    one for a tile: height and width come last, and may be twice as large as they should be.
    """
    if isinstance(usual, Mapping):
        return (
            isinstance(shape, Mapping)
            and shape.keys() == usual.keys()
            and all(_may_be(shape[key], usual[key], tiles) for key in usual)
        )
    if isinstance(usual, int):
        return isinstance(shape, int) and shape <= 2 * usual * max(tiles)
    if not isinstance(shape, (list, tuple)) or len(shape) != len(usual):
        return False
    if len(usual) >= 2 and all(isinstance(size, int) for size in (*usual, *shape)):
        bounds = [*usual[:-2], *(2 * u * n for u, n in zip(usual[-2:], tiles, strict=True))]
        return all(size <= bound for size, bound in zip(shape, bounds, strict=True))
    return all(_may_be(one, other, tiles) for one, other in zip(shape, usual, strict=True))


def fingerprint(codec: nn.Module, *, encoder: bool = False) -> bytes:
    """Return eight bytes that identify a codec's decoder: its weights, gates and modulators,
    without the CDF tables and the device.

    The encoder's weights do not count, since the original codec decodes what a changed encoder
    writes. With `encoder` they count too, as they did in the first files.
    """
    parts = codec.roles.parts if isinstance(codec, Attached) else []
    staying = [part for part in parts if part.needed_for_decoding or encoder]
    # Methods that decoding does not need do not count.
    state = codec.state_dict() if staying else unwrap(codec).state_dict()
    digest = hashlib.sha256()
    for key in sorted(state):
        owner, _, last = key.rpartition(".")
        if last in CDF_BUFFERS or (not encoder and transform_of(key) in ENCODER_ONLY):
            continue
        value = state[key].float()
        mask = state.get(f"{owner}.mask")
        # Masked convolutions zero their masked weights only when they first run.
        if last == "weight" and mask is not None and mask.shape == value.shape:
            value = value * mask
        digest.update(f"{key} {tuple(value.shape)} ".encode())
        digest.update(_bytes(value))
    for method in staying:
        digest.update(f"{method.name} {method.config.model_dump_json()} ".encode())
    return digest.digest()[:8]


def _mark(weights: bytes, codec: nn.Module) -> bytes:
    """The fingerprint of a codec's weights and of the layers that decode."""
    layers = checksum(structure(unwrap(codec)), lambda name: transform_of(name) not in ENCODER_ONLY)
    return weights[:4] + (int.from_bytes(weights[4:], "big") ^ layers).to_bytes(4, "big")


def _tables(codec: nn.Module) -> int:
    """Return the CRC-32 of the CDF tables: with other tables, the same weights decode garbage."""
    state = codec.state_dict()
    return zlib.crc32(
        b"".join(
            _bytes(state[key]) for key in sorted(state) if key.rpartition(".")[2] in CDF_BUFFERS
        )
    )


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().numpy().tobytes()


def _check(codec: nn.Module) -> None:
    if isinstance(codec, Attached):
        if not codec.stays:
            raise CodecError("masks still decay on this codec: code images with masked.harden()")
        return
    check_codec(codec)
    if has_hooks(codec):
        raise CodecError(
            "this codec has methods attached: code images with what attach() returned, or with"
            " harden()"
        )


def _ready(codec: nn.Module) -> Any:
    """Return a copy with the same arithmetic for encoder and decoder, whatever the precision and
    memory format of the codec.

    In channels_last, a 1x1 convolution takes the format of its input, which a context model's
    encoder and decoder build differently.
    """
    ready: Any = copy_codec(codec).float().eval().to(memory_format=torch.contiguous_format)
    check_finite(ready)
    check_bottlenecks(ready)
    ready.update()
    return ready


def _number(n: int) -> bytes:
    """Return a varint: seven bits per byte, the lowest first; the top bit is set where more bytes
    follow.
    """
    found = bytearray()
    while n > 127:
        found.append(n & 127 | 128)
        n >>= 7
    return bytes([*found, n])


def _pack(value: Any) -> bytes:
    """Return a value, with all values in it, as bytes."""
    if isinstance(value, int) and value >= 0:
        return _number(value << 2 | INTEGER)
    if isinstance(value, bytes):
        return _number(len(value) << 2 | STRING) + value
    if isinstance(value, (list, tuple)):
        return _number(len(value) << 2 | LIST) + b"".join(map(_pack, value))
    if isinstance(value, Mapping):
        return _number(len(value) << 2 | TABLE) + b"".join(
            _pack(str(key).encode()) + _pack(item) for key, item in value.items()
        )
    raise CodecError(
        f"the codec's compress() returned {value!r:.60}, which cannot be stored in a file: expected"
        " bytes and sizes, in lists or dicts"
    )


def _unpack_all(data: bytes, count: int) -> list[Any]:
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
        return {key.decode(): item for key, item in zip(items[::2], items[1::2], strict=True)}, at
    sizes = bool(items) and all(isinstance(item, int) for item in items)
    return torch.Size(items) if sizes else items, at
