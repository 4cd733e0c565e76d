"""Tasks and results of the processes that `bench decoding` starts."""

from __future__ import annotations

from dataclasses import dataclass, field

FLOAT64, FLOAT32, EXACT = "float64", "float32", "exact"
"""Ways of coding: entropy parameters in float64 (the default) or float32 (`fast`); the picture in
float64 as well.
"""


@dataclass(frozen=True)
class Job:
    """The task of one process.

    Attributes:
        actions: "encode"; "reference", which decodes and keeps the pictures; or "decode", which
            compares with them.
        codecs: files of codecs, by label.
        images: image files.
        crop: side of the square at the centre that is coded; None for whole images.
        ways: some of `FLOAT64`, `FLOAT32`, `EXACT`.
        folder: for bitstreams and pictures.
        onednn: whether torch may use oneDNN.
        backends: backends that encode too, and that decode what the codec itself and each backend
            encoded.
    """

    actions: list[str]
    codecs: dict[str, str]
    images: list[str]
    crop: int | None
    ways: list[str]
    folder: str
    onednn: bool = True
    backends: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """One image, encoded or decoded.

    Attributes:
        seconds: CPU time of the process.
        size: of the coded image, in bytes.
        pixels: of the image.
        refused: the error, empty if there was none.
        differing, largest: number of values that differ from the reference's picture, and the
            largest difference, in levels of 256.
    """

    action: str
    codec: str
    image: str
    way: str
    seconds: float
    size: int = 0
    pixels: int = 0
    refused: str = ""
    differing: int = 0
    largest: int = 0
