"""Follow every channel through a codec's forward pass.

Each channel gets a number. A layer that computes new channels gives out new numbers; an addition, a
GDN, an entropy model ties the numbers of what it joins; chunks, concatenations and pixel shuffles
carry them along, because the same operation is run on a tensor of numbers. Whatever is not
understood pins the channels it touches: they are never removed, so what comes behind is safe too.
Nothing here knows one architecture from another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from compressai.layers import GDN, GDN1, CheckerboardMaskedConv2d, MaskedConv2d
from compressai.ops import LowerBound
from torch import Tensor, nn

from nicprune.channels.propagation import ChannelIds, ChannelPropagator
from nicprune.codecs.anatomy import forward_for_analysis, is_bottleneck, is_conditional

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, MaskedConv2d, CheckerboardMaskedConv2d)
NORMALISATIONS = (GDN, GDN1)


@dataclass
class LayerChannels:
    """One layer's channels: the numbers along its output ("out"), input ("in") or both, where they
    are the same.
    """

    module: str
    axis: str
    ids: np.ndarray


class Tracer(ChannelPropagator):
    """Runs a codec once on a small image and records which channels belong together."""

    def __init__(self, codec: nn.Module):
        super().__init__(type(codec).__name__)
        self.codec = codec
        self.uses: dict[tuple[str, str], LayerChannels] = {}
        self.calls: list[str] = []
        self.latents: dict[int, str] = {}
        self.conditional = any(is_conditional(m) for m in codec.modules())

    # -- running ----------------------------------------------------------------------------------

    def run(self, size: int = 64) -> None:
        """Trace the codec on a `size` x `size` image. The codec is left as it was, mode
        included.
        """
        first = next((p for p in self.codec.parameters() if p.is_floating_point()), torch.zeros(()))
        modes = {module: module.training for module in self.codec.modules()}
        with ExitStack() as stack, torch.no_grad():
            for module, training in modes.items():
                stack.callback(setattr, module, "training", training)
            self.codec.eval()
            for name, module in self.codec.named_modules():
                if self._rule(module) is not None and not is_bottleneck(module):
                    self._owner |= {id(p): name for p in module.parameters(recurse=False)}
                stack.callback(
                    module.register_forward_pre_hook(
                        self._enter(name, module), with_kwargs=True
                    ).remove
                )
                stack.callback(
                    module.register_forward_hook(
                        self._leave(name, module), with_kwargs=True, always_call=True
                    ).remove
                )
                if is_bottleneck(module):
                    # Medians are read outside the bottleneck's forward by straight-through
                    # quantisers.
                    ids = self.new(module.channels)
                    self.uses[name, "both"] = LayerChannels(name, "both", ids)
                    self.label(module.quantiles, ChannelIds(0, ids))
            generator = torch.Generator().manual_seed(0)
            image = torch.rand(1, 3, size, size, generator=generator).to(first.device, first.dtype)
            ids = self.new(3)
            self.mark_unprunable(ids, "image")
            self.label(image, ChannelIds(1, ids))
            with self:
                out = forward_for_analysis(self.codec, image)
            for key, value in out.items() if isinstance(out, dict) else [("output", out)]:
                labels = self.labels(value)
                if labels is not None:
                    self.mark_unprunable(labels.ids, "image" if key == "x_hat" else f"output {key}")
            for (name, _), use in self.uses.items():
                if name in self._misused:
                    self.mark_unprunable(use.ids, self._misused[name])
        self._labels.clear()

    def _enter(self, name: str, module: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            if self._rule(module) is not None:
                self._depth += 1

        return hook

    def _leave(self, name: str, module: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            rule = self._rule(module)
            if rule is not None:
                self._depth -= 1
                if self._depth == 0 and output is not None:
                    self.calls.append(name)
                    rule(name, module, [*args, *kwargs.values()], output)
            self._stack.pop()

        return hook

    # -- layers -----------------------------------------------------------------------------------

    def _rule(self, module: Any) -> Callable[..., None] | None:
        kind = type(module)
        if kind in (*CONVOLUTIONS, nn.Linear) and set(module._parameters) != {"weight", "bias"}:
            return None  # reparametrised: what is cut would be computed anew
        if kind in CONVOLUTIONS:
            return self._depthwise if module.groups > 1 else self._dense
        if kind is nn.Linear:
            return self._dense
        if kind in NORMALISATIONS or is_bottleneck(module):
            return self._same_width
        if is_conditional(module):
            return self._conditional
        if kind is LowerBound:
            return self._lower_bound
        return None

    def _consume(
        self, module: str, axis: str, labels: ChannelIds, ids: np.ndarray | None = None
    ) -> None:
        """Record that a layer reads these channels; at a second call the channels of both calls are
        tied.
        """
        if labels.nonzero:
            self.mark_unprunable(
                labels.ids, f"{labels.nonzero} before {module}: a zero channel is not a removed one"
            )
        if (module, axis) in self.uses:
            known = self.uses[module, axis].ids
            if len(known) != len(labels.ids):
                self.mark_unprunable(known, f"{module} is called with different widths")
                self.mark_unprunable(labels.ids, f"{module} is called with different widths")
            else:
                self.couple(known, labels.ids)
        else:
            self.uses[module, axis] = LayerChannels(
                module, axis, labels.ids if ids is None else ids
            )

    def _produce(self, module: str, width: int) -> np.ndarray:
        if (module, "out") not in self.uses:
            self.uses[module, "out"] = LayerChannels(module, "out", self.new(width))
        return self.uses[module, "out"].ids

    def _dense(self, name: str, module: Any, inputs: list[Any], output: Tensor) -> None:
        x, linear = inputs[0], isinstance(module, nn.Linear)
        labels = self.labels(x)
        axis = x.dim() - 1 if linear else x.dim() - 3
        if labels is not None and labels.dim != axis:
            # A linear layer on another dimension than the channels': they pass through, one by one.
            if linear:
                self.label(output, ChannelIds(labels.dim, labels.ids, f"linear layer {name}"))
            else:
                self.mark_unprunable(
                    labels.ids, f"{name} reads another dimension than the channels'"
                )
            self._misused[name] = f"{name} is also called on another dimension than the channels'"
            return
        if labels is None:
            labels = ChannelIds(axis, self.new(x.shape[axis]))
            self.mark_unprunable(labels.ids, f"constant input of {name}")
        self._consume(name, "in", labels)
        width = module.out_features if linear else module.out_channels
        self.label(
            output,
            ChannelIds(
                output.dim() - 1 if linear else output.dim() - 3, self._produce(name, width)
            ),
        )

    def _depthwise(self, name: str, module: Any, inputs: list[Any], output: Tensor) -> None:
        labels = self.labels(inputs[0])
        if labels is None:
            self._misused[name] = f"constant input of {name}"
            return
        if (
            module.groups == module.in_channels == module.out_channels
            and labels.dim == inputs[0].dim() - 3
        ):
            self._consume(name, "both", labels)
            # What a removed channel leaves behind is its bias.
            self.label(
                output,
                ChannelIds(
                    labels.dim, labels.ids, None if module.bias is None else f"bias of {name}"
                ),
            )
        else:
            self.mark_unprunable(labels.ids, f"grouped convolution {name}")
            self._misused[name] = f"grouped convolution {name}"

    def _same_width(self, name: str, module: nn.Module, inputs: list[Any], output: Any) -> None:
        labels = self.labels(inputs[0])
        if labels is None or labels.dim != 1:
            self._misused[name] = (
                f"constant input of {name}"
                if labels is None
                else f"{name} reads another dimension than the channels'"
            )
            if labels is not None:
                self.mark_unprunable(labels.ids, self._misused[name])
            return
        self._consume(name, "both", labels)
        if is_bottleneck(module):
            self._mark_latent(labels.ids, "z" if self.conditional else "y")
        for tensor in output if isinstance(output, tuple) else (output,):
            self.label(tensor, ChannelIds(1, labels.ids))

    def _conditional(self, name: str, module: nn.Module, inputs: list[Any], output: Any) -> None:
        known = [(t, self.labels(t)) for t in inputs if isinstance(t, Tensor)]
        self._elementwise([t for t, _ in known], output[0], additive=True)
        self._elementwise([t for t, _ in known], output[1], additive=True)
        latent = known[0][1] if known else None
        means = (
            self.labels(inputs[2]) if len(inputs) > 2 and isinstance(inputs[2], Tensor) else None
        )
        if latent is not None:
            self._mark_latent(latent.ids, "y")
            nonzero = latent.nonzero or (means.nonzero if means is not None else None)
            self.label(output[0], ChannelIds(latent.dim, latent.ids, nonzero))

    def _mark_latent(self, ids: np.ndarray, name: str) -> None:
        for number in ids.tolist():
            self.latents[number] = name

    def _lower_bound(self, name: str, module: nn.Module, inputs: list[Any], output: Tensor) -> None:
        labels = self.labels(inputs[0])
        if labels is not None:
            self.label(output, ChannelIds(labels.dim, labels.ids, f"lower bound {name}"))

    # -- result -----------------------------------------------------------------------------------

    def classes(self) -> dict[int, list[tuple[str, str, int]]]:
        """For every set of tied channels: (layer, axis, index) of each, in the order the layers
        ran.
        """
        members: dict[int, list[tuple[str, str, int]]] = defaultdict(list)
        order = {name: position for position, name in reversed(list(enumerate(self.calls)))}
        for use in sorted(
            self.uses.values(), key=lambda u: (order.get(u.module, len(order)), u.axis == "out")
        ):
            for index, number in enumerate(use.ids.tolist()):
                members[self.root(number)].append((use.module, use.axis, index))
        return members
