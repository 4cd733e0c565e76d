"""The codecs that the runs of a recipe start from."""

from __future__ import annotations

import torch
from torch import nn

from nicprune.experiments.plan import Run
from nicprune.experiments.recipe import Recipe
from nicprune.storage.checkpoint import load_codec


def load_base_codec(recipe: Recipe, job: Run) -> nn.Module:
    """Return the codec that a run starts from; random weights are drawn with the run's seed."""
    torch.manual_seed(job.seed)
    return load_codec(
        recipe.codec, job.quality, metric=recipe.metric, weights=recipe.weights_for(job.quality)
    )


def architecture(recipe: Recipe, job: Run) -> nn.Module:
    """Return the codec that a run starts from, with any weights."""
    own = recipe.codec.endswith(".safetensors")  # the file holds the codec and its weights
    return load_base_codec(recipe if own else recipe.model_copy(update={"weights": "none"}), job)
