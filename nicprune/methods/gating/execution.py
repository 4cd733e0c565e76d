"""Run a codec with gates: channels that a gate closes are left out of the computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.channels.groups import Groups
from nicprune.codecs.hooks import Hook, remove_hooks
from nicprune.codecs.layer_kinds.kind import channel_kind
from nicprune.methods.gating.gate import Gate, Power, is_trained, sampling_step

PAYS_BELOW = 0.95
"""Density from which on gathering the open channels costs more than computing with the closed ones
saves.
"""


class GateHook(Hook):
    """Run a gate before a convolution, and compute with the open channels alone where possible."""

    def __init__(self, gate: Gate):
        self.owner = self.gate = gate
        self.skips = True
        # What a GDN in front of the layer has settled already: the gates, and which channels it has
        # left out.
        self.decided: Tensor | None = None
        self.given: Tensor | None = None
        self._narrowed = False

    def may_skip(self, x: Tensor) -> bool:
        """Return whether channels can be left out: one image and no gradient."""
        return (
            self.skips
            and x.shape[0] == 1
            and not self.gate.training
            and not torch.is_grad_enabled()
        )

    def pays(self) -> bool:
        """Return whether enough channels are closed for skipping to be faster."""
        return float(self.gate.open.float().mean()) < PAYS_BELOW

    def before(self, layer: Any, args: Any) -> Any:
        """Close channels of the layer's input."""
        x: Tensor = args[0]
        index, gates, self.given, self.decided = self.given, self.decided, None, None
        if index is None:
            self.gate.follows = is_trained(layer)
            gates = self.gate(x) if gates is None else gates
            if not self.may_skip(x) or not self.pays():
                return (
                    None
                    if self.may_skip(x) and bool(self.gate.open.all())
                    else (x * gates[..., None, None].to(x.dtype), *args[1:])
                )
            index = self.gate.open.nonzero().flatten()
            x = gather(x, index)
        # Another method's masked weight may stand in front of the layer's own already: it is
        # narrowed like it, and goes with it.
        weight = channel_kind(layer).narrowed_weight(layer, index)
        # A decoder has its format from its weights: latents come without one.
        if layer.weight.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)
        layer.__dict__["weight"] = weight
        self._narrowed = True
        return (x, *args[1:])

    def __call__(self, layer: Any, args: Any, output: Any) -> None:
        if self._narrowed:
            layer.__dict__.pop("weight", None)
            self._narrowed = False


class NormHook(Hook):
    """Compute only those channels of a GDN that the gate after it leaves open, which the gate
    decides from the output at some pixels.
    """

    def __init__(self, behind: GateHook):
        self.behind = behind
        self.owner = self.gate = behind.gate
        self._whole: Tensor | None = None

    def before(self, layer: Any, args: Any) -> Any:
        """Hand the layer those pixels alone that the gate looks at."""
        x: Tensor = args[0]
        self.behind.given = self.behind.decided = self._whole = None
        if not self.behind.may_skip(x) or sampling_step(x.shape[2], x.shape[3]) == 1:
            return None
        self._whole = x
        return (self.gate.sample(x), *args[1:])

    def __call__(self, layer: Any, args: Any, output: Any) -> Any:
        x, self._whole = self._whole, None
        if x is None or output is None:
            return None
        self.behind.decided = self.gate.decide(self.gate.pool(output))
        if not self.behind.pays():
            return type(layer).forward(layer, x)
        index = self.behind.given = self.gate.open.nonzero().flatten()
        return channel_kind(layer).normalise_some(layer, x, index, gather)


class PowerHook(Hook):
    """Measure the mean square (GDN1: absolute value) of each input channel of a GDN."""

    def __init__(self, power: Power):
        self.owner = self.power = power

    def before(self, layer: Any, args: Any) -> None:
        """Take the mean over the first image of a batch."""
        if self.power.measures(layer):
            with torch.no_grad():
                terms = channel_kind(layer).pooled(args[0][:1].detach().float())
                self.power.add(terms.mean((0, 2, 3)))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Return some channels of (1, C, H, W) in its memory format. Rows of pixels are copied several
    times faster than strided planes.
    """
    if not x.is_contiguous(memory_format=torch.channels_last) or x.shape[1] == 1:
        return x.index_select(1, index)
    _, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels).index_select(1, index)
    return rows.view(1, height, width, -1).permute(0, 3, 1, 2)


def pooled_before(codec: nn.Module, groups: Groups, names: Sequence[str]) -> dict[str, str]:
    """Return, by the name of a GDN, the gated convolution after it, where nothing else reads or
    changes the GDN's output.
    """
    modules = dict(codec.named_modules())
    found = {}
    for group in groups:
        members = {
            axis: [m.module for m in group.members if m.axis == axis]
            for axis in ("out", "both", "in")
        }
        if any(len(one) != 1 for one in members.values()):
            continue
        (pool,), (reader,) = members["both"], members["in"]
        entries = [
            getattr(entry, "__self__", entry)
            for entry in modules[reader]._forward_pre_hooks.values()
        ]
        adjacent = (
            type(modules[pool.rpartition(".")[0]]) is nn.Sequential
            and reader.rpartition(".")[0] == pool.rpartition(".")[0]
        )
        if (
            reader in names
            and adjacent
            and channel_kind(modules[pool]).pools
            and not any(isinstance(h, Hook) and h.scales for h in entries)
        ):
            found[pool] = reader
    return found


def attach_gates(
    codec: nn.Module,
    gates: Mapping[str, Gate],
    powers: Mapping[str, Power],
    pools: Mapping[str, str],
) -> None:
    """Attach gates to convolutions, power meters to GDNs, and to a GDN before a gated convolution
    the hook that lets it skip channels; by module name.
    """
    modules = dict(codec.named_modules())
    hooks = {name: GateHook(gate) for name, gate in gates.items()}
    for name, hook in hooks.items():
        modules[name].register_forward_pre_hook(hook.before)
        modules[name].register_forward_hook(hook, always_call=True)
    for name, power in powers.items():
        modules[name].register_forward_pre_hook(PowerHook(power).before)
    for name, convolution in pools.items():
        norm = NormHook(hooks[convolution])
        modules[name].register_forward_pre_hook(norm.before)
        modules[name].register_forward_hook(norm, always_call=True)


def detach_gates(codec: nn.Module, owners: set[int]) -> None:
    """Remove the hooks of these modules, given by id."""
    remove_hooks(codec, lambda hook: id(hook.owner) in owners)


def set_skipping(codec: nn.Module, skips: bool) -> None:
    """Set whether closed channels are left out of the computation or multiplied by zero; the output
    is the same. For tests and timing.
    """
    for module in codec.modules():
        for entry in module._forward_pre_hooks.values():
            hook = getattr(entry, "__self__", None)
            if isinstance(hook, GateHook):
                hook.skips = skips
