"""`nicprune profile`."""

from __future__ import annotations

import typer

from nicprune.cli.options import Codec, Metric, Quality, Weights, load_one


def profile(
    codec: Codec, quality: Quality = None, weights: Weights = "official", metric: Metric = "mse"
) -> None:
    """Show a codec's channel groups and its cost.

    Lists the layers that each group couples, and MACs and parameters by transform, for encoder and
    decoder.
    """
    from nicprune.codecs.anatomy import unwrap
    from nicprune.evaluation.summary import profile_text
    from nicprune.pruning.cost import CostModel
    from nicprune.pruning.surgery import analyse

    # A file may hold gates, a modulator or widths as well; the codec below them is described.
    model = unwrap(load_one(codec, quality, metric, weights))
    groups = analyse(model)
    typer.echo(profile_text(model, groups, CostModel(model, groups)))
