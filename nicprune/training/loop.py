"""The training loop: rate-distortion loss plus a method's terms, an auxiliary step, a schedule,
exact resumption.

`fit` sets up a run, `TrainingRun.advance` takes one step; the rest is bookkeeping.
"""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nicprune.codecs.anatomy import check_codec, unwrap
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.example import image_shape, size_multiple
from nicprune.codecs.memory_format import fast_format, to_contiguous
from nicprune.codecs.modes import modes_restored
from nicprune.codecs.provenance import provenance
from nicprune.codecs.replaced_forward import check_not_replaced
from nicprune.codecs.zoo import lmbda_of
from nicprune.common.config import parse
from nicprune.common.errors import CodecError, RecipeError, TrainingError
from nicprune.common.files import check_writable
from nicprune.common.lock import locked
from nicprune.common.progress import Progress
from nicprune.data.images import calibration_images, to_channels
from nicprune.data.patches import Patches
from nicprune.training.batches import batches_of, check_used, with_replayed
from nicprune.training.environment import make_fabric
from nicprune.training.interruption import deferred_signals
from nicprune.training.optimizers import DEFAULT_LR
from nicprune.training.precision import entropy_models_in_float32
from nicprune.training.rounded_latents import rounded_latents
from nicprune.training.run import TrainingRun
from nicprune.training.settings import TrainSettings, check_patch_size
from nicprune.training.trained_parameters import (
    check_float32,
    frozen,
    frozen_parameters,
    set_training,
)


@dataclass(frozen=True)
class FitResult:
    """Result of `fit`: the step that it ended at, the last logged metrics, the number of skipped
    steps, and the duration in seconds.
    """

    step: int
    metrics: dict[str, float]
    skipped: int
    seconds: float


def fit(
    model: nn.Module,
    train: str | Path | Sequence[str | Path],
    *,
    validation: str | Path | Sequence[str | Path] | None = None,
    replay: str | Path | Sequence[str | Path] | None = None,
    folder: str | Path | None = None,
    progress: bool | str = True,
    until_done: bool = False,
    **settings: Any,
) -> FitResult:
    """Train a codec, or a codec with methods attached, in place.

    Args:
        model: a `CompressionModel`, or what `attach` returned.
        train: folder(s) of images, or "samples". With a temporal model: folder(s) of clips.
        replay: images of the source domain, of which an adaptation replays some.
        validation: images that a schedule of lambdas decides by. Do not report results on these
            images.
        folder: folder for `checkpoint.pt` and `metrics.jsonl`, which one run at a time may use. A
            run that finds its checkpoint there resumes from it, whatever weights the model has by
            then; on CPU in float32, with the same number of threads, the result is bit-equal to
            that of an uninterrupted run. Ctrl-C and SIGTERM end the run after its current step,
            with a checkpoint. None: nothing is written.
        progress: show progress; a string is shown in front of it.
        until_done: stop as soon as every attached method is done, instead of after `steps` steps.
        settings: see `TrainSettings`.

    Raises:
        CodecError: not a codec, or not in float32.
        RecipeError: a setting is unknown, out of range, or of no use here; or the checkpoint
            belongs to a run of other settings, methods or images.
        DataError: no image is usable.
        FileError: the checkpoint is damaged, or cannot be written; or another process uses the
            folder.
        TrainingError: the loss stayed non-finite, or the codec cannot code images after training.
        InterruptedRun: Ctrl-C or SIGTERM stopped the run.
    """
    check_codec(unwrap(model))
    check_not_replaced(unwrap(model))
    check_float32(unwrap(model))
    # Iterators are looked at more than once.
    train = list(train) if isinstance(train, Iterator) else train
    validation = list(validation) if isinstance(validation, Iterator) else validation
    replay = list(replay) if isinstance(replay, Iterator) else replay
    check_used(model, validation, replay)
    options = parse(TrainSettings, settings, "fit(...)")
    metric = options.metric or provenance(unwrap(model)).metric
    if options.lmbda is not None and getattr(model, "own_lambdas", False):
        raise RecipeError("lmbda: the attached method trains by lambdas of its own: leave it out")
    if options.tensorboard and folder is None:
        raise RecipeError("tensorboard writes into the folder of the run: give folder=")
    lr = options.lr if options.lr is not None else DEFAULT_LR[options.optimizer]
    own: dict[str, Any] = {
        "metric": metric,
        "lmbda": lmbda_of(unwrap(model), options.lmbda, metric),
        "lr": lr,
    }
    if options.channels_last and fast_format(model) != torch.channels_last:
        if "channels_last" in settings:
            raise RecipeError(
                f"channels_last: the code of {type(unwrap(model)).__name__} does not run in this"
                " memory format, as x.view(...) may not: leave it out, or channels_last=False"
            )
        own["channels_last"] = False
    options = parse(TrainSettings, options.model_dump() | own, "fit(...)")
    attached: Any = model if model is not unwrap(model) else None
    if attached is not None:
        attached.set_objective(own["lmbda"], metric)
    channels, multiple = image_shape(unwrap(model))[0], size_multiple(unwrap(model))
    check_patch_size(options.patch_size, multiple)
    patches = batches_of(model, train, options.patch_size)
    share = getattr(model, "replay", 0.0)
    looked_at = (
        calibration_images(validation, multiple=multiple, split="validation")
        if validation is not None
        else []
    )
    replayed = Patches(replay, options.patch_size) if replay is not None else None
    if options.devices > 1 and getattr(model, "widths", None) is not None:
        raise TrainingError("slimmable codecs train on one device")
    if folder is not None:
        check_writable(folder)
    steps_left = getattr(model, "steps_left", 0)
    if steps_left > options.steps:
        warnings.warn(
            f"the method needs {steps_left} steps until it is done, and this run has"
            f" {options.steps}",
            stacklevel=2,
        )
    fabric = make_fabric(options)
    was_last = any(p.ndim == 4 and not p.is_contiguous() for p in unwrap(model).parameters())
    held = folder if fabric.is_global_zero else None
    with (
        frozen(frozen_parameters(model, options.side)),
        getattr(model, "gradients_kept", nullcontext)(),
        locked(held) if held is not None else nullcontext(),
    ):
        run = TrainingRun(
            model,
            options,
            fabric,
            Path(folder) if folder is not None else None,
            [patches] if replayed is None else [patches, replayed],
            looked_at,
        )
        label = progress if isinstance(progress, str) else ""
        bar = Progress(options.steps, label, enabled=bool(progress) and fabric.is_global_zero)
        started = time.monotonic()
        try:
            with ExitStack() as stack:
                # Several processes would stop at different steps, and wait for each other.
                asked = stack.enter_context(deferred_signals(enabled=options.devices == 1))
                stack.callback(bar.close)
                stack.callback(patches.close)
                if replayed is not None:
                    stack.callback(replayed.close)
                stack.enter_context(entropy_models_in_float32(model))
                if options.latents == "rounded":
                    stack.enter_context(rounded_latents(model))
                stack.enter_context(modes_restored(model))
                set_training(model, options.side)
                run.resume()
                bar.start(run.step)
                while run.step < options.steps and not (
                    until_done and run.attached is not None and run.attached.done
                ):
                    batch = patches.batch(
                        options.batch_size,
                        seed=options.seed,
                        step=run.step,
                        rank=fabric.global_rank,
                    )
                    if replayed is not None:
                        batch = with_replayed(
                            batch, replayed, share, run.step, options.seed, fabric.global_rank
                        )
                    figures = run.advance(to_channels(fabric.to_device(batch), channels))
                    if run.attached is not None and run.attached.wants_validation:
                        run.attached.validate([fabric.to_device(image) for image in looked_at])
                    ended = until_done and run.attached is not None and run.attached.done
                    if run.step % options.log_every == 0 or run.step == options.steps or ended:
                        bar.show(run.step, run.log(figures))
                    else:
                        bar.show(run.step)
                    if run.step % options.checkpoint_every == 0:
                        run.save()
                    if asked.signal is not None and run.step < options.steps:
                        run.save()
                        raise run.interrupted(asked.signal)
                run.save()
            if asked.signal is not None:
                raise run.interrupted(asked.signal)
        except KeyboardInterrupt:  # in the middle of a step, whose state is of no use
            raise run.interrupted(signal.SIGINT) from None
        finally:
            run.close()
            # The arithmetic stays the same to the bit, so that existing bitstreams still decode.
            if options.channels_last and not was_last:
                to_contiguous(run.codec)
        try:
            refresh_tables(model)
        except CodecError as error:
            told = f", the loss is {run.last['loss']:.4g}" if "loss" in run.last else ""
            raise TrainingError(
                f"training diverged: the codec cannot code images after step {run.step}{told}; use"
                f" a smaller lr (this was {lr:g}) or a longer warmup ({error})"
            ) from error
        return FitResult(run.step, run.last, run.skipped, time.monotonic() - started)
