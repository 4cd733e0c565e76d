"""`nicprune encode` and `nicprune decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nicprune.cli.options import (
    Codec,
    Domain,
    Fast,
    Force,
    Level,
    Lmbda,
    MaxPixels,
    Metric,
    Quality,
    Weights,
    Width,
)


def encode_image(
    codec: Codec,
    image: Annotated[str, typer.Argument(help="Image file.")],
    output: Annotated[Path, typer.Argument(help="File to write.")],
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    level: Level = None,
    lmbda: Lmbda = None,
    width: Width = None,
    domain: Domain = None,
    fast: Fast = False,
    max_pixels: MaxPixels = None,
    force: Force = False,
) -> None:
    """Encode an image into a file.

    The same codec decodes it (see decode).
    """
    from nicprune.common.files import check_output, write_atomically
    from nicprune.data.images import read_image
    from nicprune.storage.checkpoint import load_codec
    from nicprune.storage.coded_image import MAGIC
    from nicprune.storage.container import encode

    check_output(
        output, [image, codec, weights], lambda start: start.startswith(MAGIC), force=force
    )
    picture = read_image(image)
    data = encode(
        load_codec(codec, quality, metric=metric, weights=weights),
        picture,
        level=level,
        lmbda=lmbda,
        width=width,
        domain=domain,
        fast=fast,
    )
    write_atomically(output, lambda temporary: temporary.write_bytes(data))
    _, height, columns = picture.shape
    typer.echo(
        f"{output}: {len(data):,} bytes, {8 * len(data) / (height * columns):.4f} bpp, header"
        f" included ({columns}x{height} pixels)"
    )


def decode_file(
    codec: Annotated[
        str,
        typer.Argument(
            help="The codec that encoded the file: name, file, or package.module:factory."
        ),
    ],
    file: Annotated[str, typer.Argument(help="File that encode wrote.")],
    output: Annotated[Path, typer.Argument(help="PNG to write.")],
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Compute the picture in float64: the same to the bit everywhere, but slower.",
        ),
    ] = False,
    max_pixels: MaxPixels = None,
    force: Force = False,
) -> None:
    """Decode a file that encode wrote into a PNG.

    Ends with an error if the symbols decoded are not those that were encoded.
    """
    from nicprune.common.errors import RecipeError
    from nicprune.common.files import check_output
    from nicprune.data.images import write_png
    from nicprune.storage.checkpoint import load_codec
    from nicprune.storage.container import decode

    if output.suffix.lower() != ".png":
        raise RecipeError(f"decode writes PNG; {output} must end in .png")
    check_output(
        output, [file, codec, weights], lambda start: start.startswith(b"\x89PNG"), force=force
    )
    picture = decode(load_codec(codec, quality, metric=metric, weights=weights), file, exact=exact)
    write_png(picture.float() / 255, output)
    typer.echo(f"wrote {output} ({picture.shape[2]}x{picture.shape[1]} pixels)")
