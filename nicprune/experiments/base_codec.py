"""The codecs that the runs of a recipe start from."""

from __future__ import annotations

import torch
from torch import nn

from nicprune.codecs.provenance import provenance
from nicprune.codecs.roles import ANALYSIS, SYNTHESIS
from nicprune.codecs.zoo import DEMO
from nicprune.common.files import expand
from nicprune.experiments.plan import Run
from nicprune.experiments.recipe import Recipe
from nicprune.storage.checkpoint import load
from nicprune.storage.named import load_codec
from nicprune.storage.state import fill


def load_base_codec(recipe: Recipe, job: Run) -> nn.Module:
    """Return the codec that a run starts from; random weights are drawn with the run's seed."""
    torch.manual_seed(job.seed)
    codec = load_codec(
        recipe.codec, job.quality, metric=recipe.metric, weights=recipe.weights_for(job.quality)
    )
    # A codec given as a file or a factory says its own; what is trained, pruned and measured by is
    # the recipe's.
    provenance(codec).metric = recipe.metric
    transforms = recipe.transforms_for(job.quality)
    if transforms is not None and recipe.before(job.quality) is None:
        take_transforms(codec, transforms, job.quality)
    return codec


def take_transforms(codec: nn.Module, path: str, quality: int) -> None:
    """Copy g_a and g_s of the codec in a file into `codec`, at the file's widths.

    Args:
        path: the file, or the embedded codec's name.
        quality: that of the embedded codec.

    Raises:
        CodecError: the embedded codec has no such quality.
        FileError: the file cannot be read, or its transforms do not fit.
    """

    def is_transform(key: str) -> bool:
        return key.split(".", 1)[0] in (ANALYSIS, SYNTHESIS)

    source = load_codec(DEMO, quality) if path == DEMO else load(expand(path))
    own, other = codec.state_dict(), source.state_dict()
    state = {k: v for k, v in own.items() if not is_transform(k)}
    fill(codec, state | {k: v for k, v in other.items() if is_transform(k)}, path)


def architecture(recipe: Recipe, job: Run) -> nn.Module:
    """Return the codec that a run starts from, with any weights."""
    own = recipe.codec.endswith(".safetensors")  # the file holds the codec and its weights
    return load_base_codec(
        recipe if own else recipe.model_copy(update={"weights": "none", "transforms": None}), job
    )
