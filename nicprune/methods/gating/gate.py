"""Gates in front of convolutions: channels of little energy are closed for the image at hand, and
not computed with.
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

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import SIZE_MULTIPLE, forward_for_analysis, transform_of
from nicprune.codecs.example import example_image
from nicprune.codecs.layer_kinds.kind import kinds_in
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
        budget: shares of the original codec's MACs, gates' own included, on average over images.
        alpha: alpha_t, the threshold that all are drawn to: larger is sparser; 1 closes what is
            below its usual energy.
        gamma: weight of sum (alpha - alpha_t)^2; None takes what brings thresholds there within
            `gating_steps`. With a budget it adapts.
        gating_steps: steps during which thresholds learn; they stay as they are from then on.
        energy: pooled as the "mean" or the "max" of the squares.
        kernel: taps of the 1-D convolution across channels, 0 for none.
        relative: energies are relative to the "channel"'s usual one, or to the "layer"'s.
        transforms: where gates go.
        freeze: channels open on at most this share of images are removed by `harden`.
        rest: what `harden` makes of the others: gates stay ("dynamic"), or all are opened and a
            plain codec is left ("open").
        round_to: frozen widths are multiples of this.
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


class Gate(nn.Module):
    """One gate in front of one convolution: which of its input channels are open, per image.

    score = conv1d((energy / scale)^(1/4)), open where score >= threshold; energy is the mean (or
    the largest) square of a channel over the image (over `GRID` evenly spaced pixels of a larger
    one), scale its running mean over images (or the layer's). At least one channel is always open.
    While thresholds learn, the step may be a ramp of width `softness`: channels fade before they
    close.

    Args:
        channels: C, input channels of the convolution.
        energy: "mean" or "max" over the pixels.
        kernel: taps of the 1-D convolution across channels, odd; 0 for none.
        relative: energies are relative to the "channel"'s own running mean or to the "layer"'s.

    Attributes:
        threshold: alpha, shape (C,), below every score at the start: everything is open.
        scale: usual energy of each channel, or of the layer for all of them, shape (C,).
        gain: by what the input is to be multiplied before its energy is taken, shape (C,): 1,
            unless a rate's scaling went into the weights.
        place: where each channel was among the `width` that the gate was learnt with; those removed
            since count as usual in the mixing.
        open_rate: how often each channel was open, running mean, shape (C,).
        importance: squared gradient of the loss by the gate, running mean, shape (C,).
    """

    scale: Tensor
    gain: Tensor
    place: Tensor
    width: Tensor
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
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("open_rate", torch.ones(channels))
        self.register_buffer("importance", torch.zeros(channels))
        self.register_buffer("softness", torch.zeros(()))
        self.learns = True
        self._current: Tensor | None = None
        self.open = torch.ones(channels, dtype=torch.bool)
        self.fraction = 1.0
        self.recorded: list[Tensor] | None = None

    def current(self) -> Tensor:
        """Thresholds as they were put last: an optimiser that was given them may have moved them
        since.
        """
        return self.threshold.data if self._current is None else self._current.to(self.threshold)

    def write(self, threshold: Tensor) -> None:
        """Set the thresholds while they learn; their gradient has been used."""
        self.threshold.data.copy_(threshold)
        self._current = threshold.clone()
        self.threshold.grad = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._current = None

    def sample(self, x: Tensor) -> Tensor:
        """The pixels that energy is pooled over; `fraction` says how many of all they are."""
        step = sampling_step(x.shape[2], x.shape[3])
        some = x[:, :, ::step, ::step] if step > 1 else x
        self.fraction = some[0, 0].numel() / x[0, 0].numel()
        return some

    def pool(self, x: Tensor) -> Tensor:
        """Energy of each channel of sampled pixels, float32, shape (B, C)."""
        squares = x.float().square() if self.energy_of == "max" else x.square()
        energy = (
            squares.amax((2, 3))
            if self.energy_of == "max"
            else squares.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        )
        return energy * self.gain.to(energy).square()

    def scores(self, energy: Tensor) -> Tensor:
        """What thresholds are compared with, shape (B, C)."""
        relative = (
            (energy / self.scale.clamp_min(1e-12)).clamp_min(1e-8).pow(1 / ROOT)
            if int(self.seen)
            else torch.ones_like(energy)
        )
        if self.mix is None:
            return relative
        with torch.autocast(relative.device.type, enabled=False):
            mix = self.mix.to(relative.dtype).view(1, 1, -1)
            if (width := int(self.width)) > self.channels:
                relative = relative.new_ones(len(relative), width).index_copy(
                    1, self.place, relative
                )
            mixed = F.conv1d(relative.unsqueeze(1), mix, padding=self.mix.numel() // 2).squeeze(1)
            return mixed.index_select(1, self.place) if width > self.channels else mixed

    def forward(self, x: Tensor) -> Tensor:
        """Return 1 for open and 0 for closed channels of each image, shape (B, C); in training with
        a straight-through gradient.
        """
        # Thresholds and mixing learn from energies; features do not, which would cost another pass.
        return self.decide(self.pool(self.sample(x.detach())))

    def decide(self, energy: Tensor) -> Tensor:
        """The same from energies."""
        if self.training and self.learns:
            with torch.no_grad():
                if self._current is None:
                    self._current = self.threshold.detach().clone()
                memory = min(EMA, int(self.seen) / (int(self.seen) + 1))  # a plain mean at first
                usual = (
                    energy.mean(0)
                    if self.relative == "channel"
                    else energy.mean().expand(self.channels)
                )
                self.scale.mul_(memory).add_(usual.to(self.scale), alpha=1 - memory)
                self.seen += 1
        margin = self.scores(energy) - self.threshold.to(energy.dtype)
        hard = opened(margin)
        if self.recorded is not None:
            self.recorded.append(margin.detach())
        if not self.training:
            self.open = hard[0].detach() > 0
            return hard
        if self.learns:
            self.open_rate.mul_(EMA).add_(hard.detach().mean(0).to(self.open_rate), alpha=1 - EMA)
        if not torch.is_grad_enabled() or not self.learns:
            return hard.detach()
        soft = torch.sigmoid(margin / TEMPERATURE)
        if float(self.softness) > 0:
            fading = (margin.detach() / self.softness + 0.5).clamp(0, 1)
            hard = fading.scatter(1, margin.argmax(1, keepdim=True), 1.0)
        gates = hard + (soft - soft.detach())
        gates.register_hook(self._learn_importance)
        return gates

    def _learn_importance(self, gradient: Tensor) -> None:
        squared = gradient.detach().square().sum(0)
        if bool(torch.isfinite(squared).all()):
            self.importance.mul_(EMA).add_(squared.to(self.importance), alpha=1 - EMA)


def opened(margin: Tensor) -> Tensor:
    """1 for channels whose score is not below the threshold, and for the best of each image in any
    case, shape (B, C).
    """
    return (margin >= 0).to(margin).scatter(1, margin.argmax(1, keepdim=True), 1.0)


def sampling_step(height: int, width: int) -> int:
    """Every how manieth row and column is pooled over."""
    step = max(1, math.isqrt(height * width // GRID))
    while -(-height // step) * -(-width // step) > GRID:
        step += 1
    return step


class Power(nn.Module):
    """Running mean of what one GDN pools, shape (C,)."""

    value: Tensor
    seen: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("value", torch.zeros(channels))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.learns = True
        self.recorded: list[Tensor] | None = None

    @property
    def measures(self) -> bool:
        """Whether the input is looked at."""
        return (self.training and self.learns) or self.recorded is not None

    def add(self, power: Tensor) -> None:
        """Take one image's power in."""
        if self.recorded is not None:
            self.recorded.append(power)
            return
        memory = min(EMA, int(self.seen) / (int(self.seen) + 1))
        self.value.mul_(memory).add_(power.to(self.value), alpha=1 - memory)
        self.seen += 1


def input_sizes(codec: nn.Module, names: list[str]) -> dict[str, int]:
    """Pixels of each of these layers' input for a 64x64 image."""
    sizes: dict[str, int] = {}
    handles = [
        codec.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: sizes.__setitem__(name, args[0].shape[2] * args[0].shape[3])
        )
        for name in names
    ]
    modes = {module: module.training for module in codec.modules()}
    image = example_image(codec)
    try:
        with torch.no_grad():
            forward_for_analysis(codec.eval(), image)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    area = image.shape[2] * image.shape[3]
    return {name: size * SIZE_MULTIPLE**2 // area for name, size in sizes.items()}


@contextmanager
def recording(gates: Mapping[str, Gate], powers: Mapping[str, Power]) -> Iterator[None]:
    """Keep every image's margins and powers inside the block, in `recorded`."""
    parts: list[Any] = [*gates.values(), *powers.values()]
    for part in parts:
        part.recorded = []
    try:
        yield
    finally:
        for part in parts:
            part.recorded = None


def key_of(name: str) -> str:
    """A module's name as a key of a ModuleDict, where a dot would be a path."""
    return name.replace(".", "/")


def gatable(codec: nn.Module, groups: Groups, transforms: Sequence[str]) -> list[str]:
    """Names of the convolutions that a gate can stand in front of: in these transforms, not
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
    modules = dict(codec.named_modules())
    for name, kind in kinds_in(codec).items():
        if not kind.convolution or transform_of(name) not in transforms:
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
        raise CodecError(
            f"no convolution of {type(codec).__name__} can have a gate:"
            f" {'; '.join(sorted(reasons)[:3]) or 'none in ' + ', '.join(transforms)}"
        )
    found = {transform_of(name) for name in names}
    if missing := [t for t in transforms if t not in found and set(transforms) != set(GATED)]:
        raise RecipeError(
            f"transforms: no convolution of {missing[0]} can have a gate; those of"
            f" {', '.join(sorted(found))} can"
        )
    return names
