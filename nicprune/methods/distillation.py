"""Distillation: loss terms that let a smaller codec learn from the codec it was pruned from, beside
any other method.

*Output*: the target is a mix of the image and the teacher's reconstruction of it,

    (1 - w) * d(x, x_hat) + w * d(x_teacher, x_hat)      in place of d(x, x_hat),

with d the distortion term of the loss (knowledge distillation of Hinton et al., 2015, for a
regression).

*Latent*: the squared distance between the latents y before quantisation, summed over channels, per
pixel; the quantiser's step is 1.

*Features*: the distance, channel by channel, between the inputs of the last consumer of every
channel group. Keep-lists map each channel of the student to its channel of the teacher, so no
adapters are learnt. While masks decay, a channel is weighted by its mask. Distances are relative to
the teacher's energy, so that groups are comparable.

*Entropy weights* (after Chen et al., "FEDS", arXiv 2503.06399, whose exact form is not public): a
channel of y is weighted by the bits that the teacher spends on it, relative to the mean; a feature
channel by the entropy of a Gaussian of its variance, log2(1 + var / mean var) / 2, with its
distance relative to its own energy.

*Adaptive stages* (after arXiv 2312.02605): the weight of a group is the running mean of its
distance, relative to that of all groups.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nicprune.channels.groups import from_ranges
from nicprune.codecs.calling import run
from nicprune.codecs.gradient_free import learns
from nicprune.codecs.hooks import Hook, hook_dicts, remove_hooks
from nicprune.codecs.layer_kinds.kind import channel_kind
from nicprune.codecs.provenance import provenance
from nicprune.codecs.recomputation import in_backward
from nicprune.codecs.roles import roles_of
from nicprune.codecs.zoo import lmbda_of
from nicprune.common.config import StrictConfig
from nicprune.common.errors import CodecError, RecipeError, TrainingError
from nicprune.methods.contract import METHODS, Distiller

EMA = 0.99
"""Share of the past in a stage's running distance."""


class DistillationConfig(StrictConfig):
    """Settings of distillation: the terms and their weights; at least one.

    Attributes:
        output: w above, from 0 (the image alone) to 1 (the teacher's reconstruction alone).
        latent: weight of the distance of y, in bits per squared quantisation step.
        features: weight of the mean distance over channel groups.
        transforms: the transforms whose features are compared.
        weights: "even", or "entropy".
        stages: "even", or "adaptive".
        lmbda: lambda of the distortion term; that of the codec's quality if not given.
    """

    output: float = Field(default=0.0, ge=0, le=1)
    latent: float = Field(default=0.0, ge=0)
    features: float = Field(default=0.0, ge=0)
    transforms: list[Literal["g_a", "h_a", "h_s", "g_s"]] = Field(
        default=["g_a", "g_s"], min_length=1
    )
    weights: Literal["even", "entropy"] = "even"
    stages: Literal["even", "adaptive"] = "even"
    lmbda: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _something(self) -> DistillationConfig:
        if not (self.output or self.latent or self.features):
            raise ValueError(
                "give at least one of output, latent, features: for example output: 0.5"
            )
        return self


class Listener(Hook):
    """Keep the input or the output of a module in a training step."""

    def __init__(self, owner: nn.Module, store: dict[str, Tensor], name: str):
        self.owner, self.store, self.name = owner, store, name

    def before(self, module: nn.Module, args: Any) -> None:
        """Keep the module's input (a hook before the module)."""
        self.keep(module, args[0])

    def keep(self, module: nn.Module, x: Tensor) -> None:
        """Keep a tensor in training; outside of it nothing reads it, and where activation
        checkpointing runs the module again it has been read.
        """
        if self.owner.training and not in_backward():
            self.store[self.name] = x

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.keep(module, output)


class Stage:
    """The last consumer of a channel group, and the inputs that are the group's channels in the
    student and in the teacher.
    """

    def __init__(
        self, module: str, producer: str, outputs: np.ndarray, mine: np.ndarray, theirs: np.ndarray
    ):
        self.module, self.producer, self.outputs = module, producer, outputs
        self.mine, self.theirs = torch.from_numpy(mine), torch.from_numpy(theirs)

    def dim(self, modules: Mapping[str, nn.Module], store: Mapping[str, Tensor]) -> int:
        """Return the dimension of the module's input that holds channels."""
        layer = modules[self.module]
        return channel_kind(layer).channel_dim(layer, store[self.module])

    def share(self, modules: Mapping[str, nn.Module]) -> Tensor | None:
        """Return the mask of each channel that the module reads, shape (channels,): 1 without
        masks.
        """
        found: Tensor | None = None
        for entry in hook_dicts(modules[self.producer])[1].values():
            share = entry.share() if isinstance(entry, Hook) else None
            if share is not None:
                share = share.detach()[torch.from_numpy(self.outputs).to(share.device)].clamp(0, 1)
                found = share if found is None else found * share
        return found


@METHODS.register("distillation")
class Distillation(Distiller):
    """Add the terms to the loss; no channel is removed."""

    name = "distillation"
    summary = (
        "teacher's help beside methods that prune: output, latents, features by channel group,"
        " through the keep-lists"
    )
    Config = DistillationConfig
    config: DistillationConfig
    distances: Tensor
    step: Tensor

    def __init__(self, *args: Any):
        super().__init__(*args)
        # In a tuple, for it is no part of this module: never saved, never trained.
        self._teacher: tuple[nn.Module, ...] = ()
        self._mine: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        self._stages: list[Stage] = []
        self._named = dict(self.codec.named_modules())
        self._lmbda = 0.0
        self.register_buffer("distances", torch.zeros(0))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def validate(self) -> None:
        record = provenance(self.codec)
        if self.config.output and record.metric != "mse":
            raise RecipeError(
                f"output distillation is by squared error; this codec is for {record.metric}: leave"
                " output out"
            )
        if self.config.latent and (roles := roles_of(self.codec)).analysis is None:
            raise CodecError(
                f"latent distillation compares y, and {roles.reason}: leave latent out"
            )

    def set_objective(self, lmbda: float, metric: str) -> None:
        if self.config.lmbda is not None and self.config.lmbda != lmbda:
            raise RecipeError(
                f"distillation: lmbda {self.config.lmbda:g} is not the training's, {lmbda:g}: leave"
                " it out, it is then the same"
            )
        if self.config.output and metric != "mse":
            raise RecipeError(
                f"output distillation is by squared error, and the training's metric is {metric}:"
                " leave output out"
            )
        self._lmbda = lmbda

    def set_teacher(self, teacher: nn.Module) -> None:
        """Take a codec as the teacher.

        Raises:
            CodecError: it is not what this codec was pruned from.
        """
        codec = self.codec
        own, theirs = provenance(codec), provenance(teacher).history
        if own.history[: len(theirs)] != theirs or (
            len(own.history) == len(theirs) and _differ(codec, teacher)
        ):
            raise CodecError(
                "the teacher is not what this codec was made from: give the codec as it was before"
                " pruning, teacher=..."
            )
        removed = [entry.get("removed_inputs", {}) for entry in own.history[len(theirs) :]]
        self._teacher = (teacher,)
        self._lmbda = lmbda_of(codec, self.config.lmbda)
        if self.config.features:
            self._stages = self._find_stages(teacher, removed)
            if not self._stages:
                raise RecipeError(
                    f"features: no channel group of {', '.join(self.config.transforms)} is there to"
                    " compare"
                )
        self.distances = torch.zeros(len(self._stages))

    def _find_stages(self, teacher: nn.Module, removed: list[dict[str, str]]) -> list[Stage]:
        others: dict[str, Any] = dict(teacher.named_modules())
        found = []
        for group in self.groups.prunable():
            readers = [m for m in group.members if m.axis == "in" and m.module in others]
            makers = [m for m in group.members if m.axis == "out"]
            if (
                not readers
                or not makers
                or self.groups.transform(readers[-1].module) not in self.config.transforms
            ):
                continue
            reader = readers[-1]
            kept = np.arange(_inputs(others[reader.module]))
            for gone in removed:  # one pruning after the other
                kept = np.delete(kept, from_ranges(gone.get(reader.module, "")))
            if len(kept) != (width := _inputs(self._named[reader.module])):
                raise CodecError(
                    f"which of the teacher's channels {reader.module} still reads is not known: it"
                    f" reads {width}"
                )
            # One consumer channel for each of the group's; several only where an image is taken
            # apart, and then the first stands for all.
            mine = reader.index[:, 0]
            found.append(
                Stage(reader.module, makers[0].module, makers[0].index[:, 0], mine, kept[mine])
            )
        return found

    def attach(self, codec: nn.Module) -> None:
        self._listen(codec, self._mine)

    def _listen(self, model: nn.Module, store: dict[str, Tensor]) -> list[Any]:
        modules: dict[str, Any] = dict(model.named_modules())
        found = [
            modules[stage.module].register_forward_pre_hook(
                Listener(self, store, stage.module).before
            )
            for stage in self._stages
        ]
        if self.config.latent:
            end = roles_of(self.codec).analysis
            assert end is not None  # validated
            found.append(modules[end.module].register_forward_hook(Listener(self, store, "y")))
        return found

    def detach(self, codec: nn.Module) -> None:
        remove_hooks(codec, lambda hook: hook.owner is self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        """Return a copy that shares the teacher, which never changes."""
        memo[id(self._teacher)] = self._teacher
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(
            {key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()}
        )
        return twin

    def loss(self, out: Mapping[str, Any], x: Tensor) -> Tensor:
        # Latents and features are kept in training alone: outside of it there is no such term.
        compares = self.training and bool(self.config.latent or self._stages)
        if compares and not self._mine:
            raise TrainingError(
                "distillation compares the features of the forward pass before: call loss once"
                " after each"
            )
        if not compares and not self.config.output:
            return x.new_zeros(())
        if compares and out["x_hat"].requires_grad:
            self._check_graph()
        teacher = self._teacher[0]
        if next(teacher.parameters()).device != x.device:
            teacher.to(x.device)
        hooks = self._listen(
            teacher, self._theirs
        )  # for now only: copies of this module share the teacher
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            end = roles_of(self.codec).analysis
            if (
                self.config.output
                or self.config.weights == "entropy"
                or end is None
                or not end.whole
                or any(self.groups.transform(s.module) != "g_a" for s in self._stages)
            ):
                shown = run(teacher, x)
            else:
                shown = {"y": teacher.get_submodule(end.module)(x)}
        for hook in hooks:
            hook.remove()
        total = x.new_zeros(())
        if self.config.output:
            made, target = out["x_hat"], shown["x_hat"].clamp(0, 1)
            total = total + self.config.output * self._lmbda * 255**2 * (
                (made - target).square().mean() - (made - x).square().mean()
            )
        if compares and self.config.latent:
            total = total + self.config.latent * self._latent(shown, x)
        if compares and self._stages:
            total = total + self.config.features * self._features()
        self._mine.clear()
        self._theirs.clear()
        return total

    def _check_graph(self) -> None:
        """Check that what is compared can teach the layers that made it.

        Raises:
            TrainingError: these are trained, but it has no gradient.
        """
        makers = {stage.module: stage.producer for stage in self._stages}
        for name, tensor in self._mine.items():
            end = roles_of(self.codec).analysis
            maker = makers.get(name) or (end.module if end is not None else name)
            if not tensor.requires_grad and any(map(learns, self._named[maker].parameters())):
                raise TrainingError(
                    f"distillation cannot teach {maker}: its output has no gradient. Activation"
                    " checkpointing inside the codec needs use_reentrant=False"
                )

    def _latent(self, shown: Mapping[str, Any], x: Tensor) -> Tensor:
        end = roles_of(self.codec).analysis
        assert end is not None  # validated
        mine, theirs = (
            store["y"].float().movedim(end.dim, 1) for store in (self._mine, self._theirs)
        )
        if mine.shape != theirs.shape:
            raise CodecError(
                f"y has {mine.shape[1]} channels, the teacher's has {theirs.shape[1]}: leave latent"
                " out where latents are pruned"
            )
        apart = (mine - theirs).square().sum(_but_channels(mine))
        if self.config.weights == "entropy":
            bits = -torch.log2(shown["likelihoods"]["y"]).sum((0, 2, 3))
            apart = apart * bits / bits.mean().clamp_min(1e-12)
        return apart.sum() / (x.shape[0] * x.shape[2] * x.shape[3])

    def _features(self) -> Tensor:
        found = []
        for stage in self._stages:
            mine, theirs = (
                store[stage.module].float().movedim(stage.dim(self._named, store), 1)
                for store in (self._mine, self._theirs)
            )
            mine, theirs = (
                mine[:, stage.mine.to(mine.device)],
                theirs[:, stage.theirs.to(theirs.device)],
            )
            dims = _but_channels(mine)
            share = stage.share(self._named)
            counts = mine.new_ones(mine.shape[1]) if share is None else share.to(mine)
            # What a mask has taken away is no fault of what is left: the teacher's channel counts
            # as much as the student's does.
            shape = [1, -1, *[1] * (mine.dim() - 2)]
            apart = (mine - theirs * counts.view(shape)).square().mean(dims)
            energy = theirs.square().mean(dims)
            if self.config.weights == "entropy":
                spread = theirs.var(dims, unbiased=False)
                counts = counts * 0.5 * torch.log2(1 + spread / spread.mean().clamp_min(1e-12))
                apart, energy = (
                    apart / energy.clamp_min(1e-3 * float(energy.mean()) + 1e-12),
                    torch.ones_like(energy),
                )
            found.append((counts * apart).sum() / (counts * energy).sum().clamp_min(1e-12))
        apart = torch.stack(found)
        if self.config.stages == "even":
            return apart.mean()
        with torch.no_grad():
            if bool(apart.isfinite().all()):  # a step that is not is skipped, and says nothing
                if not bool(self.distances.any()):
                    self.distances.copy_(apart)
                self.distances.mul_(EMA).add_(apart, alpha=1 - EMA)
            weights = self.distances / self.distances.mean().clamp_min(1e-12)
        return (weights * apart).mean()

    def after_step(self) -> None:
        self.step += 1


def _but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _inputs(layer: nn.Module) -> int:
    return channel_kind(layer).widths(layer)[1]


def _differ(codec: nn.Module, teacher: nn.Module) -> bool:
    return [p.shape for p in codec.parameters()] != [p.shape for p in teacher.parameters()]
