"""The settings of training, and the learning rate that they amount to at each step."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from nicprune.common.config import StrictConfig
from nicprune.common.errors import RecipeError
from nicprune.training.optimizers import MAX_PRECONDITIONED

LARGEST_LR = 1e6
"""No training survives it, and much larger ones are no float32."""


class TrainSettings(StrictConfig):
    """Settings of `fit`.

    Defaults are CompressAI's where it has one.

    Attributes:
        steps: number of training steps.
        lmbda: weight of the distortion; by default CompressAI's for the codec's quality.
        metric: distortion of the loss, "mse" or "ms-ssim"; by default the codec's.
        batch_size, patch_size: number of patches per step and device, and their side in pixels.
        optimizer: "adam", or "soap", which reaches the same loss several times faster (see
            `nicprune.training.optimizers`).
        max_precondition_dim: "soap" preconditions only the axes of a weight that have at most this
            length. Pointwise convolutions of several hundred channels cost less with 128.
        lr, aux_lr: learning rates of the network (by default the optimiser's) and of the entropy
            bottlenecks' quantiles.
        density_lr: learning rate of the densities of entropy bottlenecks, by Adam, on the schedule
            of `lr`; by default they learn with the network. From random weights, these start ten
            times too wide and take thousands of steps to fit z; 1e-2 fits them in a hundred.
        schedule, warmup: course of `lr` after a linear warm-up of `warmup` steps.
        clip: largest norm of the network's gradient.
        latents: what decoders and context models are given in training: "noisy" latents, as by
            CompressAI, or "rounded" ones, as in use (see `nicprune.training.rounded_latents`). The
            rate is that of noisy latents with both. Some codecs round theirs themselves, and those
            with a serial context model keep noisy y.
        precision: "32", "bf16", or "auto": bfloat16 where the device computes in it natively.
        channels_last: train in this memory format, which is faster on CPU. By default, so do all
            codecs whose code runs in it.
        seed: determines patches and quantisation noise.
        devices, accelerator: as in Lightning Fabric.
        checkpoint_every, log_every: steps between two checkpoints, and between two log entries.
        tensorboard: log to TensorBoard too, in `folder`.
        side: train only the layers that run when encoding alone ("encoder") or decoding alone
            ("decoder"), and freeze the others; "both" trains all. By default, the side that the
            attached methods declare; for a plain codec, the side of its last pruning.
    """

    steps: int = Field(ge=0)
    lmbda: float | None = Field(default=None, gt=0)
    metric: Literal["mse", "ms-ssim"] | None = None
    batch_size: int = Field(default=8, ge=1)
    patch_size: int = Field(default=256, ge=64)
    optimizer: Literal["adam", "soap"] = "adam"
    max_precondition_dim: int = Field(default=MAX_PRECONDITIONED, ge=1)
    lr: float | None = Field(default=None, gt=0, le=LARGEST_LR)
    aux_lr: float = Field(default=1e-3, gt=0, le=LARGEST_LR)
    density_lr: float | None = Field(default=None, gt=0, le=LARGEST_LR)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    latents: Literal["noisy", "rounded"] = "noisy"
    precision: Literal["auto", "32", "bf16"] = "auto"
    channels_last: bool = True
    seed: int = Field(default=0, ge=0, lt=2**63)
    devices: int = Field(default=1, ge=1)
    accelerator: str = "auto"
    checkpoint_every: int = Field(default=1000, ge=1)
    log_every: int = Field(default=50, ge=1)
    tensorboard: bool = False
    side: Literal["both", "encoder", "decoder"] | None = None

    @model_validator(mode="after")
    def _fits(self) -> TrainSettings:
        if self.patch_size % 64:
            raise ValueError(
                "patch_size must be a multiple of 64, the largest stride of CompressAI's codecs"
                f" (got {self.patch_size})"
            )
        if self.metric == "ms-ssim" and self.patch_size < 192:
            raise ValueError(
                "metric ms-ssim needs a patch_size of at least 192: five scales of an 11-pixel"
                " window"
            )
        return self


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Return the learning rate at `step` (from 0): linear warm-up, then the schedule down to
    zero.
    """
    peak = settings.lr
    assert peak is not None  # filled in by fit
    if step < settings.warmup:
        return peak * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return peak
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return peak * (
        0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    )


def check_patch_size(patch_size: int, multiple: int) -> None:
    """Raise RecipeError unless patches have sides that a codec takes."""
    if patch_size % multiple:
        raise RecipeError(
            f"patch_size must be a multiple of {multiple}, this codec's stride (got {patch_size})"
        )
