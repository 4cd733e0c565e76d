"""`nicprune eval`."""

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
    load_one,
    refuse,
)


def evaluate_codec(
    codec: Codec,
    images: Annotated[str, typer.Argument(help='Folder of images, a file, or "samples".')],
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write CompressAI results JSON here.")
    ] = None,
    level: Level = None,
    lmbda: Lmbda = None,
    width: Width = None,
    domain: Domain = None,
    per_image: Annotated[
        bool, typer.Option("--per-image", help="Print a line for each image.")
    ] = False,
    at: Annotated[
        list[float] | None,
        typer.Option(
            "--at",
            help="jpeg and webp: PSNR at this rate in bpp, interpolated between their settings.",
        ),
    ] = None,
    fast: Fast = False,
    max_pixels: MaxPixels = None,
    force: Force = False,
) -> None:
    """Evaluate a codec on real bitstreams.

    Codes and decodes every image: bpp, PSNR, MS-SSIM, times. The classical codecs "jpeg",
    "jpeg-optimized" and "webp" are evaluated at every setting.
    """
    from nicprune.common.errors import RecipeError
    from nicprune.common.files import check_output
    from nicprune.data.clips import VIDEO_SUFFIXES
    from nicprune.evaluation.classical import FORMATS

    if Path(images).suffix.lower() in VIDEO_SUFFIXES:
        raise RecipeError(f"{images} is a video: nicprune eval-video {images} --codec {codec}")
    if output is not None:
        check_output(
            output,
            [images, codec, weights],
            lambda start: all(key in start for key in (b'"name"', b'"description"', b'"results"')),
            force=force,
        )
    if codec in FORMATS:
        refuse(
            f"{codec}, which is evaluated at every setting,",
            {
                "--quality": quality,
                "--weights": None if weights == "official" else weights,
                "--metric": None if metric == "mse" else metric,
                "--level": level,
                "--lmbda": lmbda,
                "--width": width,
                "--domain": domain,
                "--fast": fast or None,
                "--per-image": per_image or None,
                "--output": output,
            },
        )
        _evaluate_classical(codec, images, at)
        return
    refuse(f"{codec}, which codes at its own rates,", {"--at": at})
    from nicprune.evaluation.evaluate import evaluate, write_results

    result = evaluate(
        load_one(codec, quality, metric, weights),
        images,
        progress=True,
        level=level,
        lmbda=lmbda,
        width=width,
        domain=domain,
        fast=fast,
    )
    if per_image:
        for image in result.images:
            ms = f"{image.ms_ssim:.4f}" if image.ms_ssim is not None else "-"
            typer.echo(
                f"{image.name:32} {image.width}x{image.height}  {image.bpp:.4f} bpp "
                f" {image.psnr_db:.3f} dB  MS-SSIM {ms}"
            )
    typer.echo(str(result))
    if output is not None:
        write_results(result, output)


def _evaluate_classical(name: str, images: str, at: list[float] | None) -> None:
    from nicprune.evaluation.classical import evaluate_classical, psnr_at

    points = evaluate_classical(name, images)
    for point in points if at is None else []:
        typer.echo(f"{name} quality {point.quality:3}  {point.bpp:.4f} bpp  {point.psnr_db:.3f} dB")
    for rate in at or []:
        psnr = psnr_at(points, rate)
        reach = f"its settings reach {points[0].bpp:.3f} to {points[-1].bpp:.3f} bpp"
        typer.echo(f"{name} at {rate:g} bpp: {reach if psnr is None else f'{psnr:.3f} dB'}")
