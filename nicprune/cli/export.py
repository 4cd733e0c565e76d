"""`nicprune export`."""

from __future__ import annotations

from typing import Annotated

import typer

from nicprune.cli.options import Force


def export(
    file: Annotated[str, typer.Argument(help="A .safetensors file that nicprune saved.")],
    output: Annotated[str, typer.Argument(help="File (compressai) or folder (onnx) to write.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="compressai (.pth.tar for stock tools) or onnx (one file per transform).",
        ),
    ] = "compressai",
    force: Force = False,
) -> None:
    """Write a codec for other tools."""
    from nicprune.common.errors import RecipeError, closest
    from nicprune.common.files import check_output
    from nicprune.storage.checkpoint import load
    from nicprune.storage.export import export_compressai, export_onnx

    if format_ not in ("compressai", "onnx"):
        raise RecipeError(f"unknown format {format_!r}; {closest(format_, ['compressai', 'onnx'])}")
    if format_ == "compressai":
        # torch writes zip files of a pickle, under the name that it had then.
        check_output(
            output,
            [file],
            lambda start: start.startswith(b"PK") and b"/data.pkl" in start,
            force=force,
        )
    codec = load(file)
    if format_ == "compressai":
        written = [export_compressai(codec, output)]
    else:
        written = export_onnx(codec, output, say=typer.echo)
    for path in written:
        typer.echo(f"wrote {path}")
