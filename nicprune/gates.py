"""Gates in front of convolutions: channels of little energy are closed for the image at hand, and not computed with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nicprune.channels import Groups
from nicprune.codecs import FACTOR, forward_for_analysis, transform_of
from nicprune.errors import CodecError, RecipeError
from nicprune.hooks import Hook, remove_hooks

TEMPERATURE = 0.25
"""Width of the sigmoid that stands for the step in the backward pass, in units of the score."""

ROOT = 4
"""Scores are this root of the relative energy: energies of images differ by orders of magnitude, and a channel that matters
little is to close on most images at once, not on the flat ones first."""

START = -0.5
"""Thresholds at the start: no score is below."""

MEMORY = 0.95
"""Share of the past in the running means of energies and of how often a channel is open."""

PAYS_BELOW = 0.95
"""Density from which on gathering the open channels costs more than computing with the closed ones saves."""

GRID = 4096
"""Pixels that an energy is pooled over at most: evenly spaced ones of a larger map say the same, at a part of the cost."""

GATED = ("g_a", "h_a", "h_s", "g_s")
"""Transforms that may have gates. Context models run pixel by pixel when decoding: a pooled energy would differ from training's."""


class Gate(nn.Module):
    """One gate in front of one convolution: which of its input channels are open, per image.

    score = conv1d((energy / scale)^(1/4)), open where score >= threshold; energy is the mean (or the largest) square of a channel
    over the image (over `GRID` evenly spaced pixels of a larger one), scale its running mean over images (or the layer's). At least one channel is always open. While thresholds
    learn, the step may be a ramp of width `softness`, so that channels fade before they close.

    Args:
        channels: C, input channels of the convolution.
        energy: "mean" or "max" over the pixels.
        kernel: taps of the 1-D convolution across channels, odd; 0 for none.
        relative: energies are relative to the "channel"'s own running mean or to the "layer"'s.

    Attributes:
        threshold: alpha, shape (C,), below every score at the start: everything is open.
        scale: usual energy of each channel, or of the layer for all of them, shape (C,).
        gain: by what the input is to be multiplied before its energy is taken, shape (C,): 1, unless a rate's scaling went into the weights.
        place: where each channel was among the `width` that the gate was learnt with; those removed since count as usual in the mixing.
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

    def __init__(self, channels: int, energy: Literal["mean", "max"], kernel: int, relative: Literal["channel", "layer"]):
        super().__init__()
        self.channels, self.energy_of, self.relative = channels, energy, relative
        self.threshold = nn.Parameter(torch.full((channels,), START))
        self.mix = nn.Parameter(F.one_hot(torch.tensor(kernel // 2), kernel).float()) if kernel else None
        self.register_buffer("scale", torch.zeros(channels))
        self.register_buffer("gain", torch.ones(channels))
        self.register_buffer("place", torch.arange(channels))
        self.register_buffer("width", torch.tensor(channels))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("open_rate", torch.ones(channels))
        self.register_buffer("importance", torch.zeros(channels))
        self.register_buffer("softness", torch.zeros(()))
        self.learns = True
        self.open = torch.ones(channels, dtype=torch.bool)
        self.fraction = 1.0
        self.recorded: list[Tensor] | None = None

    def sample(self, x: Tensor) -> Tensor:
        """The pixels that energy is pooled over; `fraction` says how many of all they are."""
        step = sampling_step(x.shape[2], x.shape[3])
        some = x[:, :, ::step, ::step] if step > 1 else x
        self.fraction = some[0, 0].numel() / x[0, 0].numel()
        return some

    def pool(self, x: Tensor) -> Tensor:
        """Energy of each channel of sampled pixels, float32, shape (B, C)."""
        squares = x.float().square() if self.energy_of == "max" else x.square()
        energy = squares.amax((2, 3)) if self.energy_of == "max" else squares.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        return energy * self.gain.to(energy).square()

    def scores(self, energy: Tensor) -> Tensor:
        """What thresholds are compared with, shape (B, C)."""
        relative = (energy / self.scale.clamp_min(1e-12)).clamp_min(1e-8).pow(1 / ROOT) if int(self.seen) else torch.ones_like(energy)
        if self.mix is None:
            return relative
        with torch.autocast(relative.device.type, enabled=False):
            mix = self.mix.to(relative.dtype).view(1, 1, -1)
            if (width := int(self.width)) > self.channels:
                relative = relative.new_ones(len(relative), width).index_copy(1, self.place, relative)
            mixed = F.conv1d(relative.unsqueeze(1), mix, padding=self.mix.numel() // 2).squeeze(1)
            return mixed.index_select(1, self.place) if width > self.channels else mixed

    def forward(self, x: Tensor) -> Tensor:
        """Return 1 for open and 0 for closed channels of each image, shape (B, C); in training with a straight-through gradient."""
        return self.decide(self.pool(self.sample(x.detach())))  # thresholds learn from it; features do not, which would cost another pass

    def decide(self, energy: Tensor) -> Tensor:
        """The same from energies."""
        if self.training and self.learns:
            with torch.no_grad():
                memory = min(MEMORY, int(self.seen) / (int(self.seen) + 1))  # a plain mean at first
                usual = energy.mean(0) if self.relative == "channel" else energy.mean().expand(self.channels)
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
            self.open_rate.mul_(MEMORY).add_(hard.detach().mean(0).to(self.open_rate), alpha=1 - MEMORY)
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
            self.importance.mul_(MEMORY).add_(squared.to(self.importance), alpha=1 - MEMORY)


def opened(margin: Tensor) -> Tensor:
    """1 for channels whose score is not below the threshold, and for the best of each image in any case, shape (B, C)."""
    return (margin >= 0).to(margin).scatter(1, margin.argmax(1, keepdim=True), 1.0)


def sampling_step(height: int, width: int) -> int:
    """Every how manieth row and column is pooled over."""
    step = max(1, math.isqrt(height * width // GRID))
    while -(-height // step) * -(-width // step) > GRID:
        step += 1
    return step


class GateHook(Hook):
    """Puts a gate in front of one convolution, and computes with the open channels alone where that is possible."""

    def __init__(self, gate: Gate):
        self.owner = self.gate = gate
        self.skips = True
        self.given: Tensor | None = None  # which channels a GDN in front of the layer has left out already
        self._narrowed = False

    def may_skip(self, x: Tensor) -> bool:
        """Whether channels can be left out: one image, nothing to learn from it."""
        return self.skips and x.shape[0] == 1 and not self.gate.training and not torch.is_grad_enabled()

    def pays(self) -> bool:
        """Whether enough are closed."""
        return float(self.gate.open.float().mean()) < PAYS_BELOW

    def before(self, layer: Any, args: Any) -> Any:
        """Close channels of the layer's input."""
        x: Tensor = args[0]
        index, self.given = self.given, None
        if index is None:
            gates = self.gate(x)
            if not self.may_skip(x) or not self.pays():
                return None if self.may_skip(x) and bool(self.gate.open.all()) else (x * gates[..., None, None].to(x.dtype), *args[1:])
            index = self.gate.open.nonzero().flatten()
            x = gather(x, index)
        # Another method's masked weight may stand in front of the layer's own already: it is narrowed like it, and goes with it.
        layer.__dict__["weight"] = layer.weight.index_select(0 if isinstance(layer, nn.ConvTranspose2d) else 1, index)
        self._narrowed = True
        return (x, *args[1:])

    def __call__(self, layer: Any, args: Any, output: Any) -> None:
        if self._narrowed:
            layer.__dict__.pop("weight", None)
            self._narrowed = False


class NormHook(Hook):
    """Lets a GDN compute only those channels that the gate behind it leaves open. Which ones, its output at some pixels says."""

    def __init__(self, behind: GateHook):
        self.behind = behind
        self.owner = self.gate = behind.gate
        self._whole: Tensor | None = None

    def before(self, layer: Any, args: Any) -> Any:
        """Hand the layer those pixels alone that the gate looks at."""
        x: Tensor = args[0]
        self.behind.given = self._whole = None
        if not self.behind.may_skip(x) or sampling_step(x.shape[2], x.shape[3]) == 1:
            return None
        self._whole = x
        return (self.gate.sample(x), *args[1:])

    def __call__(self, layer: Any, args: Any, output: Any) -> Any:
        x, self._whole = self._whole, None
        if x is None or output is None:
            return None
        self.gate.decide(self.gate.pool(output))
        if not self.behind.pays():
            return type(layer).forward(layer, x)
        index = self.behind.given = self.gate.open.nonzero().flatten()
        gamma, beta = layer.gamma_reparam(layer.gamma)[index], layer.beta_reparam(layer.beta)[index]
        simple = type(layer).__name__ == "GDN1"
        pooled = F.conv2d(x.abs() if simple else x.square(), gamma[..., None, None], beta)
        norm = pooled if simple else pooled.sqrt_()
        x = gather(x, index)
        return x.mul_(norm) if layer.inverse else x.div_(norm)


class PowerHook(Hook):
    """Measures what a GDN pools: the mean square (GDN1: absolute value) of each input channel."""

    def __init__(self, power: Power, simple: bool):
        self.owner = self.power = power
        self.simple = simple

    def before(self, layer: Any, args: Any) -> None:
        """Take the mean over the first image of a batch."""
        if self.power.measures:
            with torch.no_grad():
                x = args[0][:1].detach().float()
                self.power.add((x.abs() if self.simple else x.square()).mean((0, 2, 3)))


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
        memory = min(MEMORY, int(self.seen) / (int(self.seen) + 1))
        self.value.mul_(memory).add_(power.to(self.value), alpha=1 - memory)
        self.seen += 1


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Some channels of (1, C, H, W), in the memory format that it has: rows of pixels are copied several times faster than planes of strides."""
    if not x.is_contiguous(memory_format=torch.channels_last) or x.shape[1] == 1:
        return x.index_select(1, index)
    _, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels).index_select(1, index)
    return rows.view(1, height, width, -1).permute(0, 3, 1, 2)


def pooled_before(codec: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """The convolution behind each GDN that nothing else reads and nothing else changes, by the GDN's name, among those named."""
    modules = dict(codec.named_modules())
    found = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        before = f"{parent}.{int(last) - 1}" if last.isdigit() else ""
        if type(modules.get(parent)) is nn.Sequential and type(modules.get(before)).__name__ in ("GDN", "GDN1"):
            if not any(isinstance(hook := getattr(e, "__self__", e), Hook) and hook.scales for e in modules[name]._forward_pre_hooks.values()):
                found[before] = name
    return found


def hang(codec: nn.Module, gates: Mapping[str, Gate], powers: Mapping[str, Power], pools: Mapping[str, str]) -> None:
    """Put gates in front of convolutions, power meters in front of GDNs, and between the two what lets a GDN skip, by module name."""
    modules = dict(codec.named_modules())
    hooks = {name: GateHook(gate) for name, gate in gates.items()}
    for name, hook in hooks.items():
        modules[name].register_forward_pre_hook(hook.before)
        modules[name].register_forward_hook(hook, always_call=True)
    for name, power in powers.items():
        layer = modules[name]
        layer.register_forward_pre_hook(PowerHook(power, type(layer).__name__ == "GDN1").before)
    for name, convolution in pools.items():
        norm = NormHook(hooks[convolution])
        modules[name].register_forward_pre_hook(norm.before)
        modules[name].register_forward_hook(norm, always_call=True)


def unhang(codec: nn.Module, owners: set[int]) -> None:
    """Take the hooks of these modules (by id) off again."""
    remove_hooks(codec, lambda hook: id(hook.owner) in owners)


def set_skipping(codec: nn.Module, skips: bool) -> None:
    """Whether closed channels are left out of the computation, or multiplied by zero: the same output, for tests and timing."""
    for module in codec.modules():
        for entry in module._forward_pre_hooks.values():
            hook = getattr(entry, "__self__", None)
            if isinstance(hook, GateHook):
                hook.skips = skips


def input_sizes(codec: nn.Module, names: list[str]) -> dict[str, int]:
    """Pixels of each of these layers' input for a 64x64 image."""
    sizes: dict[str, int] = {}
    handles = [
        codec.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: sizes.__setitem__(name, args[0].shape[2] * args[0].shape[3]))
        for name in names
    ]
    modes = {module: module.training for module in codec.modules()}
    parameter = next(codec.parameters())
    try:
        with torch.no_grad():
            forward_for_analysis(codec.eval(), torch.full((1, 3, FACTOR, FACTOR), 0.5, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return sizes


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
    """Names of the convolutions that a gate can stand in front of: in these transforms, not depthwise, not reading the image.

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
    for name, module in codec.named_modules():
        if type(module) not in (nn.Conv2d, nn.ConvTranspose2d) or transform_of(name) not in transforms:
            continue
        layer: Any = module
        if layer.groups > 1:
            reasons.add(f"{name} is grouped")
        elif read.get(name) != layer.in_channels:
            reasons.add(f"{name} reads the image, or channels that cannot be followed")
        else:
            names.append(name)
    if not names:
        raise CodecError(f"no convolution of {type(codec).__name__} can have a gate: {'; '.join(sorted(reasons)[:3]) or 'none in ' + ', '.join(transforms)}")
    found = {transform_of(name) for name in names}
    if missing := [t for t in transforms if t not in found and set(transforms) != set(GATED)]:
        raise RecipeError(f"transforms: no convolution of {missing[0]} can have a gate; those of {', '.join(sorted(found))} can")
    return names
