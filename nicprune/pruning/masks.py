"""Masks on channel groups: they learn which channels go, and are folded into the weights then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nicprune.channels.groups import Group, Groups, Norms
from nicprune.codecs.anatomy import rate_distortion_loss
from nicprune.codecs.calling import run
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.hooks import Hook, remove_hooks
from nicprune.codecs.kernel_faults import StridedPointwiseBySlicing
from nicprune.codecs.layer_kinds.kind import LayerKind, channel_kind
from nicprune.codecs.layer_kinds.norms import learns_by_running
from nicprune.codecs.layer_kinds.parameters import holder, layers_of
from nicprune.codecs.layer_operations import zero
from nicprune.codecs.modes import left_as_it_was
from nicprune.common.errors import DataError

PRESENT = 0.1
"""Mask above which a channel counts in the statistics of a norm over channels."""


class Masks(nn.Module):
    """One mask value per channel of some groups, behind the bias of every producer, before GDN or
    activation.

    A convolution's weight and bias are multiplied while it runs, which is the same as multiplying
    its output and costs almost nothing; its parameters stay its own. Masked convolutions and
    entropy bottlenecks have their output multiplied. Layers that add a value to each channel are
    masked too, so that a removed channel stays zero behind them. Norms over channels compute their
    statistics with those whose mask is above `PRESENT`, or that are known to stay.

    Args:
        groups: those that are masked.
        norms: whether norms over channels are among them; see `analyse`.
    """

    stays: Tensor

    def __init__(self, groups: Sequence[Any], norms: Norms = "pinned"):
        super().__init__()
        self.names = [g.name for g in groups]
        self.values = nn.ParameterList(nn.Parameter(torch.ones(g.width)) for g in groups)
        self._sizes = [g.width for g in groups]
        stays = torch.zeros(sum(self._sizes), dtype=torch.bool)
        self.register_buffer("stays", stays, persistent=norms == "adapt")

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.values[self.names.index(name)]

    def present(self, position: int) -> Tensor:
        """Return which channels of a group count in norms over channels, at least one of them."""
        value = self.values[position].detach()
        known = self.stays.split(self._sizes)[position]
        return (value > PRESENT) | known & (value != 0) | (value == value.max())

    def attach(self, codec: nn.Module, groups: Groups) -> None:
        """Hook every layer that these groups are masked at."""
        modules = layers_of(codec)
        for module_name, parts in self._sources(modules, groups).items():
            layer = modules[module_name]
            hook = MaskHook(self, parts, layer)
            holder(layer).register_forward_pre_hook(hook.before)
            holder(layer).register_forward_hook(hook, always_call=True)

    def _sources(
        self, modules: Mapping[str, Any], groups: Groups
    ) -> dict[str, list[tuple[int, np.ndarray]]]:
        """Return the masks, by position, that govern channels of each layer that is masked."""
        sources: dict[str, list[tuple[int, np.ndarray]]] = {}
        for position, name in enumerate(self.names):
            for member in groups[name].members:
                if channel_kind(modules[member.module]).masked(member.axis):
                    sources.setdefault(member.module, []).append((position, member.index))
        return sources

    def detach(self, codec: nn.Module) -> None:
        """Remove the hooks of these masks."""
        remove_hooks(codec, lambda hook: hook.owner is self)

    def factors(self, codec: nn.Module, groups: Groups) -> dict[str, Tensor]:
        """Return what each producer's output channels are multiplied by, by its name, shape
        (C,).
        """
        modules = layers_of(codec)
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
        """Multiply the parameters of everything that is masked by the masks, in place."""
        modules, place = layers_of(codec), next(codec.parameters())
        for name, parts in self._sources(modules, groups).items():
            layer = modules[name]
            kind = channel_kind(layer)
            hook = MaskHook(self, parts, layer)
            factor = hook.share().detach().to(place)
            values = multiplied(kind, layer, factor)
            if values is not None:
                kind.write(layer, values)
            gone = ~hook.counted() if kind.mixes else factor == 0
            if values is None or kind.mixes and bool(gone.any()):
                zero(layer, "both", gone.nonzero().flatten().tolist())


def multiplied(kind: LayerKind, layer: Any, factor: Tensor) -> dict[str, Tensor] | None:
    """Return a layer's parameters, by name, with its output channels multiplied, factor of shape
    (C,); None where parameters cannot do that.
    """
    values = kind.masked_attributes(layer, factor)
    if values is None and kind.convolution:
        values = {"weight": layer.weight * kind.along(layer, "out", factor)}
        if layer.bias is not None:
            values["bias"] = layer.bias * factor
    return values


class MaskHook(Hook):
    """Multiplies one layer by its masks."""

    names: list[str] | None

    def __init__(self, masks: Masks, parts: Sequence[tuple[int, np.ndarray]], layer: Any):
        self.owner = self.masks = masks
        self.layer, self.names = layer, None
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
        """Return the mask of each output channel."""
        return self._gathered(lambda position: self.masks.values[position])

    def counted(self) -> Tensor:
        """Return which channels count in a norm over channels."""
        return self._gathered(self.masks.present)

    def _gathered(self, of: Callable[[int], Tensor]) -> Tensor:
        """Return the entry of each output channel, from those of a group's channels by its
        position.
        """
        if self.gather is None:
            return of(self.position)
        values = [of(p) for p in self.parts]
        if self.gather.device != values[0].device:
            self.gather = self.gather.to(values[0].device)
        return torch.cat([values[0].new_ones(1), *values])[self.gather]

    def before(self, module: Any, args: Any) -> None:
        """Put masked parameters in front of the module's own for the length of the call."""
        # Another method's masked parameters may stand there already: both masks count.
        values = self.kind.masked_attributes(self.layer, self.share())
        if values is not None:
            module.__dict__.update(values)
            self.names = list(values)

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        found = None
        if self.kind.mixes and output is not None and not bool((counted := self.counted()).all()):
            found = self.kind.on_some(self.layer, args[0], counted)
        if self.names is not None:
            for name in self.names:
                module.__dict__.pop(name, None)
        if self.names is not None or self.kind.mixes or output is None:
            return found
        first = output[0] if isinstance(output, tuple) else output
        shape = [1] * first.dim()
        shape[self.kind.channel_dim(self.layer, first)] = -1
        factor = self.kind.on_output(self.share()).view(shape)
        return (first * factor, *output[1:]) if isinstance(output, tuple) else output * factor


def importance(
    codec: nn.Module,
    groups: Groups,
    which: Sequence[Group],
    images: Sequence[Tensor],
    lmbda: float,
    metric: str,
) -> dict[str, Tensor]:
    """Return how much the rate-distortion loss depends on each channel: the squared gradient by a
    mask on it, summed over images.

    Args:
        images: (1, 3, H, W) in [0, 1], sides multiples of 64.

    Returns: by group, shape (width,), float32.
    """
    masks = Masks(which).to(next(codec.parameters()).device)
    total = [torch.zeros_like(value) for value in masks.values]
    loss = rate_distortion_loss(lmbda, metric)
    if metric == "ms-ssim" and min(min(image.shape[-2:]) for image in images) < 192:
        raise DataError(
            "importance for ms-ssim needs images of at least 192 pixels on each side: five scales"
            " of an 11-pixel window"
        )
    masks.attach(codec, groups)
    try:
        # Noise in place of rounding has gradients; it is drawn apart from everybody else's.
        with (
            torch.enable_grad(),
            torch.random.fork_rng(),  # of every device, all of which are seeded
            StridedPointwiseBySlicing(),
            left_as_it_was(codec),
        ):
            torch.manual_seed(0)
            codec.train()
            for layer in codec.modules():
                if learns_by_running(layer):  # the codec is looked at, not trained
                    layer.eval()
            for image in images:
                found = torch.autograd.grad(
                    loss(run(codec, image), image)["loss"], list(masks.values), allow_unused=True
                )
                for sum_, gradient in zip(total, found, strict=True):
                    if gradient is not None and bool(torch.isfinite(gradient).all()):
                        sum_ += gradient.square()
    finally:
        masks.detach(codec)
    return {name: value.detach() for name, value in zip(masks.names, total, strict=True)}


def masked_copy(codec: nn.Module, keep: Mapping[str, np.ndarray], groups: Groups) -> nn.Module:
    """Return a copy of full size whose removed channels are zero at every producer."""
    masked = copy_codec(codec)
    mask_channels(masked, keep, groups)
    return masked


def mask_channels(codec: nn.Module, keep: Mapping[str, np.ndarray], groups: Groups) -> None:
    """Make the removed channels zero at every producer, in place."""
    modules = layers_of(codec)
    for name, kept in keep.items():
        gone = np.setdiff1d(np.arange(groups[name].width), kept)
        for member in groups[name].members:
            zero(modules[member.module], member.axis, member.index[gone].ravel().tolist())
