"""Encode an image with a codec into bytes, and decode it: see `coded_image` for what is stored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import check_codec, check_finite, unwrap
from nicprune.codecs.cdf import check_bottlenecks
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import image_shape, size_multiple
from nicprune.codecs.float64_coding import Coder
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.memory_format import fast_format, format_of, in_format, to_contiguous
from nicprune.codecs.rans import bounded_reads, recorded_symbols
from nicprune.codecs.replaced_forward import replaced
from nicprune.common.errors import CodecError, DataError, FileError, enough_memory
from nicprune.data.images import given_image
from nicprune.evaluation.padding import crop, pad
from nicprune.methods.composition import Attached
from nicprune.methods.operating_point import EMPTY, OperatingPoint
from nicprune.methods.points import first_point, resolve_point
from nicprune.storage.coded_image import VERSION, CodedImage, read_coded
from nicprune.storage.identity import earlier_mark, fingerprint, mark, tables
from nicprune.storage.values import MISFIT


def encode(
    codec: nn.Module,
    image: Tensor | str | Path,
    *,
    level: Any = None,
    lmbda: float | None = None,
    width: int | None = None,
    domain: str | None = None,
    fast: bool = False,
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
        domain: with an adaptation, the domain, by name; by default the one that is set, which is
            the target after training and loading. The file holds it. What is written for the source
            domain is what the source codec writes, byte for byte.
        fast: compute entropy parameters in float32. With other CPU kernels, another number of
            threads or other software, some of the images then cannot be decoded.

    Raises:
        CodecError: not a codec, or masks still decay on it.
        DataError: the image has another shape or type, or the file cannot be read.
        RecipeError: the codec was not trained for this rate, or has no modulator, widths or domain.
    """
    _check(codec)
    rate = {"level": level, "lmbda": lmbda, "width": width, "domain": domain}
    resolve_point(codec, **rate)  # refused before the image is read
    picture = given_image(image, image_shape(unwrap(codec))[0])
    return ImageCoder(codec).encode(picture, fast=fast, **rate)


def decode(codec: nn.Module, data: bytes | str | Path, *, exact: bool = False) -> Tensor:
    """Decode an image that `encode` wrote; return it as uint8 RGB, shape (3, H, W), on the CPU. A
    codec of one channel gives (1, H, W).

    Decoding repeats the encoder's floating-point arithmetic to find the distribution of each
    symbol, in float64 (see `codecs.float64_coding`). The digest in `data` proves that all symbols
    are the encoder's. From these the decoder's transforms compute the picture in float32: with
    other CPU kernels or another number of threads, single values may differ by one level of 256.

    Args:
        codec: the codec that encoded the image; or an adapted one, for its source codec's images
            too. The rate is read from `data`, and the domain.
        data: what `encode` returned; or a file of it.
        exact: compute the picture in float64 too, so that it is the same everywhere; several times
            slower.

    Raises:
        CodecError: not a codec, or masks still decay on it.
        FileError: `data` is missing, damaged, not made by `encode`, or encoded with another codec;
            or the symbols decoded are not the encoder's.
    """
    _check(codec)
    coded, where = read_coded(data)
    picture = ImageCoder(codec).decode(coded, where, exact=exact)
    if not coded.digest:
        warnings.warn(f"{where} {_without_digest(coded)}", stacklevel=2)
    return picture


class ImageCoder:
    """A codec made ready for coding, for many images at once: see `encode` and `decode`.

    Args:
        codec: as `encode` takes it. It is copied: changes made later do not count.
    """

    def __init__(self, codec: nn.Module):
        _check(codec)
        self._ready = coding_copy(codec)
        self._own = fingerprint(self._ready)
        self._mark = mark(self._own, self._ready)
        self._tables = tables(self._ready)
        self._channels = image_shape(unwrap(self._ready))[0]
        self._multiple = size_multiple(unwrap(self._ready))
        self._coders: dict[tuple[bool, bool], Coder] = {}
        self._source, self._domain, self._target = _domains(codec)

    @torch.no_grad()
    def encode(self, image: Tensor | str | Path, *, fast: bool = False, **rate: Any) -> bytes:
        """Encode one image; see `encode` for arguments and errors."""
        picture = given_image(image, self._channels)
        height, width = picture.shape[1:]
        rate = {name: value for name, value in rate.items() if value is not None}
        if self._source is not None:
            if self._ready.bare_at(self._ready.point(**rate)) is not None:
                return self._source.encode(picture, fast=fast)
            rate = self._target.keywords()
        with enough_memory(f"coding an image of {width}x{height} pixels"):
            coder = self._coder(float64=not fast)
            device = next(self._ready.parameters()).device
            x = pad(picture.unsqueeze(0).to(device).float().div(255), self._multiple)[0]
            if coder.in_float64:  # as the weights
                x = x.contiguous(memory_format=format_of(coder.model))
            with _point_kept(coder.model), recorded_symbols() as written:
                sent = coder.compress(x, **rate)
        coded = CodedImage(
            version=VERSION,
            mark=self._mark,
            tables=self._tables,
            in_float64=coder.in_float64,
            digest=written.digest(sent["strings"]) if coder.has_digest else b"",
            width=width,
            height=height,
            shape=sent["shape"],
            strings=sent["strings"],
            domain=self._domain,
            source=self._source._mark if self._source is not None else b"",
        )
        return bytes(coded)

    @torch.no_grad()
    def decode(
        self, coded: CodedImage, where: str = "this bitstream", *, exact: bool = False
    ) -> Tensor:
        """Decode one image; see `decode`. `where` is its name for messages."""
        if self._source is not None and not coded.domain:
            return self._source.decode(coded, where, exact=exact)
        self._check_made_for(coded, where)
        if exact and replaced(self._ready):
            raise CodecError(
                "exact computes the picture in float64, and a backend runs this codec's transforms"
                " in its own precision: decode with the codec that accelerate was given"
            )
        if exact and not coded.in_float64:
            raise FileError(
                f"{where} cannot be decoded exactly: its entropy parameters are in float32 (an"
                " earlier version, or encoded with fast)"
            )
        size = f"an image of {coded.width}x{coded.height} pixels"
        try:
            padded, padding = pad(
                torch.empty(1, self._channels, coded.height, coded.width, device="meta"),
                self._multiple,
            )
            with enough_memory(size):
                x_hat = self._decoded(coded, padded, exact)
        except (DataError, FileError) as error:
            raise FileError(f"{where} cannot be decoded here: {error}") from None
        except Exception as error:  # a codec may raise anything on data that it did not write
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise FileError(
                f"{where} cannot be decoded here ({reason}): was it coded with other library"
                " versions, or on other hardware?"
            ) from error
        with enough_memory(size):
            return crop(x_hat, padding)[0].clamp(0, 1).mul(255).round().byte().cpu()

    def point_of(self, coded: CodedImage) -> list[str]:
        """Return the rate, width and domain that an image was coded at, as tables name them; those
        of which the codec has several.

        Raises:
            FileError: the bitstream says none that this codec has.
        """
        if self._source is not None and not coded.domain:
            return self._source.point_of(coded)
        strings = list(coded.strings)
        with _point_kept(self._ready):
            return [
                choice.name(choice.take(strings))
                for choice in getattr(self._ready, "choices", ())
                if choice.in_bitstream
            ]

    def _check_made_for(self, coded: CodedImage, where: str) -> None:
        """Raise FileError where another codec coded an image."""
        accepted = [self._mark]
        if coded.domain and coded.mark != self._mark:
            adapted = self._mark if self._source is None else self._source._mark
            this = f"an adaptation of {'this' if coded.source == adapted else 'another'} codec"
            own = f", and this one has the domain {self._domain!r}" if self._domain else ""
            raise FileError(
                f"{where} was written for the domain {coded.domain!r} by {this}{own}: decode with"
                " that adaptation"
            )
        if coded.version < 2:
            accepted = [self._own, fingerprint(self._ready, encoder=True)]
        elif coded.mark != self._mark:
            accepted.append(earlier_mark(self._ready))
        if coded.mark not in accepted:
            if coded.mark[:4] == self._own[:4]:
                raise FileError(
                    f"{where} was coded with another codec: one of the same weights, whose layers"
                    " are of other types or settings"
                )
            raise FileError(
                f"{where} was coded with another codec (fingerprint {coded.mark.hex()}, this one"
                f" has {accepted[0].hex()}): decode with the codec that encoded it"
            )
        if coded.tables != self._tables:
            raise FileError(
                f"{where} was coded with other CDF tables than this codec has now: they were"
                " updated since, or made by other library versions or hardware; save the codec,"
                " and decode with that file"
            )

    def _decoded(self, coded: CodedImage, padded: Tensor, exact: bool) -> Tensor:
        """Decode the padded image, (1, 3, H, W)."""
        coder = self._coder(float64=coded.in_float64, everything=exact)
        if coder.failure is not None:
            raise coder.failure
        if coded.in_float64 and not coder.in_float64:
            raise FileError(
                "its entropy parameters are in float64, which this codec does not compute"
            )
        tiles = -(-padded.shape[-2] // coder.side), -(-padded.shape[-1] // coder.side)
        if not shape_fits(coded.shape, coder.shape, tiles):
            raise FileError(MISFIT)
        with (
            bounded_reads(2 * coder.symbols * tiles[0] * tiles[1]),
            recorded_symbols() as read,
            _point_kept(coder.model),
        ):
            x_hat = coder.decompress(coded.strings, coded.shape, padded)
        if coded.digest and read.digest(coded.strings) != coded.digest:
            raise FileError(OTHER_SYMBOLS)
        if x_hat.shape != padded.shape:
            raise ValueError(f"decoded {tuple(x_hat.shape)}, expected {tuple(padded.shape)}")
        if not bool(torch.isfinite(x_hat).all()):
            raise ValueError("decoded values that are not finite")
        return x_hat

    def _coder(self, *, float64: bool, everything: bool = False) -> Coder:
        """Return what codes in this precision.

        In float32 and channels_last, a 1x1 convolution takes the format of its input, which a
        context model's encoder and decoder build differently. With entropy parameters in float64,
        only one-sided modules are in float32.
        """
        key = float64, everything
        if key not in self._coders:
            model = copy_codec(self._ready)
            if float64:
                in_format(model, fast_format(model))
            point = first_point(model, self._target).keywords()
            coder = Coder(model, float64=float64, everything=everything, point=point)
            if not coder.in_float64:
                to_contiguous(model)
            self._coders[key] = coder
        return self._coders[key]


def _domains(codec: nn.Module) -> tuple[ImageCoder | None, str, OperatingPoint]:
    """Return what codes the source domain of an adapted codec, the name of its target domain, and
    the operating point of that; of other codecs nothing.
    """
    if isinstance(codec, Attached):
        for point in codec.operating_points():
            if point.domain is not None and (source := codec.bare_at(point)) is not None:
                other = next(p for p in codec.operating_points() if p != point)
                names: Any = codec.widths
                return ImageCoder(source), names.names[other.domain], other
    return None, "", EMPTY


@contextmanager
def _point_kept(model: Any) -> Iterator[None]:
    """Leave a codec with methods at the operating point that it has before."""
    before = [(choice, choice.now) for choice in getattr(model, "choices", ())]
    try:
        yield
    finally:
        for choice, now in before:
            choice.now = now


OTHER_SYMBOLS = (
    "decoded symbols differ from the encoder's: other software, CPU kernels, or a damaged codec"
)


def _without_digest(coded: CodedImage) -> str:
    made = (
        f"(format version {coded.version}) is of an earlier nicprune and"
        if coded.version < VERSION
        else "was coded by a codec with an entropy coder of its own and"
    )
    return (
        f"{made} carries no digest of its symbols: if it was coded with other software or CPU"
        " kernels, the picture may be wrong without an error"
    )


def shape_fits(shape: Any, usual: Any, tiles: tuple[int, int]) -> bool:
    """Return whether a codec may give a shape for an image of so many tiles, if it gives the usual
    one for a tile: height and width come last, and may be twice as large as they should be.
    """
    if isinstance(usual, Mapping):
        return (
            isinstance(shape, Mapping)
            and shape.keys() == usual.keys()
            and all(shape_fits(shape[key], usual[key], tiles) for key in usual)
        )
    if isinstance(usual, int):
        return isinstance(shape, int) and shape <= 2 * usual * max(tiles)
    if not isinstance(shape, (list, tuple)) or len(shape) != len(usual):
        return False
    if len(usual) >= 2 and all(isinstance(size, int) for size in (*usual, *shape)):
        bounds = [*usual[:-2], *(2 * u * n for u, n in zip(usual[-2:], tiles, strict=True))]
        return all(size <= bound for size, bound in zip(shape, bounds, strict=True))
    return all(shape_fits(one, other, tiles) for one, other in zip(shape, usual, strict=True))


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


def coding_copy(codec: nn.Module) -> Any:
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
