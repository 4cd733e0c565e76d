"""Gates before convolutions: for each image, channels of little energy are closed and left out of
the computation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nicprune.channels.groups import Groups, Norms
from nicprune.codecs.anatomy import SIZE_MULTIPLE, forward_for_analysis
from nicprune.codecs.example import example_image
from nicprune.codecs.gradient_free import learns
from nicprune.codecs.layer_kinds.kind import kinds_in
from nicprune.codecs.modes import left_as_it_was
from nicprune.codecs.recomputation import in_backward
from nicprune.codecs.roles import roles_of, transforms_in
from nicprune.common.config import StrictConfig
from nicprune.common.errors import CodecError, RecipeError
from nicprune.pruning.budget import ROUND_TO, Budget

TEMPERATURE = 0.25
"""Width of the sigmoid that stands for the step in the backward pass, in units of the score."""

ROOT = 4
"""Scores are this root of the relative energy: energies of images differ by orders of magnitude,
and a channel that matters little is to close on most images at once, not on the flat ones first.
"""

START = -0.5
"""Thresholds at the start: no score is below."""

EMA = 0.95
"""Share of the past in the running means of energies and of how often a channel is open."""

GRID = 4096
"""Pixels that an energy is pooled over at most: evenly spaced ones of a larger map say the same, at
a part of the cost.
"""

GATED = ("g_a", "h_a", "h_s", "g_s")
"""Transforms that may have gates. Context models run pixel by pixel when decoding: a pooled energy
would differ from training's.
"""


class GatingConfig(StrictConfig):
    """Settings of channel gating; exactly one of `budget` and `alpha` is its target.

    Attributes:
        budget: fractions of the original codec's MACs, those of the gates included, on average over
            images.
        alpha: alpha_t, the target of all thresholds: larger is sparser; 1 closes what is below its
            usual energy.
        gamma: weight of sum (alpha - alpha_t)^2; None takes the value that reaches alpha_t within
            `gating_steps`. With a budget it adapts.
        gating_steps: training steps during which thresholds are learnt; they are fixed afterwards.
        energy: "mean" or "max" of the squares.
        kernel: taps of the 1-D convolution across channels, 0 for none.
        relative: energies are relative to the usual one of the "channel" or of the "layer".
        transforms: the transforms that get gates.
        freeze: channels open on at most this fraction of images are removed by `harden`.
        rest: what `harden` does with the other channels: keep the gates ("dynamic"), or open all
            and return a plain codec ("open").
        round_to: widths after removal are multiples of this.
        norms: whether channels that a norm computes over are "pinned", or may be removed ("adapt"),
            as for pruning.
    """

    budget: Budget | None = None
    alpha: float | None = Field(default=None, gt=0, le=100)
    gamma: float | None = Field(default=None, gt=0)
    gating_steps: int = Field(default=10_000, ge=2)
    energy: Literal["mean", "max"] = "mean"
    kernel: int = Field(default=5, ge=0, le=15)
    relative: Literal["channel", "layer"] = "channel"
    transforms: tuple[Literal["g_a", "h_a", "h_s", "g_s"], ...] = ("g_a", "h_a", "h_s", "g_s")
    freeze: float = Field(default=0.02, ge=0, lt=1)
    rest: Literal["dynamic", "open"] = "dynamic"
    round_to: int = Field(default=ROUND_TO, ge=1, le=64)
    norms: Norms = "pinned"

    @model_validator(mode="after")
    def _consistent(self) -> GatingConfig:
        if (self.budget is None) == (self.alpha is None):
            raise ValueError("give either budget: {macs: 0.5} or alpha: 1.0")
        if self.budget is not None and self.gamma is not None:
            raise ValueError("gamma adapts to a budget; give it with alpha only")
        if self.kernel and self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, or 0 for no convolution (got {self.kernel})")
        if not self.transforms:
            raise ValueError("transforms: name at least one")
        return self


SILENT = 0.01
"""Relative energy, after the root, of a channel that is zero."""


NEVER = -1e6
"""Margin of a channel that does not open."""


class Gate(nn.Module):
    """The gate before one convolution: decides for each image which input channels are open.

    score = conv1d((energy / scale)^(1/4)), open where score >= threshold; energy is the mean (or
    the largest) square of a channel over the image (over `GRID` evenly spaced pixels of a larger
    one), scale its running mean over images (or that of the layer). At least one channel is always
    open. While thresholds are learnt, the step may be a ramp of width `softness`: channels fade
    before they close.

    Args:
        channels: C, input channels of the convolution.
        energy: "mean" or "max" over the pixels.
        kernel: taps of the 1-D convolution across channels, odd; 0 for none.
        relative: energies are relative to the running mean of the "channel" or of the "layer".

    Attributes:
        threshold: alpha, shape (C,); below every score at the start, so that all channels are open.
        scale: usual energy of each channel, or of the layer for all of them, shape (C,): a running
            mean in training, also after thresholds are fixed.
        learns: whether thresholds are learnt.
        follows: whether running means go on afterwards: the weights of the convolution are trained.
        gain: factor on the input before its energy is taken, shape (C,): 1, unless the scale of a
            rate was folded into the weights.
        place: index of each channel among the `width` channels that the gate was learnt with.
        rest: what each of these counts as in the 1-D convolution once it is removed, shape
            (width,): 1, the usual energy, or `SILENT` where another method had made it zero.
        open_rate: fraction of images on which each channel was open, running mean, shape (C,).
        importance: squared gradient of the loss by the gate, running mean, shape (C,).
    """

    scale: Tensor
    gain: Tensor
    place: Tensor
    width: Tensor
    rest: Tensor
    seen: Tensor
    open_rate: Tensor
    importance: Tensor
    softness: Tensor

    def __init__(
        self,
        channels: int,
        energy: Literal["mean", "max"],
        kernel: int,
        relative: Literal["channel", "layer"],
    ):
        super().__init__()
        self.channels, self.energy_of, self.relative = channels, energy, relative
        self.threshold = nn.Parameter(torch.full((channels,), START))
        self.mix = (
            nn.Parameter(F.one_hot(torch.tensor(kernel // 2), kernel).float()) if kernel else None
        )
        self.register_buffer("scale", torch.zeros(channels))
        self.register_buffer("gain", torch.ones(channels))
        self.register_buffer("place", torch.arange(channels))
        self.register_buffer("width", torch.tensor(channels))
        self.register_buffer("rest", torch.ones(channels))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("open_rate", torch.ones(channels))
        self.register_buffer("importance", torch.zeros(channels))
        self.register_buffer("softness", torch.zeros(()))
        self.learns = True
        self.follows = True
        self._current: Tensor | None = None
        self.open = torch.ones(channels, dtype=torch.bool)
        self.fraction = 1.0
        self.recorded: list[Tensor] | None = None

    def current(self) -> Tensor:
        """Return the thresholds as they were last written: an optimiser that was given them may
        have moved them since.
        """
        return self.threshold.data if self._current is None else self._current.to(self.threshold)

    def write(self, threshold: Tensor) -> None:
        """Set the thresholds while they are learnt, and discard their gradient."""
        self.threshold.data.copy_(threshold)
        self._current = threshold.clone()
        self.threshold.grad = None

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}width" in state:
            # Files of before say nothing of what is removed.
            state.setdefault(f"{prefix}rest", torch.ones(int(state[f"{prefix}width"])))
            self.rest = self.rest.new_ones(len(state[f"{prefix}rest"]))
        super()._load_from_state_dict(state, prefix, *args)
        self._current = None

    def sample(self, x: Tensor) -> Tensor:
        """Return the pixels that energy is pooled over, and set `fraction`, their share of all
        pixels.
        """
        step = sampling_step(x.shape[2], x.shape[3])
        some = x[:, :, ::step, ::step] if step > 1 else x
        self.fraction = some[0, 0].numel() / x[0, 0].numel()
        return some

    def pool(self, x: Tensor) -> Tensor:
        """Return the energy of each channel of sampled pixels, float32, shape (B, C)."""
        squares = x.float().square() if self.energy_of == "max" else x.square()
        energy = (
            squares.amax((2, 3))
            if self.energy_of == "max"
            else squares.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        )
        return energy * self.gain.to(energy).square()

    def scores(self, energy: Tensor) -> Tensor:
        """Return the scores that thresholds are compared with, shape (B, C)."""
        relative = (
            (energy / self.scale.clamp_min(1e-12)).clamp_min(SILENT**ROOT).pow(1 / ROOT)
            if int(self.seen)
            else torch.ones_like(energy)
        )
        if self.mix is None:
            return relative
        with torch.autocast(relative.device.type, enabled=False):
            mix = self.mix.to(relative.dtype).view(1, 1, -1)
            if (width := int(self.width)) > self.channels:
                all_ = self.rest.to(relative).expand(len(relative), width)
                relative = all_.index_copy(1, self.place, relative)
            mixed = F.conv1d(relative.unsqueeze(1), mix, padding=self.mix.numel() // 2).squeeze(1)
            return mixed.index_select(1, self.place) if width > self.channels else mixed

    def forward(self, x: Tensor) -> Tensor:
        """Return 1 for open and 0 for closed channels of each image, shape (B, C); in training with
        a straight-through gradient.
        """
        # Thresholds and mixing learn from energies; features do not, which would cost another pass.
        return self.decide(self.pool(self.sample(x.detach())))

    def decide(self, energy: Tensor) -> Tensor:
        """Return open and closed channels as `forward` does, from energies (B, C)."""
        running = self.training and (self.learns or self.follows) and not in_backward()
        if running:
            with torch.no_grad():
                if self.learns and self._current is None:
                    self._current = self.threshold.detach().clone()
                memory = min(EMA, int(self.seen) / (int(self.seen) + 1))  # a plain mean at first
                usual = (
                    energy.mean(0)
                    if self.relative == "channel"
                    else energy.mean().expand(self.channels)
                )
                _follow(self.scale, usual, memory)
                self.seen += 1
        margin = self.scores(energy) - self.threshold.to(energy.dtype)
        # A channel of zeros stays closed, so that the one that is always open is not one of them:
        # where a mask has made it zero, it will be gone.
        margin = margin.masked_fill(energy == 0, NEVER)
        hard = opened(margin)
        if self.recorded is not None:
            self.recorded.append(margin.detach())
        if not self.training:
            self.open = hard[0].detach() > 0
            return hard
        if running:
            # What is not finite opens no channel, and says nothing of how often one is open.
            rate = hard.detach().mean(0)
            _follow(self.open_rate, rate.where(energy.isfinite().all(), torch.nan), EMA)
        if not self.learns:
            return hard.detach()
        soft = torch.sigmoid(margin / TEMPERATURE)
        if float(self.softness) > 0:
            fading = (margin.detach() / self.softness + 0.5).clamp(0, 1)
            hard = fading.scatter(1, margin.argmax(1, keepdim=True), 1.0)
        gates = hard + (soft - soft.detach())
        if gates.requires_grad:  # not where thresholds are frozen from outside
            gates.register_hook(self._learn_importance)
        return gates

    def _learn_importance(self, gradient: Tensor) -> None:
        squared = gradient.detach().square().sum(0)
        if bool(torch.isfinite(squared).all()):
            self.importance.mul_(EMA).add_(squared.to(self.importance), alpha=1 - EMA)


def _follow(mean: Tensor, latest: Tensor, memory: float) -> None:
    """Update a running mean in place; it stays where the latest value is not finite."""
    latest = latest.to(mean)
    following = mean.mul(memory).add_(latest, alpha=1 - memory)
    mean.copy_(following.where(latest.isfinite(), mean))


def opened(margin: Tensor) -> Tensor:
    """Return 1 for channels whose score is at least the threshold, and for the channel of each
    image with the largest margin, shape (B, C).
    """
    return (margin >= 0).to(margin).scatter(1, margin.argmax(1, keepdim=True), 1.0)


def sampling_step(height: int, width: int) -> int:
    """Return the stride between the rows and columns of an input of this size that are pooled."""
    step = max(1, math.isqrt(height * width // GRID))
    while -(-height // step) * -(-width // step) > GRID:
        step += 1
    return step


class Power(nn.Module):
    """Running mean of the power of each input channel of one GDN, shape (C,)."""

    value: Tensor
    seen: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("value", torch.zeros(channels))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.learns = True
        self.recorded: list[Tensor] | None = None

    def measures(self, layer: nn.Module) -> bool:
        """Return whether the power meter reads the input of this layer."""
        running = self.training and (self.learns or is_trained(layer)) and not in_backward()
        return running or self.recorded is not None

    def add(self, power: Tensor) -> None:
        """Add the power of one image to the running mean."""
        if self.recorded is not None:
            self.recorded.append(power)
            return
        memory = min(EMA, int(self.seen) / (int(self.seen) + 1))
        _follow(self.value, power, memory)
        self.seen += 1


def is_trained(layer: nn.Module) -> bool:
    """Return whether a parameter of this layer itself is trained."""
    return any(map(learns, layer.parameters(recurse=False)))


def input_sizes(codec: nn.Module, names: list[str]) -> dict[str, int]:
    """Return the number of input pixels of each of these layers for a 64x64 image."""
    sizes: dict[str, int] = {}
    handles = [
        codec.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: sizes.__setitem__(name, args[0].shape[2] * args[0].shape[3])
        )
        for name in names
    ]
    image = example_image(codec)
    try:
        with torch.no_grad(), left_as_it_was(codec):
            forward_for_analysis(codec.eval(), image)
    finally:
        for handle in handles:
            handle.remove()
    area = image.shape[2] * image.shape[3]
    return {name: size * SIZE_MULTIPLE**2 // area for name, size in sizes.items()}


@contextmanager
def recording(gates: Mapping[str, Gate], powers: Mapping[str, Power]) -> Iterator[None]:
    """Keep the margins and powers of every image in `recorded`, inside the block."""
    parts: list[Any] = [*gates.values(), *powers.values()]
    for part in parts:
        part.recorded = []
    try:
        yield
    finally:
        for part in parts:
            part.recorded = None


def key_of(name: str) -> str:
    """Return a module's name as a key of a ModuleDict, which allows no dots."""
    return name.replace(".", "/")


def gatable(codec: nn.Module, groups: Groups, transforms: Sequence[str]) -> list[str]:
    """Return the names of the convolutions that can have a gate: in these transforms, not
    depthwise, not reading the image.

    Raises:
        RecipeError: a transform has none.
        CodecError: the codec has none at all.
    """
    read: dict[str, int] = {}
    for group in groups:
        for member in group.members:
            if member.axis == "in":
                read[member.module] = read.get(member.module, 0) + member.index.size
    names, reasons = [], set()
    modules, kinds = dict(codec.named_modules()), kinds_in(codec)
    transform = transforms_in(codec, kinds)
    for name, kind in kinds.items():
        if not kind.convolution or transform[name] not in transforms:
            continue
        if kind.flow == "grouped":
            reasons.add(f"{name} is grouped")
        elif not kind.mask_on_weight:
            continue
        elif read.get(name) != kind.widths(modules[name])[1]:
            reasons.add(f"{name} reads the image, or channels that cannot be followed")
        else:
            names.append(name)
    if not names:
        told = [*sorted(reasons)[:3], roles_of(codec).reason or f"none in {', '.join(transforms)}"]
        raise CodecError(f"no convolution of {type(codec).__name__} can have a gate: {told[0]}")
    found = {transform[name] for name in names}
    if missing := [t for t in transforms if t not in found and set(transforms) != set(GATED)]:
        raise RecipeError(
            f"transforms: no convolution of {missing[0]} can have a gate; those of"
            f" {', '.join(sorted(found))} can"
        )
    return names
