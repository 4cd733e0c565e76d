"""File format of one coded image: what `compress` returns, the size of the image, and which codec
can decode it.

    magic (4) | version (1) | fingerprint of the codec (8) | CRC-32 of its CDF tables (4)
    | flags (1) | digest of the symbols (8) | width, height, shape, strings
    | CRC-32 of all before (4)

The fingerprint is that of the weights; since version 2 its second half is combined (exclusive or)
with the CRC-32 of the layers' types and settings. Flags and digest came with version 3. Width,
height, shape and strings are stored as `values`.

An image of an adapted codec's target domain has version 4: behind the strings, a table with the
name of the domain and the fingerprint of the source codec. One of the source domain is what the
source codec writes, of version 3.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nicprune.codecs.rans import DIGEST_BYTES
from nicprune.common.errors import DataError, FileError
from nicprune.common.files import check_regular
from nicprune.data.images import check_size
from nicprune.storage.values import MISFIT, pack, unpack_all

MAGIC, VERSION, DOMAIN_VERSION = b"\x8bNIC", 3, 4
"""The first byte is not ASCII, so that no text is taken for an image."""

EARLIER = struct.Struct(">4sB8sI")
"""Header of versions 1 and 2."""

HEADER = struct.Struct(f">4sB8sIB{DIGEST_BYTES}s")

DOMAIN, SOURCE = "domain", "source"
"""Keys of the table of an adapted codec."""

IN_FLOAT64, HAS_DIGEST = 1, 2
"""Flags: entropy parameters are computed in float64; the symbols have a digest."""


@dataclass(frozen=True)
class CodedImage:
    """A coded image as it is stored.

    Attributes:
        version: of the format.
        mark: which codec decodes it; see `identity.mark`.
        tables: CRC-32 of the codec's CDF tables.
        in_float64: whether its entropy parameters are computed in float64.
        digest: of its symbols; empty if it carries none.
        width, height: in pixels.
        shape, strings: what `compress` returned.
        domain: of an adapted codec, for which it was written; empty for a codec with none.
        source: which codec was adapted; see `identity.mark`.
    """

    version: int
    mark: bytes
    tables: int
    in_float64: bool
    digest: bytes
    width: int
    height: int
    shape: Any
    strings: Any
    domain: str = ""
    source: bytes = b""

    @classmethod
    def parse(cls, data: bytes, where: str) -> CodedImage:
        """Read what `encode` wrote.

        Args:
            data: the whole file.
            where: its name for messages.

        Raises:
            FileError: the data are damaged, not made by `encode`, or the image is larger than
                `max_pixels`.
        """
        if not data.startswith(MAGIC):
            raise FileError(
                f"{where} is {'empty' if not data else 'not an image that nicprune encoded'}"
            )
        version = data[len(MAGIC)] if len(data) > len(MAGIC) else 0
        if version > DOMAIN_VERSION:
            raise FileError(
                f"{where} has format version {version}; this nicprune reads up to {DOMAIN_VERSION}:"
                " pip install --upgrade nicprune"
            )
        header = HEADER if version >= 3 else EARLIER
        if len(data) < header.size + 4 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "big"):
            raise FileError(f"{where} is damaged or cut short: its checksum does not fit")
        _, _, codec, tables_, *later = header.unpack_from(data)
        flags, digest = later or (0, b"")
        try:
            has_domain = version >= DOMAIN_VERSION
            width, height, shape, strings, *told = unpack_all(
                data[header.size : -4], 4 + has_domain
            )
            domain, source = _domain_of(told[0]) if told else ("", b"")
            if not isinstance(width, int) or not isinstance(height, int) or not width * height:
                raise FileError(MISFIT)
            check_size(width, height, "the image")
        except (DataError, FileError) as error:
            raise FileError(f"{where} cannot be decoded here: {error}") from None
        return cls(
            version,
            codec,
            tables_,
            bool(flags & IN_FLOAT64),
            digest if flags & HAS_DIGEST else b"",
            width,
            height,
            shape,
            strings,
            domain,
            source,
        )

    def __bytes__(self) -> bytes:
        flags = IN_FLOAT64 * self.in_float64 | HAS_DIGEST * bool(self.digest)
        version = DOMAIN_VERSION if self.domain else VERSION
        header = HEADER.pack(MAGIC, version, self.mark, self.tables, flags, self.digest)
        values: list[Any] = [self.width, self.height, self.shape, self.strings]
        if self.domain:
            values.append({DOMAIN: self.domain.encode(), SOURCE: self.source})
        data = header + b"".join(map(pack, values))
        return data + zlib.crc32(data).to_bytes(4, "big")


def _domain_of(told: Any) -> tuple[str, bytes]:
    """Return the domain and the source codec that a table names.

    Raises:
        FileError: it does not.
    """
    name, source = (told.get(DOMAIN), told.get(SOURCE)) if isinstance(told, dict) else (0, 0)
    if not isinstance(name, bytes) or not isinstance(source, bytes) or len(source) != 8:
        raise FileError(MISFIT)
    domain = name.decode(errors="replace")
    if not domain or not domain.isprintable() or len(domain) > 64:
        raise FileError(MISFIT)
    return domain, source


def read_coded(data: bytes | str | Path) -> tuple[CodedImage, str]:
    """Read a coded image; return it and its name for messages.

    Raises:
        FileError: see `CodedImage.parse`; or the file cannot be read.
    """
    where = "this bitstream" if isinstance(data, bytes) else str(data)
    if not isinstance(data, bytes):
        try:
            data = check_regular(data).read_bytes()
        except OSError as error:
            raise FileError(f"cannot read {where}: {error.strerror or error}") from None
    return CodedImage.parse(data, where), where
