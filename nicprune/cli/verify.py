"""`nicprune verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from nicprune.cli.options import MaxPixels, Metric, Quality, Weights, load_one


def verify_files(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Codecs and adaptations (.safetensors), and images and videos that encode wrote."
        ),
    ],
    codec: Annotated[
        str | None,
        typer.Option(
            help="Codec of the coded images and videos: they are decoded, and their symbols"
            " compared with the encoder's. Of adaptations, the codec that they are loaded over."
        ),
    ] = None,
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    max_pixels: MaxPixels = None,
) -> None:
    """Say whether files are whole, and what made them.

    Exits with 1 if one of them is not.
    """
    from nicprune.common.errors import NicpruneError
    from nicprune.storage.verify import verify

    decoder = load_one(codec, quality, metric, weights) if codec else None
    failed = False
    for file in files:
        try:
            found = verify(file, decoder)
        except NicpruneError as error:
            typer.echo(f"nicprune: {error}", err=True)
            failed = True
        else:
            typer.echo(f"{file}: whole ({found.kind})\n{found}")
    if failed:
        raise typer.Exit(1)
