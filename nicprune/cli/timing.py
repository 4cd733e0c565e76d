"""`nicprune time`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nicprune.cli.options import MaxPixels, Metric, Quality, Weights

EAGER = "eager"


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
        str, typer.Option(help="Precision of backends: float32, bf16 or int8.")
    ] = "float32",
    out: Annotated[
        str | None, typer.Option(help="Folder to write times.md, times.json and times.png into.")
    ] = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Time the parts of coding an image.

    Shows the seconds of each transform, and the speed-up beside the FLOP reduction.
    """
    import shlex

    from nicprune.evaluation.times import taken_under, times_table
    from nicprune.evaluation.transform_times import time_codecs
    from nicprune.report.times import write_times

    ready = _accelerated(
        _load(codecs, quality, metric, weights, width), backend or [EAGER], precision, image
    )
    times = time_codecs(ready, image, layers=layers, limit=seconds)
    conditions = taken_under(times, Path(image).name if image else "a sample photograph")
    typer.echo(times_table(times, conditions))
    if out is not None:
        command = shlex.join(["nicprune", *sys.argv[1:]])
        typer.echo(f"\nwrote {write_times(times, out, conditions=conditions, command=command)}")


def _accelerated(
    codecs: dict[str, Any], backends: list[str], precision: str, image: str | None
) -> dict[str, Any]:
    """Return each codec by each backend, those of the first backend first."""
    from nicprune.common.errors import RecipeError
    from nicprune.data.images import calibration_images
    from nicprune.runtime.accelerate import accelerate

    if backends == [EAGER]:
        if precision != "float32":
            raise RecipeError(f"precision {precision!r} needs a --backend other than eager")
        return codecs
    ranges = []
    if precision == "int8":
        ranges = [x[0].mul(255).round().byte() for x in calibration_images("samples")]
    found = {}
    for backend in dict.fromkeys(backends):
        for label, codec in codecs.items():
            if backend == EAGER:
                found[f"{label}, {EAGER}"] = codec
                continue
            plain = codec
            if getattr(codec, "widths", None) is not None:
                plain = codec.extract(codec.point().width)
            fast = accelerate(plain, backend, precision, image=image, calibration=ranges)
            found[f"{label}, {backend}"] = fast
            typer.echo(f"{label}: {fast.acceleration}\n")
    return found


def _load(
    codecs: list[str], quality: int | None, metric: str, weights: str, width: int | None
) -> dict[str, Any]:
    """Load codecs given as "[label=]codec[@width]", each at its width; return them by label."""
    from nicprune.common.errors import RecipeError
    from nicprune.evaluation.transform_times import Named
    from nicprune.storage.checkpoint import load_codec

    loaded: dict[str, Any] = {}
    named = [Named.read(text) for text in codecs]
    labels = [one.label for one in named]
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
