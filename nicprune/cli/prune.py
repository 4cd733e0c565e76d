"""`nicprune prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nicprune.cli.options import Codec, Force, Metric, Quality, Weights


def prune_codec(
    codec: Codec,
    output: Annotated[Path, typer.Argument(help=".safetensors file to write.")],
    method: Annotated[
        str, typer.Option(help="A method that needs no training: magnitude, random, fisher.")
    ] = "magnitude",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of the method: key=value, e.g. budget.macs=0.5, side=encoder."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help='Calibration images, for fisher: a folder, or "samples".'),
    ] = None,
    quality: Quality = None,
    weights: Weights = "official",
    metric: Metric = "mse",
    force: Force = False,
) -> None:
    """Prune a codec in one shot, without training."""
    import torch

    from nicprune.codecs.provenance import provenance
    from nicprune.common.config import apply_override
    from nicprune.common.errors import RecipeError
    from nicprune.common.files import check_output
    from nicprune.data.images import calibration_images
    from nicprune.methods.composition import Attached, attach
    from nicprune.pruning.cost import COUNTER, measure
    from nicprune.storage.checkpoint import check_destination, load_codec, save

    check_destination(output)
    # A .safetensors file begins with the length of its header, which is JSON.
    check_output(output, [codec, weights], lambda start: start[8:9] == b"{", force=force)
    settings: dict[str, Any] = {}
    for override in set_ or []:
        apply_override(settings, override)
    torch.manual_seed(0)  # random weights are the same each time
    original = load_codec(codec, quality, metric=metric, weights=weights)
    before = measure(original)
    attached = attach(original, method, **settings)
    if images is not None:
        attached.prepare(calibration_images(images))
    small = attached.harden()
    if isinstance(small, Attached):
        raise RecipeError(
            f"{method} stays on the codec and has to be trained; use a recipe, or Python"
        )
    after = measure(small)
    for side in ("macs", "encoder", "decoder"):
        was, now = before.kmac_per_pixel(side), after.kmac_per_pixel(side)
        typer.echo(
            f"{'all' if side == 'macs' else side:8} {was:9.2f} to {now:9.2f} kMAC/pixel,"
            f" {was / now:.2f}x fewer ({COUNTER})"
        )
    typer.echo(f"params   {before.params:,} to {after.params:,}; {provenance(small).verified}")
    typer.echo(f"wrote {save(small, output)}")
