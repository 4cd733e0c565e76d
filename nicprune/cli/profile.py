"""`nicprune profile`."""

from __future__ import annotations

import typer

from nicprune.cli.options import Codec, Metric, Quality, Weights, load_one


def profile(
    codec: Codec, quality: Quality = None, weights: Weights = "official", metric: Metric = "mse"
) -> None:
    """Show a codec's channel groups and its cost.

    Lists the layers that each group couples, and MACs and parameters by transform, for encoder and
    decoder. Of a codec with methods on it, also its cost with them at each width, level or domain.
    """
    from nicprune.codecs.anatomy import unwrap
    from nicprune.evaluation.summary import methods_text, profile_text
    from nicprune.methods.composition import Attached
    from nicprune.pruning.cost import CostModel
    from nicprune.pruning.surgery import analyse

    loaded = load_one(codec, quality, metric, weights)
    model = unwrap(loaded)
    groups = analyse(model)
    typer.echo(profile_text(model, groups, CostModel(model, groups)))
    if isinstance(loaded, Attached):
        typer.echo(methods_text(loaded))
