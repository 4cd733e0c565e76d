"""`nicprune export`."""

from __future__ import annotations

from typing import Annotated

import typer

from nicprune.cli.options import Codec, Force, Metric, Quality, Weights, load_one


def export(
    codec: Codec,
    output: Annotated[str, typer.Argument(help="File (compressai) or folder (onnx) to write.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="compressai (.pth.tar for stock tools) or onnx (one file per transform).",
        ),
    ] = "compressai",
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    force: Force = False,
) -> None:
    """Write a codec for other tools."""
    from nicprune.common.errors import RecipeError, closest
    from nicprune.common.files import check_output, check_writable
    from nicprune.storage.export import EXPORTED, export_compressai, export_onnx

    if format_ not in ("compressai", "onnx"):
        raise RecipeError(f"unknown format {format_!r}; {closest(format_, ['compressai', 'onnx'])}")
    if format_ == "compressai":
        # torch writes zip files of a pickle, under the name that it had then.
        check_output(
            output,
            [codec, weights],
            lambda start: start.startswith(b"PK") and b"/data.pkl" in start,
            force=force,
        )
        if output.endswith(".safetensors"):
            raise RecipeError(
                f"{output}: this format is torch's own, as CompressAI reads it: give it"
                " another ending, .pth.tar"
            )
    else:
        check_writable(output, [f"{name}.onnx" for name in EXPORTED])
    loaded = load_one(codec, quality, metric, weights)
    if format_ == "compressai":
        written = [export_compressai(loaded, output)]
    else:
        written = export_onnx(loaded, output, say=typer.echo)
    for path in written:
        typer.echo(f"wrote {path}")
