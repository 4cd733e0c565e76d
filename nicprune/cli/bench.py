"""`nicprune bench`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nicprune.cli.options import MaxPixels


def bench(
    what: Annotated[
        list[str] | None, typer.Argument(help="Parts to measure; all of them if not given.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help='decoding: folder of images, a file, or "samples".')
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "decoding: a codec, as [label=]codec[@quality]; those of the zoo get random"
                " weights."
            )
        ),
    ] = None,
    crop: Annotated[
        int | None, typer.Option(min=1, help="decoding: code a square of this side at the centre.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="decoding: pictures in float64 as well.")
    ] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "decoding: a backend that encodes too, and decodes what every other encoded: torch,"
                " openvino or onnxruntime."
            )
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="decoding: folder to write decoding.md and .json into.")
    ] = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Measure ratios on this machine.

    Among them: overhead of attaching, time of surgery, speed-up against FLOP reduction. "decoding"
    decodes images in other environments than they were encoded in: other CPU kernels, other numbers
    of threads. "coding" times entropy coding, part by part, by CompressAI's code and by nicprune's.
    """
    from nicprune.bench.suite import format_bench, run_bench
    from nicprune.common.errors import RecipeError

    if images or codec or crop or exact or backend or out:
        if what != ["decoding"]:
            raise RecipeError(
                "--images, --codec, --crop, --exact, --backend and --out are options of: nicprune"
                " bench decoding"
            )
        _bench_decoding(images or "samples", codec or [], crop, exact, backend or [], out)
        return
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or None
    typer.echo(format_bench(run_bench(what or None, threads=threads)))


def _bench_decoding(
    images: str,
    codecs: list[str],
    crop: int | None,
    exact: bool,
    backends: list[str],
    out: str | None,
) -> None:
    import shlex

    from nicprune.bench.decoding import (
        CODECS,
        FILES,
        measure_decoding,
        named_codec,
        write_decoding,
    )
    from nicprune.common.files import check_writable
    from nicprune.data.images import list_images, usable_images
    from nicprune.runtime.backends import BACKENDS

    if out is not None:
        check_writable(out, FILES)
    for name in backends:  # refused before anything is coded
        BACKENDS[name]().check("float32")
    named = [text.rpartition("=") for text in codecs or CODECS]
    labels = [label or Path(given).stem for label, _, given in named]
    chosen = {}
    for number, (label, (_, _, given)) in enumerate(zip(labels, named, strict=True), 1):
        name, _, quality = given.partition("@")
        made = named_codec(name, int(quality) if quality.isdecimal() else None)
        chosen[f"{label} ({number})" if labels.count(label) > 1 else label] = made
    report = measure_decoding(
        chosen,
        usable_images(list_images(images, "test")),
        crop=crop,
        exact=exact,
        backends=backends,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    typer.echo(report.table())
    if out is not None:
        command = shlex.join(["nicprune", *sys.argv[1:]])
        typer.echo(f"\nwrote {write_decoding(report, out, command)}")
