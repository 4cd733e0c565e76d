"""Masks on channel groups: what learns which channels go, folded into the weights when it
is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nicprune.channels.groups import Group, Groups
from nicprune.codecs.anatomy import rate_distortion_loss
from nicprune.codecs.hooks import Hook, remove_hooks
from nicprune.codecs.kernel_faults import strided_pointwise_by_slicing
from nicprune.codecs.layer_kinds import channel_kind
from nicprune.codecs.layer_kinds.operations import zero


class Masks(nn.Module):
    """One mask value per channel of some groups, behind the bias of every producer, before GDN or
    activation.

    A convolution's weight and bias are multiplied while it runs, which is the same as multiplying
    its output and costs almost nothing; its parameters stay its own. Masked convolutions and
    entropy bottlenecks have their output multiplied.
    """

    def __init__(self, groups: Sequence[Any]):
        super().__init__()
        self.names = [g.name for g in groups]
        self.values = nn.ParameterList(nn.Parameter(torch.ones(g.width)) for g in groups)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.values[self.names.index(name)]

    def attach(self, codec: nn.Module, groups: Groups) -> None:
        """Hook every producer of these groups."""
        modules = dict(codec.named_modules())
        sources: dict[str, list[tuple[int, np.ndarray]]] = {}
        for position, name in enumerate(self.names):
            for member in groups[name].members:
                if channel_kind(modules[member.module]).masked(member.axis):
                    sources.setdefault(member.module, []).append((position, member.index))
        for module_name, parts in sources.items():
            hook = MaskHook(self, parts, modules[module_name])
            modules[module_name].register_forward_pre_hook(hook.before)
            modules[module_name].register_forward_hook(hook, always_call=True)

    def detach(self, codec: nn.Module) -> None:
        """Remove the hooks of these masks."""
        remove_hooks(codec, lambda hook: hook.owner is self)

    def factors(self, codec: nn.Module, groups: Groups) -> dict[str, Tensor]:
        """By what each producer's output channels are multiplied, by its name, shape (C,)."""
        modules = dict(codec.named_modules())
        found: dict[str, Tensor] = {}
        for position, name in enumerate(self.names):
            value = self.values[position].detach()
            for member in groups[name].members:
                if member.axis != "out":
                    continue
                layer = modules[member.module]
                width = channel_kind(layer).widths(layer)[0]
                factor = found.setdefault(member.module, value.new_ones(width))
                for column in member.index.T:
                    factor[torch.from_numpy(column)] = value
        return found

    @torch.no_grad()
    def fold(self, codec: nn.Module, groups: Groups) -> None:
        """Multiply the producers' weights and biases by the masks, in place."""
        modules = dict(codec.named_modules())
        for name, factor in self.factors(codec, groups).items():
            layer = modules[name]
            factor = factor.to(layer.weight)
            layer.weight.mul_(channel_kind(layer).along(layer, "out", factor))
            if layer.bias is not None:
                layer.bias.mul_(factor)
        for position, name in enumerate(self.names):
            gone = (self.values[position] == 0).nonzero().flatten().tolist()
            for member in groups[name].members:
                if member.axis == "both":
                    zero(modules[member.module], "both", gone)


class MaskHook(Hook):
    """Multiplies one producer by its masks."""

    def __init__(self, masks: Masks, parts: Sequence[tuple[int, np.ndarray]], layer: nn.Module):
        self.owner = self.masks = masks
        self.kind = channel_kind(layer)
        width = self.kind.widths(layer)[0]
        self.position = parts[0][0]
        # Entry 0 of the joined masks is the constant 1, for channels that no mask governs.
        gather, offset = np.zeros(width, np.int64), 1
        for position, index in parts:
            count = len(masks.values[position])
            for column in index.T:
                gather[column] = offset + np.arange(count)
            offset += count
        self.parts = [position for position, _ in parts]
        whole = len(parts) == 1 and np.array_equal(gather, np.arange(1, width + 1))
        self.gather = None if whole else torch.from_numpy(gather)

    def share(self) -> Tensor:
        """The mask of each output channel."""
        if self.gather is None:
            return self.masks.values[self.position]
        values = [self.masks.values[p] for p in self.parts]
        if self.gather.device != values[0].device:
            self.gather = self.gather.to(values[0].device)
        return torch.cat([values[0].new_ones(1), *values])[self.gather]

    def before(self, layer: Any, args: Any) -> None:
        """Put masked parameters in front of the layer's own for the length of the call."""
        if self.kind.mask_on_weight:
            factor = self.share()
            # Another method's masked parameters may stand there already: both masks count.
            layer.__dict__["weight"] = layer.weight * self.kind.along(layer, "out", factor)
            if layer.bias is not None:
                layer.__dict__["bias"] = layer.bias * factor

    def __call__(self, layer: Any, args: Any, output: Any) -> Any:
        if self.kind.mask_on_weight:
            layer.__dict__.pop("weight", None)
            layer.__dict__.pop("bias", None)
            return None
        if output is None:
            return None
        factor = self.kind.on_output(self.share())
        factor = factor.view(1, -1, 1, 1)
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor


def importance(
    codec: nn.Module,
    groups: Groups,
    which: Sequence[Group],
    images: Sequence[Tensor],
    lmbda: float,
    metric: str,
) -> dict[str, Tensor]:
    """How much the rate-distortion loss minds the loss of each channel: the squared gradient by a
    mask on it, summed over images.

    Args:
        images: (1, 3, H, W) in [0, 1], sides multiples of 64.

    Returns: by group, shape (width,), float32.
    """
    masks = Masks(which).to(next(codec.parameters()).device)
    total = [torch.zeros_like(value) for value in masks.values]
    loss, training = rate_distortion_loss(lmbda, metric), codec.training
    masks.attach(codec, groups)
    try:
        # Noise in place of rounding has gradients; it is drawn apart from everybody else's.
        with torch.enable_grad(), torch.random.fork_rng(), strided_pointwise_by_slicing(codec):
            torch.manual_seed(0)
            codec.train()
            for image in images:
                found = torch.autograd.grad(
                    loss(codec(image), image)["loss"], list(masks.values), allow_unused=True
                )
                for sum_, gradient in zip(total, found, strict=True):
                    if gradient is not None and bool(torch.isfinite(gradient).all()):
                        sum_ += gradient.square()
    finally:
        masks.detach(codec)
        codec.train(training)
    return {name: value.detach() for name, value in zip(masks.names, total, strict=True)}
