"""MACs and parameters of a codec in total, and their units."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nicprune.codecs.anatomy import SIZE_MULTIPLE

AREA = SIZE_MULTIPLE * SIZE_MULTIPLE
"""Pixels of the image that MACs are counted for."""


@dataclass(frozen=True)
class Totals:
    """Cost of a codec. MACs are per 64x64 pixels: all, when encoding, when decoding (shared parts
    count on both sides).
    """

    macs: int
    encoder: int
    decoder: int
    params: int

    def kmac_per_pixel(self, what: str = "macs") -> float:
        """Return kMAC per pixel of the image, for "macs", "encoder" or "decoder"."""
        return float(getattr(self, what) / AREA / 1000)

    def gmac(self, height: int = 512, width: int = 768, what: str = "macs") -> float:
        """Return GMAC for an image of this size (both sides multiples of 64)."""
        return float(getattr(self, what) * height * width / AREA / 1e9)

    def as_dict(self) -> dict[str, int]:
        """Return the four numbers by name."""
        return {field.name: getattr(self, field.name) for field in fields(Totals)}
