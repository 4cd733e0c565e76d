"""The training loop: rate-distortion loss plus a method's terms, an auxiliary step, a schedule,
exact resumption.

`fit` sets up a run, `_Run.advance` takes one step; the rest is bookkeeping.
"""

from __future__ import annotations

import json
import math
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pydantic import Field, model_validator
from torch import Tensor, nn

from nicprune.codecs.anatomy import CDF_BUFFERS, check_codec, rate_distortion_loss, unwrap
from nicprune.codecs.calling import further_arguments
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.example import image_shape, size_multiple
from nicprune.codecs.kernel_faults import strided_pointwise_by_slicing
from nicprune.codecs.layer_kinds.entropy import is_quantile
from nicprune.codecs.memory_format import to_channels_last, to_contiguous
from nicprune.codecs.provenance import provenance
from nicprune.codecs.replaced_forward import check_not_replaced
from nicprune.codecs.roles import on_side
from nicprune.codecs.zoo import lmbda_of
from nicprune.common.config import StrictConfig, cut, parse
from nicprune.common.errors import (
    CodecError,
    FileError,
    InterruptedRun,
    RecipeError,
    TrainingError,
)
from nicprune.common.files import append_line, check_writable, write_atomically
from nicprune.common.lock import locked
from nicprune.common.machine import memory_bytes
from nicprune.common.progress import Progress
from nicprune.data.clip_patches import ClipPatches
from nicprune.data.clips import clips_in
from nicprune.data.images import calibration_images, list_images, to_channels
from nicprune.data.moving_photographs import moving_photographs
from nicprune.data.patches import Batches, Patches, mix
from nicprune.training.checkpoints import Checkpoints
from nicprune.training.interruption import deferred_signals
from nicprune.training.optimizers import DEFAULT_LR, MAX_PRECONDITIONED, make_optimizer
from nicprune.training.precision import autocast_dtype, entropy_models_in_float32
from nicprune.training.rounded_latents import rounded_latents

MAX_SKIPPED = 20
"""Largest number of consecutive steps that are skipped because their gradient is not finite."""


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
        schedule, warmup: course of `lr` after a linear warm-up of `warmup` steps.
        clip: largest norm of the network's gradient.
        latents: what decoders and context models are given in training: "noisy" latents, as by
            CompressAI, or "rounded" ones, as in use (see `nicprune.training.rounded_latents`). The
            rate is that of noisy latents with both. Some codecs round theirs themselves, and those
            with a serial context model keep noisy y.
        precision: "32", "bf16", or "auto": bfloat16 where the device computes in it natively.
        channels_last: train in this memory format, which is faster on CPU.
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


@dataclass(frozen=True)
class FitResult:
    """Result of `fit`: the step that it ended at, the last logged metrics, the number of skipped
    steps, and the duration in seconds.
    """

    step: int
    metrics: dict[str, float]
    skipped: int
    seconds: float


def _target(settings: TrainSettings) -> tuple[float, str]:
    """Return lambda and metric, which `fit` has filled in."""
    assert settings.lmbda is not None and settings.metric is not None
    return settings.lmbda, settings.metric


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


def split_parameters(codec: nn.Module, model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split trainable parameters into the network's and the entropy bottlenecks' quantiles, as
    CompressAI does.
    """
    apart = {id(p) for name, p in model.named_parameters() if is_quantile(name)}
    own = {id(p) for p in model.manually_updated()} if hasattr(model, "manually_updated") else set()
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    return [p for p in trainable if id(p) not in apart], [p for p in trainable if id(p) in apart]


def frozen_parameters(model: nn.Module, side: str | None) -> list[nn.Parameter]:
    """Return the parameters that are not trained: the codec's by `TrainSettings.side`, and what
    methods freeze.
    """
    codec = unwrap(model)
    attached: Any = model if getattr(model, "pending", False) else None
    history = provenance(codec).history
    if side is None and attached is None and history:
        side = history[-1].get("side")
    one_side = side if side != "both" else None
    own = [
        p
        for name, p in codec.named_parameters()
        if not (
            on_side(codec, name, one_side)
            and (side == "both" or attached is None or attached.trains(name))
        )
    ]
    return own if attached is None else own + attached.frozen()


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Disable the gradients of these parameters inside the block."""
    changed = [p for p in parameters if p.requires_grad]
    try:
        for parameter in changed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


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
            run that finds its checkpoint there resumes from it; on CPU in float32, with the same
            number of threads, the result is bit-equal to that of an uninterrupted run. Ctrl-C and
            SIGTERM end the run after its current step, with a checkpoint. None: nothing is
            written.
        progress: show progress; a string is shown in front of it.
        until_done: stop as soon as every attached method is done, instead of after `steps` steps.
        settings: see `TrainSettings`.

    Raises:
        CodecError: not a codec.
        RecipeError: a setting is unknown or out of range.
        DataError: no image is usable.
        FileError: the checkpoint belongs to another run, is damaged, or cannot be written; or
            another process uses the folder.
        TrainingError: the loss stayed non-finite, or the codec cannot code images after training.
        InterruptedRun: Ctrl-C or SIGTERM stopped the run.
    """
    check_codec(unwrap(model))
    check_not_replaced(unwrap(model))
    _check_used(model, validation, replay)
    options = parse(TrainSettings, settings, "fit(...)")
    metric = options.metric or provenance(unwrap(model)).metric
    lr = options.lr if options.lr is not None else DEFAULT_LR[options.optimizer]
    own = {"metric": metric, "lmbda": lmbda_of(unwrap(model), options.lmbda, metric), "lr": lr}
    options = parse(TrainSettings, options.model_dump() | own, "fit(...)")
    channels, multiple = image_shape(unwrap(model))[0], size_multiple(unwrap(model))
    check_patch_size(options.patch_size, multiple)
    patches = _batches(model, train, options.patch_size)
    share = getattr(model, "replay", 0.0)
    looked_at = calibration_images(validation, multiple=multiple) if validation is not None else []
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
    fabric = _fabric(options)
    was_last = any(p.ndim == 4 and not p.is_contiguous() for p in unwrap(model).parameters())
    held = folder if fabric.is_global_zero else None
    with (
        frozen(frozen_parameters(model, options.side)),
        getattr(model, "gradients_kept", nullcontext)(),
        locked(held) if held is not None else nullcontext(),
    ):
        run = _Run(
            model,
            options,
            fabric,
            Path(folder) if folder is not None else None,
            [patches] if replayed is None else [patches, replayed],
        )
        label = progress if isinstance(progress, str) else ""
        was_training = model.training
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
                stack.enter_context(strided_pointwise_by_slicing(model))
                if options.latents == "rounded":
                    stack.enter_context(rounded_latents(model))
                model.train()
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
                        batch = _with_replayed(batch, replayed, share, run.step, options, fabric)
                    figures = run.advance(to_channels(fabric.to_device(batch), channels))
                    if run.attached is not None and run.attached.wants_validation:
                        run.attached.validate([fabric.to_device(image) for image in looked_at])
                    if run.step % options.log_every == 0 or run.step == options.steps:
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
            model.train(was_training)
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


def _batches(
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


def _check_used(model: nn.Module, validation: Any, replay: Any) -> None:
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
    for images in (validation, replay):
        if images is not None:
            list_images(images, "train")  # what is no list of images is told first
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


def _with_replayed(
    batch: Tensor, source: Patches, share: float, step: int, options: TrainSettings, fabric: Fabric
) -> Tensor:
    """Replace the last patches of a batch by patches of source images: this share on average."""
    before, after = (int(n * share * len(batch)) for n in (step, step + 1))
    if after == before:
        return batch
    seed = mix(options.seed, 1)
    more = source.batch(after - before, seed=seed, step=step, rank=fabric.global_rank)
    return torch.cat([batch[: len(batch) - len(more)], more])


def check_patch_size(patch_size: int, multiple: int) -> None:
    """Raise RecipeError unless patches have sides that a codec takes."""
    if patch_size % multiple:
        raise RecipeError(
            f"patch_size must be a multiple of {multiple}, this codec's stride (got {patch_size})"
        )


def check_environment(options: TrainSettings) -> None:
    """Raise unless this machine has the devices and packages that training needs.

    Raises:
        TrainingError: the accelerator is unknown or missing, TensorBoard is not installed, or a
            batch alone takes more memory than there is.
    """
    if options.devices == 1:  # several are started as processes
        _fabric(options)
    batch = 4 * 3 * options.batch_size * options.patch_size**2
    if batch > (memory := memory_bytes()):
        raise TrainingError(
            f"a batch of {options.batch_size} patches of {options.patch_size} pixels square takes"
            f" {batch / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f}"
        )
    if options.tensorboard:
        _summary_writer()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError("tensorboard is not installed: pip install 'nicprune[track]'") from None
    return SummaryWriter


def _fabric(options: TrainSettings) -> Fabric:
    try:
        fabric = Fabric(
            accelerator=options.accelerator,
            devices=options.devices,
            strategy="ddp" if options.devices > 1 else "auto",
        )
        if options.devices > 1:
            fabric.launch()
    except (RuntimeError, ValueError, ImportError, MisconfigurationException) as error:
        raise TrainingError(
            f"cannot train on {options.devices} x {options.accelerator!r}:"
            f" {str(error).splitlines()[0]}"
        ) from None
    return fabric


class _Run:
    """State of one `fit`: model, optimisers, step."""

    def __init__(
        self,
        model: nn.Module,
        options: TrainSettings,
        fabric: Fabric,
        folder: Path | None,
        drawn_from: Sequence[Batches],
    ):
        self.options, self.fabric, self.folder = options, fabric, folder
        self.checkpoints = Checkpoints(folder) if folder is not None else None
        self.model = model
        self.codec = unwrap(model)
        self.attached: Any = model if model is not self.codec else None
        methods = (
            [[m.name, m.config.model_dump(mode="json")] for m in getattr(model, "methods", [])]
            if self.attached is not None
            else []
        )
        # A checkpoint with another identity belongs to another run.
        self.identity = json.dumps(
            [
                provenance(self.codec).name,
                provenance(self.codec).quality,
                methods,
                [one for batches in drawn_from for one in batches.sources()]
                if folder is not None
                else [],
            ]
        )
        self.loss = rate_distortion_loss(*_target(options))
        self.step = self.saved_step = self.skipped = self._skipped_in_a_row = 0
        self.last: dict[str, float] = {}
        self._clock = (time.monotonic(), 0)
        self.dtype = autocast_dtype(options.precision, fabric.device)
        if options.channels_last:
            to_channels_last(self.codec)
        net, aux = split_parameters(self.codec, model)
        if not net:
            raise TrainingError("nothing to train: no parameter of the codec requires a gradient")
        if options.devices > 1:
            # Quantiles get gradients from the auxiliary loss alone, outside the wrapped forward
            # pass; DDP's reducer would wait for them.
            ignored = [name for name, p in model.named_parameters() if any(p is q for q in aux)]
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                model, ignored
            )
        self.net_parameters = net
        self.wrapped = fabric.setup_module(model)
        self.optimizer: Any = fabric.setup_optimizers(
            make_optimizer(
                options.optimizer, net, learning_rate(options, 0), options.max_precondition_dim
            )
        )
        self.aux_optimizer = torch.optim.Adam(aux, lr=options.aux_lr) if aux else None
        self._metrics_file = (
            folder / "metrics.jsonl" if folder is not None and fabric.is_global_zero else None
        )
        self._writer = self._tensorboard() if options.tensorboard else None

    def advance(self, batch: Tensor) -> dict[str, Tensor]:
        """Take one training step; a step with a non-finite gradient is skipped.

        Raises:
            TrainingError: more than `MAX_SKIPPED` steps in a row were skipped.
        """
        options = self.options
        # Quantisation noise depends on (seed, step, rank) alone, so that resuming needs no random
        # state.
        torch.manual_seed(mix(options.seed, self.step, self.fabric.global_rank, 1))
        for optimizer in (self.optimizer, self.aux_optimizer):
            if optimizer is not None:
                rate = learning_rate(options, self.step)
                for group in optimizer.param_groups:
                    group["lr"] = rate if optimizer is self.optimizer else options.aux_lr
        if options.channels_last:
            frames = batch.flatten(0, -4).contiguous(memory_format=torch.channels_last)
            batch = frames.unflatten(0, batch.shape[:-3])
        self.optimizer.zero_grad(set_to_none=True)
        passes = self.attached.widths_per_step() if self.attached is not None else []
        figures = [self._learn(batch, width) for width in passes or [None]][0]
        norm = nn.utils.clip_grad_norm_(self.net_parameters, options.clip)
        if bool(torch.isfinite(norm)):
            self._skipped_in_a_row = 0
            self.optimizer.step()
        else:
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row > MAX_SKIPPED:
                raise TrainingError(
                    f"the loss is not finite: {self._skipped_in_a_row} steps in a row up to step"
                    f" {self.step} had no usable gradient (lr {options.lr:g}, clip"
                    f" {options.clip:g}); try a lower lr"
                )
        if self.attached is not None:  # a skipped step counts: schedules continue
            self.attached.after_step()
        if self.aux_optimizer is not None:
            self.aux_optimizer.zero_grad(set_to_none=True)
            aux = (self.attached or self.codec).aux_loss()
            # Variable-rate bottlenecks have no auxiliary loss: CompressAI returns the number 0.
            if isinstance(aux, Tensor):
                aux.backward()
                self.aux_optimizer.step()
                figures["aux"] = aux
        self.step += 1
        return figures

    def _learn(self, batch: Tensor, width: int | None) -> dict[str, Tensor]:
        """Add the gradients of one forward pass at one width; return its metrics.

        Several widths take one pass each, so that the memory is that of one width.
        """
        at = {} if width is None else {"width": width}
        # What methods are attached to asks for itself.
        given = {} if self.attached else further_arguments(self.codec, batch, "forward")
        with torch.autocast(
            self.fabric.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None
        ):
            out = self.wrapped(batch, **given, **at)
        batch = batch.flatten(0, -4)  # the frames of clips
        if "x_hat" in out:
            out = {**out, "x_hat": out["x_hat"].float()}
        own = (
            self.attached.objective(out, batch, _target(self.options)[1])
            if self.attached is not None
            else None
        )
        figures: dict[str, Tensor] = own if own is not None else self.loss(out, batch)
        loss = figures["loss"]
        if self.attached is not None:
            figures["terms"] = self.attached.loss(out, batch)
            loss = loss + figures["terms"]
        self.fabric.backward(loss)
        return figures

    def log(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Convert a step's metrics to numbers, append them to metrics.jsonl, and return them."""
        now, (then, step) = time.monotonic(), self._clock
        self._clock = (now, self.step)
        values = {
            name.removesuffix("_loss"): float(v.detach())
            for name, v in figures.items()
            if v is not None
        }
        if values.get("mse"):
            values["psnr"] = -10 * math.log10(values["mse"])
        values["lr"] = learning_rate(self.options, self.step - 1)
        if self.attached is not None:
            values |= self.attached.metrics()
        self.last = values
        if self._metrics_file is not None:
            record = {
                "step": self.step,
                **values,
                "steps_per_s": (self.step - step) / max(now - then, 1e-9),
            }
            append_line(self._metrics_file, json.dumps(record))
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, self.step)
        return values

    def save(self) -> None:
        """Write a checkpoint atomically; keep the one before it."""
        if (
            self.checkpoints is None
            or self.step == self.saved_step
            or not self.fabric.is_global_zero
        ):
            return
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "settings": self.options.model_dump_json(),
            "identity": self.identity,
            "threads": torch.get_num_threads(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.optimizer.state_dict(),
            "aux_optimizer": (
                self.aux_optimizer.state_dict() if self.aux_optimizer is not None else None
            ),
        }
        self.checkpoints.save(state)
        self.saved_step = self.step

    def resume(self) -> None:
        """Resume from the checkpoint, if there is one; remove later steps from metrics.jsonl."""
        found = self.checkpoints.load() if self.checkpoints is not None else None
        if found is None:
            if self._metrics_file is not None:
                self._metrics_file.unlink(missing_ok=True)
            return
        state, path = found
        try:
            self._restore(state, path)
        except RecipeError:
            raise
        except Exception as error:  # its digest is right: of another model, or not nicprune's
            reason = cut(str(error) or type(error).__name__, 200)
            raise FileError(
                f"{path} does not fit this model: {reason}. Remove it to start again"
            ) from None
        if self._metrics_file is not None and self._metrics_file.exists():
            lines = self._metrics_file.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= self.step]
            write_atomically(self._metrics_file, lambda p: p.write_bytes(b"".join(kept)))

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        """Take over the content of a checkpoint.

        Raises:
            RecipeError: it belongs to another run.
        """
        before, identity = json.loads(state["settings"]), state["identity"]
        free = {"checkpoint_every", "log_every", "tensorboard", "devices", "accelerator"}
        now = self.options.model_dump()
        defaults = {
            name: field.default for name, field in TrainSettings.model_fields.items()
        }  # for settings that are newer than the checkpoint
        changed = [k for k in now if k not in free and before.get(k, defaults[k]) != now[k]]
        if changed:
            differences = ", ".join(f"{k} {before.get(k)!r} there, {now[k]!r} now" for k in changed)
            raise RecipeError(
                f"{path} belongs to a run with other settings ({cut(differences, 400)}); use"
                " another folder or remove it"
            )
        if json.loads(identity) != json.loads(self.identity):  # in whatever order settings stand
            raise RecipeError(
                f"{path} belongs to another run (codec, method or images differ); use another"
                " folder or remove it"
            )
        # CDF tables are rebuilt from the weights at the end; those of the checkpoint may have
        # another size.
        tables = {
            k: v for k, v in self.model.state_dict().items() if k.rsplit(".", 1)[-1] in CDF_BUFFERS
        }
        self.model.load_state_dict({**state["model"], **tables})
        self.optimizer.optimizer.load_state_dict(state["optimizer"])
        if self.aux_optimizer is not None:
            self.aux_optimizer.load_state_dict(state["aux_optimizer"])
        self.step = self.saved_step = state["step"]
        self.skipped = int(state["skipped"])
        self._clock = (time.monotonic(), self.step)
        if (threads := torch.get_num_threads()) != state["threads"] and (
            self.fabric.device.type == "cpu"
        ):
            warnings.warn(
                f"resuming with {threads} threads what {cut(str(state['threads']))} began: the"
                " result will differ in its last bits from that of an uninterrupted run",
                stacklevel=3,
            )

    def interrupted(self, number: int) -> InterruptedRun:
        """Return the error for a run that this signal stopped."""
        kept = (
            f"run again to continue from step {self.saved_step}"
            if self.folder
            else "nothing was saved (no folder was given)"
        )
        return InterruptedRun(
            f"interrupted at step {self.step} of {self.options.steps}; {kept}", number
        )

    def _tensorboard(self) -> Any:
        writer = _summary_writer()
        return (
            writer(str(self.folder / "tensorboard"))
            if self._metrics_file is not None and self.folder
            else None
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _step_of(line: bytes) -> float:
    """Step of a line of metrics.jsonl; infinity if it is damaged, or a killed process left it
    incomplete.
    """
    try:
        step = float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
    return math.inf if math.isnan(step) else step
