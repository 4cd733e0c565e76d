"""`nicprune encode` and `nicprune decode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nicprune.cli.options import (
    Backend,
    Codec,
    Domain,
    Fast,
    Force,
    Frames,
    FrameSize,
    Gop,
    Level,
    Lmbda,
    MaxPixels,
    Metric,
    Quality,
    Weights,
    Width,
    load_one,
    refuse,
)


def encode_image(
    codec: Codec,
    image: Annotated[
        str, typer.Argument(help="Image file; or a video file or a folder of frames, for a .npv.")
    ],
    output: Annotated[Path, typer.Argument(help="File to write; .npv for a video.")],
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    level: Level = None,
    lmbda: Lmbda = None,
    width: Width = None,
    domain: Domain = None,
    fast: Fast = False,
    backend: Backend = None,
    gop: Gop = None,
    frames: Frames = None,
    size: FrameSize = None,
    max_pixels: MaxPixels = None,
    force: Force = False,
) -> None:
    """Encode an image or a video into a file.

    The same codec decodes it (see decode). What ends in .npv is a video.
    """
    if output.suffix.lower() == ".npv":
        from nicprune.cli.video_coding import encode_clip

        refuse(
            "coding a video",
            {
                "--level": level,
                "--lmbda": lmbda,
                "--domain": domain,
                "--fast": fast or None,
                "--backend": backend,
            },
        )
        named = (codec, quality, metric, weights)
        encode_clip(
            named, image, output, width=width, gop=gop, frames=frames, size=size, force=force
        )
        return
    refuse("coding an image", {"--gop": gop, "--frames": frames, "--size": size})
    from nicprune.common.errors import RecipeError
    from nicprune.common.files import check_output, write_atomically
    from nicprune.data.clips import is_clip
    from nicprune.data.images import SUFFIXES, is_transparent, read_image
    from nicprune.storage.coded_image import MAGIC
    from nicprune.storage.container import encode

    if is_clip(image):
        raise RecipeError(f"{image} is a video or a folder: encode it into a .npv (got {output})")
    if weights == "none":
        raise RecipeError("encode needs trained weights: no other run would decode random ones")
    check_output(
        output, [image, codec, weights], lambda start: start.startswith(MAGIC), force=force
    )
    if output.suffix.lower() in SUFFIXES and not force and not output.exists():
        raise RecipeError(
            f"encode writes no picture: name another ending than {output.suffix}, or --force it"
        )
    picture = read_image(image)
    data = encode(
        _by(backend, load_one(codec, quality, metric, weights)),
        picture,
        level=level,
        lmbda=lmbda,
        width=width,
        domain=domain,
        fast=fast,
    )
    write_atomically(output, lambda temporary: temporary.write_bytes(data))
    _, height, columns = picture.shape
    opaque = "" if not is_transparent(image) else "; its transparency is left out"
    typer.echo(
        f"{output}: {len(data):,} bytes, {8 * len(data) / (height * columns):.4f} bpp, header"
        f" included ({columns}x{height} pixels{opaque})"
    )


def decode_file(
    codec: Annotated[
        str,
        typer.Argument(
            help="The codec that encoded the file: name, file, or package.module:factory."
        ),
    ],
    file: Annotated[str, typer.Argument(help="File that encode wrote.")],
    output: Annotated[
        Path,
        typer.Argument(help="PNG to write; of a video a folder (PNG frames), a .y4m or a .mp4."),
    ],
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
    backend: Backend = None,
    max_pixels: MaxPixels = None,
    force: Force = False,
) -> None:
    """Decode a file that encode wrote: an image into a PNG, a video into frames.

    Ends with an error if the symbols decoded are not those that were encoded. Of a damaged video
    the frames before the damage are written.
    """
    if Path(file).suffix.lower() == ".npv":
        from nicprune.cli.video_coding import decode_clip

        refuse("decoding a video", {"--exact": exact or None, "--backend": backend})
        decode_clip((codec, quality, metric, weights), file, output, force=force)
        return
    from nicprune.common.errors import RecipeError
    from nicprune.common.files import check_output
    from nicprune.data.images import is_own_png, write_png
    from nicprune.storage.container import decode

    if output.suffix.lower() != ".png":
        raise RecipeError(f"decode writes PNG; {output} must end in .png")
    check_output(output, [file, codec, weights], is_own_png, force=force)
    loaded = _by(backend, load_one(codec, quality, metric, weights))
    picture = decode(loaded, file, exact=exact)
    write_png(picture.float() / 255, output)
    typer.echo(f"wrote {output} ({picture.shape[2]}x{picture.shape[1]} pixels)")


def _by(backend: str | None, codec: Any) -> Any:
    """Return a codec run by a backend, if one is named."""
    if backend is None:
        return codec
    from nicprune.runtime.accelerate import accelerate

    return accelerate(codec, backend)
