"""`nicprune time`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nicprune.cli.options import Fast, MaxPixels, Metric, Quality, Weights, refuse_for_files


def time_coding(
    codecs: Annotated[
        list[str],
        typer.Argument(
            help=(
                "Names, files, or package.module:factory, as [label=]codec[@width]; each is"
                " compared with the first."
            )
        ),
    ],
    image: Annotated[
        str | None, typer.Option(help="Image; by default one that the demo extra brings.")
    ] = None,
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    width: Annotated[
        int | None,
        typer.Option(
            help=(
                "Width (slimmable codecs) or level (scalable encoders) of codecs that are named"
                " without @width."
            )
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help=(
                "Time limit. On a machine that stays busy, the least disturbed measurements are"
                " taken after it."
            ),
        ),
    ] = 60.0,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show each layer of the transforms.")
    ] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Backend that runs the transforms: eager (PyTorch as it is), torch, openvino or"
                " onnxruntime. Repeat it to time each codec by several."
            )
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Precision of backends: float32, bf16 or int8. Repeat it to time several; a"
                " backend that lacks one is left out."
            )
        ),
    ] = None,
    fast: Fast = False,
    out: Annotated[
        str | None, typer.Option(help="Folder to write times.md, times.json and times.png into.")
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            help=(
                "Folder to write runtime.md, runtime.csv and runtime.json into: a row for each"
                " codec and backend. Codecs labelled family/name are compared with the first of"
                " their family."
            )
        ),
    ] = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Time the parts of coding an image.

    Shows the seconds of each transform, and the speed-up beside the FLOP reduction.
    """
    import shlex

    from nicprune.common.files import check_writable
    from nicprune.evaluation.times import Times, taken_under, times_table
    from nicprune.evaluation.transform_times import time_codecs
    from nicprune.report.runtime_table import FILES as RUNTIME_FILES
    from nicprune.report.runtime_table import runtime_rows, runtime_table, write_runtime
    from nicprune.report.times import FILES as TIMES_FILES
    from nicprune.report.times import write_times
    from nicprune.runtime.variants import EAGER, Variant, variants

    if out is not None:
        check_writable(out, TIMES_FILES)
    if report is not None:
        check_writable(report, RUNTIME_FILES)
    plain = _load(codecs, quality, metric, weights, width)
    if (backend, precision, report) == (None, None, None):
        times = time_codecs(plain, image, layers=layers, fast=fast, limit=seconds)
    else:
        ready = variants(
            plain, backend or [EAGER], precision or ["float32"], image=image, say=typer.echo
        )
        by_family: dict[str, dict[Variant, Any]] = {}
        for variant, codec in ready.items():
            by_family.setdefault(variant.family, {})[variant] = codec
        found: dict[Variant, Times] = {}
        for family in by_family.values():  # codecs of one family alternate
            named = {str(variant): codec for variant, codec in family.items()}
            timed = time_codecs(named, image, layers=layers, fast=fast, limit=seconds)
            found |= dict(zip(family, timed, strict=True))
        times = list(found.values())
    conditions = taken_under(times, Path(image).name if image else "a sample photograph", fast)
    command = shlex.join(["nicprune", *sys.argv[1:]])
    if report is not None:
        typer.echo(runtime_table(runtime_rows(found)) + f"\n\n{conditions}")
        where = write_runtime(found, report, conditions=conditions, command=command)
        typer.echo(f"\nwrote {where}")
    else:
        typer.echo(times_table(times, conditions))
    if out is not None:
        typer.echo(f"\nwrote {write_times(times, out, conditions=conditions, command=command)}")


def _load(
    codecs: list[str], quality: int | None, metric: str, weights: str, width: int | None
) -> dict[str, Any]:
    """Load codecs given as "[label=]codec[@width]", each at its width; return them by label."""
    from nicprune.common.errors import RecipeError
    from nicprune.evaluation.transform_times import Named
    from nicprune.storage.named import load_codec

    loaded: dict[str, Any] = {}
    named = [Named.read(text) for text in codecs]
    labels = [one.label for one in named]
    refuse_for_files([one.codec for one in named], quality, metric, weights)
    for number, (one, text) in enumerate(zip(named, codecs, strict=True), 1):
        # The same codec may be named twice: compared with itself, it shows the noise of such a
        # ratio on this machine.
        label = f"{one.label} ({number})" if labels.count(one.label) > 1 else one.label
        loaded[label] = load_codec(
            one.codec,
            quality,
            metric=metric,
            weights="official" if one.codec.endswith(".safetensors") else weights,
        )
        if getattr(loaded[label], "widths", None) is not None:
            loaded[label].set_width(width if one.width is None else one.width)
        elif one.width is not None:
            raise RecipeError(f"{text!r}: {one.codec} has no widths or levels")
    return loaded
