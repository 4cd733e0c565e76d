"""One run of training: its model, optimisers and step, its log and its checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import CDF_BUFFERS, rate_distortion_loss, unwrap
from nicprune.codecs.calling import further_arguments
from nicprune.codecs.kernel_faults import StridedPointwiseBySlicing
from nicprune.codecs.memory_format import to_channels_last
from nicprune.codecs.provenance import provenance
from nicprune.codecs.transposed_bias import BiasBySum
from nicprune.common.config import cut
from nicprune.common.errors import FileError, InterruptedRun, RecipeError, TrainingError, first_line
from nicprune.common.files import append_line, write_atomically
from nicprune.data.patches import Batches, mix
from nicprune.training.checkpoints import Checkpoints
from nicprune.training.environment import Fabric, summary_writer
from nicprune.training.faded_moments import EVERY, drop_faded_moments
from nicprune.training.optimizers import make_optimizer
from nicprune.training.precision import autocast_dtype
from nicprune.training.settings import TrainSettings, learning_rate
from nicprune.training.trained_parameters import density_parameters, split_parameters

MAX_SKIPPED = 20
"""Largest number of consecutive steps that are skipped because their gradient is not finite."""

NAMES_TYPES = re.compile("bfloat16|dtype|scalar type", re.IGNORECASE)
"""Words of torch's errors on operators that do not take bfloat16, or not beside float32."""


def target_of(settings: TrainSettings) -> tuple[float, str]:
    """Return lambda and metric, which `fit` has filled in."""
    assert settings.lmbda is not None and settings.metric is not None
    return settings.lmbda, settings.metric


class TrainingRun:
    """State of one `fit`: model, optimisers, step."""

    def __init__(
        self,
        model: nn.Module,
        options: TrainSettings,
        fabric: Fabric,
        folder: Path | None,
        drawn_from: Sequence[Batches],
        validation: Sequence[Tensor] = (),
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
                *([digest(image) for image in validation] if folder is not None else []),
            ]
        )
        self.loss = rate_distortion_loss(*target_of(options))
        self.step = self.saved_step = self.skipped = self._skipped_in_a_row = 0
        self.last: dict[str, float] = {}
        self._clock = (time.monotonic(), 0)
        self.dtype = autocast_dtype(options.precision, fabric.device)
        net, aux = split_parameters(model)
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
        if options.channels_last:  # after all that may be refused, which leaves the codec as it is
            to_channels_last(self.codec)
        densities = density_parameters(model) if options.density_lr is not None else []
        apart = {id(parameter) for parameter in densities}
        self.wrapped = fabric.setup_module(model)
        self.optimizer: Any = fabric.setup_optimizers(
            make_optimizer(
                options.optimizer,
                [parameter for parameter in net if id(parameter) not in apart],
                learning_rate(options, 0),
                options.max_precondition_dim,
            )
        )
        self.density_optimizer = (
            torch.optim.Adam(densities, lr=options.density_lr or 0) if densities else None
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
        rate, peak = learning_rate(options, self.step), options.lr or 1.0
        for optimizer, lr in (
            (self.optimizer, rate),
            (self.density_optimizer, (options.density_lr or 0) * rate / peak),
            (self.aux_optimizer, options.aux_lr),
        ):
            for group in optimizer.param_groups if optimizer is not None else ():
                group["lr"] = lr
        if options.channels_last:
            frames = batch.flatten(0, -4).contiguous(memory_format=torch.channels_last)
            batch = frames.unflatten(0, batch.shape[:-3])
        self.optimizer.zero_grad(set_to_none=True)
        if self.density_optimizer is not None:
            self.density_optimizer.zero_grad(set_to_none=True)
        passes = self.attached.widths_per_step() if self.attached is not None else []
        figures = [self._learn(batch, width) for width in passes or [None]][0]
        norm = nn.utils.clip_grad_norm_(self.net_parameters, options.clip)
        if bool(torch.isfinite(norm)):
            self._skipped_in_a_row = 0
            self.optimizer.step()
            if self.density_optimizer is not None:
                self.density_optimizer.step()
            if self.step % EVERY == 0:
                drop_faded_moments(self.optimizer)
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
        with (
            torch.autocast(
                self.fabric.device.type,
                self.dtype or torch.bfloat16,
                enabled=self.dtype is not None,
            ),
            StridedPointwiseBySlicing(),
            BiasBySum(),
        ):
            try:
                out = self.wrapped(batch, **given, **at)
            except (RuntimeError, NotImplementedError) as error:
                if self.dtype is None or not NAMES_TYPES.search(str(error)):
                    raise
                raise TrainingError(
                    f"{type(self.codec).__name__} does not run in bfloat16: {first_line(error)}."
                    ' Train with precision="32"'
                ) from error
        batch = batch.flatten(0, -4)  # the frames of clips
        if "x_hat" in out:
            out = {**out, "x_hat": out["x_hat"].float()}
        own = (
            self.attached.objective(out, batch, target_of(self.options)[1])
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
        if self.density_optimizer is not None:
            state["density_optimizer"] = self.density_optimizer.state_dict()
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
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        try:
            self._restore(state, path)
        except RecipeError:  # nothing was taken over yet
            raise
        except Exception as error:  # its digest is right: of another model, or not nicprune's
            self.model.load_state_dict(before)
            reason = cut(str(error) or type(error).__name__, 200)
            raise FileError(
                f"{path} does not fit this model: {reason}. Remove it to start again"
            ) from None
        if self._metrics_file is not None and self._metrics_file.exists():
            lines = self._metrics_file.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= self.step]
            for line in kept[-1:]:  # a run that is finished logs nothing more
                logged = json.loads(line)
                self.last = {k: v for k, v in logged.items() if k not in ("step", "steps_per_s")}
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
        if self.density_optimizer is not None:
            self.density_optimizer.load_state_dict(state["density_optimizer"])
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
        writer = summary_writer()
        return (
            writer(str(self.folder / "tensorboard"))
            if self._metrics_file is not None and self.folder
            else None
        )

    def close(self) -> None:
        """Close the log of TensorBoard."""
        if self._writer is not None:
            self._writer.close()


def digest(image: Tensor) -> str:
    """Return what tells an image from all others."""
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


def _step_of(line: bytes) -> float:
    """Step of a line of metrics.jsonl; infinity if it is damaged, or a killed process left it
    incomplete.
    """
    try:
        step = float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
    return math.inf if math.isnan(step) else step
