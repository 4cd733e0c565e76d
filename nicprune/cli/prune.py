"""`nicprune prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nicprune.cli.options import Codec, Force, Metric, Quality, Weights, load_one


def prune_codec(
    codec: Codec,
    output: Annotated[Path, typer.Argument(help=".safetensors file to write.")],
    method: Annotated[
        str, typer.Option(help="A method without training: magnitude, random, fisher, netadapt.")
    ] = "magnitude",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of the method: key=value, e.g. budget.macs=0.5, side=encoder."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help=(
                "Calibration images, for fisher, netadapt and budget.split=auto: a folder, or"
                ' "samples".'
            )
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help=(
                "Backend whose times budget.encode_s and budget.decode_s limit: torch, openvino or"
                " onnxruntime."
            )
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Its precision: float32, bf16 or int8.", show_default="float32"),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Size of the image whose times they limit.", show_default="768x512"),
    ] = None,
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    force: Force = False,
) -> None:
    """Prune a codec in one shot, without training."""
    import torch

    from nicprune.codecs.copying import copy_codec
    from nicprune.codecs.example import size_multiple
    from nicprune.codecs.provenance import provenance
    from nicprune.common.config import apply_override
    from nicprune.common.errors import RecipeError
    from nicprune.common.files import check_output
    from nicprune.data.images import calibration_images
    from nicprune.methods import METHODS
    from nicprune.methods.attaching import attach
    from nicprune.pruning.cost import COUNTER, measure
    from nicprune.runtime.latency_refinement import refine_latency
    from nicprune.storage.checkpoint import check_destination, save

    check_destination(output)
    # A .safetensors file begins with the length of its header, which is JSON.
    check_output(output, [codec, weights], lambda start: start[8:9] == b"{", force=force)
    one_shot = [name for name in METHODS if METHODS[name].one_shot()]
    if method in METHODS and method not in one_shot:
        raise RecipeError(
            f"method {method!r} needs training: use it in a recipe (nicprune run), or attach and"
            f" fit in Python; without training go {', '.join(sorted(one_shot))}"
        )
    settings: dict[str, Any] = {}
    for override in set_ or []:
        apply_override(settings, override)
    torch.manual_seed(0)  # random weights are the same each time
    original = load_one(codec, quality, metric, weights)
    before = measure(original)
    table = _times(original, settings, backend, precision, size)
    multiple = size_multiple(original)
    calibration = calibration_images(images, multiple=multiple) if images is not None else None

    def attach_to(codec: Any, times: Any) -> Any:
        found = attach(codec, method, latency=times, **settings)
        if calibration is not None:
            if not found.examines_images:
                raise RecipeError(
                    f"method {method!r} looks at no images: leave out --images, or set"
                    " budget.split=auto"
                )
            found.prepare(calibration)
        return found

    if table is not None:
        table = refine_latency(
            original,
            table,
            lambda times: attach_to(copy_codec(original), times).keep(),
            norms=settings.get("norms", "pinned"),
            say=typer.echo,
        )
    attached = attach_to(original, table)
    small = attached.harden()
    told = _compared(attached) if table is not None else []
    after = measure(small)
    for side in ("macs", "encoder", "decoder"):
        was, now = before.kmac_per_pixel(side), after.kmac_per_pixel(side)
        typer.echo(
            f"{'all' if side == 'macs' else side:8} {was:9.2f} to {now:9.2f} kMAC/pixel,"
            f" {was / now:.2f}x fewer ({COUNTER})"
        )
    typer.echo(f"params   {before.params:,} to {after.params:,}; {provenance(small).verified}")
    for line in told:
        typer.echo(line)
    typer.echo(f"wrote {save(small, output)}")


def _times(
    codec: Any,
    settings: dict[str, Any],
    backend: str | None,
    precision: str | None,
    size: str | None,
) -> Any:
    """Return the codec's times where the budget limits them."""
    import re

    from nicprune.common.errors import RecipeError
    from nicprune.pruning.budget import TIMES
    from nicprune.runtime.latency import measure_latency

    budget = settings.get("budget")
    if not isinstance(budget, dict) or not set(TIMES) & budget.keys():
        given = {"--backend": backend, "--precision": precision, "--size": size}
        if unused := [option for option, value in given.items() if value is not None]:
            raise RecipeError(
                f"{unused[0]} is for budget.encode_s and budget.decode_s; set one of them"
            )
        return None
    size = "768x512" if size is None else size
    if not re.fullmatch(r"[1-9]\d{1,3}x[1-9]\d{1,3}", size):
        raise RecipeError(f"--size is width x height in pixels, 768x512 (got {size!r})")
    width, height = map(int, size.split("x"))
    return measure_latency(
        codec, backend or "torch", precision or "float32", size=(height, width), say=typer.echo
    )


def _compared(attached: Any) -> list[str]:
    """Return lines on the times of what is left, and on the MACs of equal time."""
    from nicprune.pruning.budget import TIMES
    from nicprune.runtime.equal_time import macs_of_equal_time

    cost = attached.cost
    totals, before = cost.totals(attached.keep()), cost.original
    lines = [f"times by {cost.table}:"]
    for name in TIMES:
        was, now = getattr(before, name), getattr(totals, name)
        lines.append(
            f"{name:8} {1000 * was:9.1f} to {1000 * now:9.1f} ms predicted, {now / was:.3f} of the"
            " original"
        )
    if (equal := macs_of_equal_time(attached)) is not None:
        (name, share), *_ = equal[0].parts().items()
        lines.append(f"as fast by a budget of MACs: budget.{name}={share:.3f}")
    return lines
