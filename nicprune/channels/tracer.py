"""Follow every channel through a codec's forward pass.

Each channel gets a number. A layer that computes new channels gives out new numbers; an addition, a
GDN, an entropy model couples the numbers of what it joins; chunks, concatenations and pixel
shuffles carry them along, because the same operation is run on a tensor of numbers. Channels that
reach anything else are marked unprunable: they are never removed, so what comes behind is safe too.
Nothing here knows one architecture from another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nicprune.channels.numbers import ChannelIds, Product
from nicprune.channels.propagation import ChannelPropagator
from nicprune.codecs.anatomy import forward_for_analysis
from nicprune.codecs.example import example_image
from nicprune.codecs.layer_kinds.kind import (
    channel_kind,
    kind_of,
    kinds_in,
    nearest_kind,
    why_untraceable,
)
from nicprune.codecs.layer_kinds.parameters import own_parameters, shared_parameters
from nicprune.codecs.modes import left_as_it_was
from nicprune.codecs.trusted import is_trusted


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

    def __init__(self, codec: nn.Module, norms: str = "pinned", whole_heads: Iterable[str] = ()):
        super().__init__(type(codec).__name__)
        self.whole_heads = set(whole_heads)
        self.codec, self.norms = codec, norms
        self._modules = dict(codec.named_modules())
        self.computed = {
            name: why
            for name, module in self._modules.items()
            if (kind := nearest_kind(module)) is not None
            and not kind.of(module).traceable(module)
            and (why := why_untraceable(module)) is not None
        }
        self.uses: dict[tuple[str, str], LayerChannels] = {}
        self.calls: list[str] = []
        self._entered: set[str] = set()
        self.latents: dict[int, str] = {}
        self.conditional = any(kind.flow == "conditional" for kind in kinds_in(codec).values())

    # -- running ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Trace the codec on a small image. The codec is left as it was, mode included.

        Raises:
            CodecError: it runs on no image.
        """
        image = example_image(self.codec, seed=0)
        with ExitStack() as stack, torch.no_grad(), left_as_it_was(self.codec):
            self.codec.eval()
            for name, module in self.codec.named_modules():
                kind = kind_of(module)
                exposed = kind.exposed(module) if kind is not None else []
                if self._rule(module) is not None and not exposed:
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
                if kind is not None and kind.has_channels and exposed:
                    ids = self.new(kind.widths(module)[0])
                    self.uses[name, "both"] = LayerChannels(name, "both", ids)
                    for tensor in exposed:
                        self.label(tensor, ChannelIds(0, ids))
            self._label_parameters()
            ids = self.new(image.shape[1])
            self.mark_unprunable(ids, "image")
            self.label(image, ChannelIds(1, ids))
            with self:
                out = forward_for_analysis(self.codec, image)
            for key, value in out.items() if isinstance(out, dict) else [("output", out)]:
                labels = self.labels(value)
                if labels is not None:
                    self.mark_unprunable(labels.ids, "image" if key == "x_hat" else f"output {key}")
            self.resolve_ties()
            self._use_parameters()
            tied = shared_parameters(self.codec)
            for (name, _), use in self.uses.items():
                owner = name if name in self._modules else name.rpartition(".")[0]
                for reason in (self._misused.get(name), tied.get(owner)):
                    if reason is not None:
                        self.mark_unprunable(use.ids, reason)
        self._labels.clear()

    def _label_parameters(self) -> None:
        """Number the parameters that modules use themselves; what they are added to or multiplied
        by says whether the numbers are channels.
        """
        self._own_labels: dict[str, np.ndarray] = {}
        for name, parameter in own_parameters(self.codec).items():
            ids = self.new(parameter.width)
            self._own_labels[name] = ids
            self._parameters |= dict.fromkeys(ids.tolist(), name.rpartition(".")[0])
            self.label(parameter.value, ChannelIds(parameter.dim, ids))

    def _use_parameters(self) -> None:
        """Make parameters that turned out to be per channel members of groups."""
        used = {self.root(n) for use in self.uses.values() for n in use.ids.tolist()}
        for name, ids in self._own_labels.items():
            if any(self.root(number) in used for number in ids.tolist()):
                self.uses[name, "both"] = LayerChannels(name, "both", ids)

    def _enter(self, name: str, module: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            self._entered.add(name)
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

    def _rule(self, module: nn.Module) -> Callable[..., None] | None:
        kind = kind_of(module)
        if kind is None:
            return None
        rules = {
            "dense": self._dense,
            "grouped": self._grouped,
            "attention": self._attention,
            "coupled": self._coupled,
            "through": self._through,
            "conditional": self._conditional,
            "bounded": self._bounded,
        }
        return rules[kind.flow]

    def _consume(
        self, module: str, axis: str, labels: ChannelIds, ids: np.ndarray | None = None
    ) -> None:
        """Record that a layer reads these channels; at a second call the channels of both calls are
        coupled.
        """
        if labels.nonzero and channel_kind(self._modules[module]).needs_zero:
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
        x, kind = inputs[0], channel_kind(module)
        labels = self.labels(x)
        axis = x.dim() + kind.channel_axis
        if labels is not None and labels.dim != axis:
            # A linear layer on another dimension than the channels': they pass through, one by one.
            if kind.any_axis:
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
        ids = self._produce(name, kind.widths(module)[0])
        self.label(output, ChannelIds(output.dim() + kind.channel_axis, ids))

    def _channels_read(self, name: str, module: nn.Module, x: Any) -> ChannelIds | None:
        """Return the channels of a layer's input. Without any, or along another dimension, the
        layer's own cannot be pruned: note why, and return None.
        """
        labels = self.labels(x)
        if labels is not None and labels.dim == channel_kind(module).channel_dim(module, x):
            return labels
        if labels is None:
            self._misused[name] = f"constant input of {name}"
        else:
            self._misused[name] = f"{name} reads another dimension than the channels'"
            self.mark_unprunable(labels.ids, self._misused[name])
        return None

    def _grouped(self, name: str, module: Any, inputs: list[Any], output: Tensor) -> None:
        kind, labels = channel_kind(module), self._channels_read(name, module, inputs[0])
        if labels is None:
            return
        self._consume(name, "in", labels)
        ids = self._produce(name, kind.widths(module)[0])
        by_group = labels.ids.reshape(module.groups, -1), ids.reshape(module.groups, -1)
        if kind.by_group(module):
            for column in by_group[1].T:
                self.couple(by_group[0][:, 0], column)
        else:
            for parts in by_group:
                for part in parts[1:]:
                    self.couple(parts[0], part)
        self.label(output, ChannelIds(labels.dim, ids))

    def _coupled(self, name: str, module: nn.Module, inputs: list[Any], output: Any) -> None:
        kind, labels = channel_kind(module), self._channels_read(name, module, inputs[0])
        if labels is None:
            return
        if kind.mixes and self.norms != "adapt":
            self.mark_unprunable(
                labels.ids,
                f"{type(module).__name__} {name} computes over channels: they may go with norms:"
                " adapt",
            )
        if (parts := kind.equal_parts(module)) > 1:
            by_part = labels.ids.reshape(parts, -1)
            for part in by_part[1:]:
                self.couple(by_part[0], part)
        self._consume(name, "both", labels)
        if kind.codes:
            self._mark_latent(labels.ids, "z" if self.conditional else "y")
        nonzero = None if kind.absorbs or kind.needs_zero else labels.nonzero
        for tensor in output if isinstance(output, tuple) else (output,):
            self.label(tensor, ChannelIds(labels.dim, labels.ids, nonzero))

    def _attention(self, name: str, module: Any, inputs: list[Any], output: Any) -> None:
        """Follow attention over tokens: a head goes with as many channels of queries, keys and
        values, which are of one width.
        """
        kind, tensors = channel_kind(module), inputs[:3]
        read = [self._channels_read(name, module, tensor) for tensor in tensors]
        if any(labels is None for labels in read):
            self._unknown(f"attention {name} over a constant", tensors)
            return
        for labels in read:
            self._consume(name, "in", labels)  # type: ignore[arg-type]
        last, heads = f"{name}.{kind.parts(module)[0]}", kind.heads(module)
        inner = self._produce(name, kind.widths(module)[0]).reshape(3, heads, -1)
        for head, inputs_of in enumerate(read[0].ids.reshape(heads, -1)):  # type: ignore[union-attr]
            members = np.concatenate([inner[:, head].ravel(), inputs_of])
            self.couple(np.repeat(members[:1], len(members)), members)
        self.uses[last, "in"] = LayerChannels(last, "in", inner[2].ravel())
        self.calls.append(last)
        ids = self._produce(last, channel_kind(self._modules[last]).widths(self._modules[last])[0])
        query, key = tensors[0], tensors[1]
        self.label(output[0], ChannelIds(query.dim() - 1, ids))
        tokens = [t.numel() // t.shape[-1] for t in (query, key)]
        batch = 1 if query.dim() == 2 else query.shape[0 if module.batch_first else 1]
        macs = 2 * tokens[0] * tokens[1] // batch * inner[2].size
        self.products.append(Product(name, macs, (inner[2].ravel(),)))

    def _through(self, name: str, module: nn.Module, inputs: list[Any], output: Tensor) -> None:
        labels = self.labels(inputs[0])
        if labels is not None:
            self.label(output, ChannelIds(labels.dim, labels.ids, labels.nonzero))

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

    def _bounded(self, name: str, module: nn.Module, inputs: list[Any], output: Tensor) -> None:
        labels = self.labels(inputs[0])
        if labels is not None:
            self.label(output, ChannelIds(labels.dim, labels.ids, f"lower bound {name}"))

    def uncalled(self) -> list[str]:
        """Return the layers with channels that did not run: neither were they called, nor were
        their weights used. Those of CompressAI's own modules are left out, whose code is known.
        """
        used = {name for name, _ in self.uses} | self._misused.keys() | self._entered
        found: list[str] = []
        within = ""  # a layer that was met already, whose parts are its own
        for name, module in self._modules.items():
            kind = nearest_kind(module)
            if kind is None or within and name.startswith(within):
                continue
            within = f"{name}."
            if kind.has_channels and name not in used and not is_trusted(self._caller(name)):
                found.append(name)
        return found

    def _caller(self, name: str) -> type:
        """Return the class of the module whose code calls a layer: of the nearest above it that
        is no container.
        """
        above = name
        while above:
            above = above.rpartition(".")[0]
            if not isinstance(self._modules[above], (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
                break
        return type(self._modules[above])

    def pinned(self) -> list[tuple[str, str, int]]:
        """Return the channels of layers that are unprunable."""
        roots = {self.root(number) for number in self.unprunable}
        return [m for root, members in self.classes().items() if root in roots for m in members]

    # -- result -----------------------------------------------------------------------------------

    def classes(self) -> dict[int, list[tuple[str, str, int]]]:
        """Return for every set of coupled channels: (layer, axis, index) of each, in the order the
        layers ran.
        """
        members: dict[int, list[tuple[str, str, int]]] = defaultdict(list)
        order = {name: position for position, name in reversed(list(enumerate(self.calls)))}
        for use in sorted(
            self.uses.values(), key=lambda u: (order.get(u.module, len(order)), u.axis == "out")
        ):
            for index, number in enumerate(use.ids.tolist()):
                members[self.root(number)].append((use.module, use.axis, index))
        return members
