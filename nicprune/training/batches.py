"""Batches that a model learns from: of patches or clips, of which some are replayed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.common.errors import RecipeError
from nicprune.data.clip_patches import ClipPatches
from nicprune.data.clips import clips_in
from nicprune.data.images import list_images
from nicprune.data.moving_photographs import moving_photographs
from nicprune.data.patches import Batches, Patches, mix


def batches_of(
    model: nn.Module, train: str | Path | Sequence[str | Path], patch_size: int
) -> Batches:
    """Return the batches that a model learns from: of images, or of clips with a temporal model."""
    sampling = getattr(model, "sampling", None)
    if sampling is None:
        return Patches(train, patch_size)
    if sampling.clips == "photographs":
        made = moving_photographs(train, sampling.span, patch_size)
        return ClipPatches(made, patch_size, sampling)
    folders = [train] if isinstance(train, (str, Path)) else train
    clips = [clip for folder in folders for clip in clips_in(folder)]
    return ClipPatches(clips, patch_size, sampling)


def check_used(model: nn.Module, validation: Any, replay: Any) -> None:
    """Images beside those that are trained on must be there where a method looks at them, and only
    there.

    Raises:
        RecipeError: they are missing, or nothing would look at them.
        DataError: they are no images.
    """
    scheduled, share = getattr(model, "scheduled", False), getattr(model, "replay", 0.0)
    if scheduled and validation is None:
        raise RecipeError(
            "a schedule of lambdas needs validation images: fit(..., validation=folder)"
        )
    if share and replay is None:
        raise RecipeError(
            f"replay: {share:g} of each batch are images of the source domain: fit(...,"
            " replay=folder); in a recipe, photographs.replay"
        )
    for images, split in ((validation, "validation"), (replay, "train")):
        if images is not None:
            list_images(images, split)  # what is no list of images is told first
    if validation is not None and not scheduled:
        raise RecipeError(
            "validation: nothing here looks at these images: they are for the schedule of lambdas"
            " of a slimmable codec; to measure any codec, evaluate(codec, images)"
        )
    if replay is not None and not share:
        raise RecipeError(
            "replay: nothing here replays these images: they are for adaptations that replay some,"
            " attach(codec, 'adaptation', form='finetune_all', replay=0.5)"
        )


def with_replayed(
    batch: Tensor, source: Patches, share: float, step: int, seed: int, rank: int
) -> Tensor:
    """Replace the last patches of a batch by patches of source images: this share on average."""
    before, after = (int(n * share * len(batch)) for n in (step, step + 1))
    if after == before:
        return batch
    more = source.batch(after - before, seed=mix(seed, 1), step=step, rank=rank)
    return torch.cat([batch[: len(batch) - len(more)], more])
