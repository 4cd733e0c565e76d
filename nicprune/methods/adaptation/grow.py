"""New channels around a frozen codec: codec adaptation without forgetting (CAwF; Katakol et al.,
"DANICE: Domain adaptation without forgetting in neural image compression", CLIC at CVPR 2021, arXiv
2104.09370). Code and tables are not public; the following is this package's reading.

Each channel group gets new channels. New channels are computed from old and new ones, old channels
from old ones alone, by the source codec's own layers:

    convolution:  [y_old, y_new] = [W x_old + b,  V [x_old, x_new] + c]
    GDN:          y_old = GDN(x_old),  y_new = x_new / sqrt(beta + gamma [x_old^2, x_new^2])
    image:        x_hat = W x_old + b  +  V [x_old, x_new],  V = 0 at the start
    z:            an entropy bottleneck for the new channels, beside the source's
    y:            scales and means of the new channels are new outputs of h_s

With `into_old`, which is not from the paper, old channels of g_s read new ones too, in the target
domain:

    convolution:  y_old = W x_old + b + U x_new,  U = 0 at the start

The source domain runs the source codec alone, with the same arithmetic. New channels start as
copies of those that the source's next layers weigh most, with random weights for new inputs: they
carry something from the first step on. Those of y and z start with random weights, ten times
smaller than their class draws them, so that new latents are near zero and cost little; their scales
and means start as a tenth of those of old ones.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nicprune.channels.groups import Group, Member
from nicprune.codecs.anatomy import forward_for_analysis
from nicprune.codecs.example import example_image
from nicprune.codecs.hooks import share_of
from nicprune.codecs.layer_kinds.kind import LayerKind, kind_of
from nicprune.codecs.layer_kinds.layout import Layout
from nicprune.codecs.layer_kinds.parameters import layers_of
from nicprune.codecs.modes import left_as_it_was
from nicprune.codecs.roles import on_side, transforms_in
from nicprune.common.errors import BudgetError, CodecError, NicpruneError, RecipeError, closest
from nicprune.methods.adaptation.form import Form, Overrides
from nicprune.methods.adaptation.new_channels import (
    NewChannelsCost,
    NewGroups,
    Run,
    new_groups,
    places,
)
from nicprune.pruning.cost import CostModel
from nicprune.pruning.views import override_attributes

LARGEST, PARTS = 8, 256
"""Largest fraction that a budget of MACs leads to, and how many steps one has."""

SMALL = 0.1
"""Scale of the weights that make new latents, at the start."""


@dataclass(frozen=True)
class _Layer:
    """A layer that has grown.

    Attributes:
        name, kind: of the source codec's layer.
        inputs, outputs: places of own and new channels.
        runs: new channels along both axes, "in" and "out".
        new: whether it has a new layer beside it.
        added_up: whether what the new one gives is added to the layer's output: the image.
        into: whether another new one adds to the layer's output what it makes of new inputs.
    """

    name: str
    kind: LayerKind
    inputs: Layout
    outputs: Layout
    runs: Mapping[str, Sequence[Run]]
    new: bool
    added_up: bool
    into: bool

    @property
    def whole(self) -> bool:
        """True if it is run as one convolution, since codecs use its weights without calling it."""
        return self.kind.convolution and not self.kind.mask_on_weight

    def members(self) -> dict[str, list[Member]]:
        """Return the new layer as a member of the groups whose new channels it has, by group."""
        found: dict[str, list[Member]] = {}
        coupled = self.kind.pools or self.kind.codes
        sides = ("out",) if coupled else ("out", "in")
        for side in sides if self.new else ():
            for group, index in places(self.runs[side], among_own=side == "in").items():
                member = Member(_key(self.name), "both" if coupled else side, index)
                found.setdefault(group, []).append(member)
        if self.into:
            for group, index in places(self.runs["in"], among_own=False).items():
                found.setdefault(group, []).append(Member(_into(self.name), "in", index))
        return found


class Grow(Form):
    """New layers beside the source codec's own."""

    def build(self) -> None:
        codec = self.codec
        self.added = self._widths()
        self.config = self.config.with_widths(self.added)
        self._layers = self._plan(self.added)
        self._like = {name: self._weighed_most(name, n) for name, n in self.added.items() if n}
        modules = layers_of(codec)
        self.new = nn.ModuleDict()
        for layer in self._layers:
            if layer.new:
                self.new[_key(layer.name)] = self._new(layer, modules[layer.name])
            if layer.into:
                self.new[_into(layer.name)] = self._new_into(layer, modules[layer.name])
        self._try()

    # -- widths -----------------------------------------------------------------------------------

    def _widths(self) -> dict[str, int]:
        """Return the number of new channels of each channel group that grows."""
        free = self.groups.prunable(latents=self.config.latents)
        if not free:
            raise CodecError(f"{type(self.codec).__name__} has no channel group that can grow")
        if self.config.widths is not None:
            found = dict.fromkeys((g.name for g in free), 0)
            for pattern, count in self.config.widths.items():
                found |= dict.fromkeys(self._named("widths", pattern), count)
            return found
        if isinstance(self.config.grow, dict):
            found = dict.fromkeys((g.name for g in free), 0)
            for pattern, fraction in self.config.grow.items():
                for name in self._named("grow", pattern):
                    found[name] = self._share(self.groups[name], fraction)
            return found
        if self.config.grow is not None:
            return {g.name: self._share(g, self.config.grow) for g in free}
        assert self.config.macs is not None
        limit = self.config.macs * self.cost.totals().macs
        fits, exceeds = 0, LARGEST * PARTS + 1  # MACs grow with the fraction
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            found = {g.name: self._share(g, middle / PARTS) for g in free}
            fits, exceeds = (middle, exceeds) if self._macs(found) <= limit else (fits, middle)
        if not fits:
            raise BudgetError(
                f"macs: {self.config.macs:g} times the source codec's do not allow"
                f" {self.config.round_to} new channels in each group: raise it, or lower round_to"
            )
        return {g.name: self._share(g, fits / PARTS) for g in free}

    def _named(self, setting: str, pattern: str) -> list[str]:
        """Return the names of the channel groups that may grow and match a pattern."""
        free = [group.name for group in self.groups.prunable(latents=self.config.latents)]
        names = [n for n in free if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        if not names:
            raise RecipeError(
                f"{setting}: no channel group matches {pattern!r}; {closest(pattern, free)}"
            )
        return names

    def _share(self, group: Group, fraction: float) -> int:
        step = group.step(self.config.round_to)
        return max(step, round(fraction * group.width / step) * step)

    def _macs(self, added: Mapping[str, int]) -> int:
        counts = np.array([added.get(name, 0) for name in self.cost.names], np.int64)
        return int(self.cost.grown(counts, **_counted(self._plan(added))))

    # -- pruning ----------------------------------------------------------------------------------

    @cached_property
    def new_groups(self) -> NewGroups:
        """The groups of new channels, whose members are layers of `new`."""
        members: dict[str, list[Member]] = {}
        for layer in self._layers:
            for name, found in layer.members().items():
                members.setdefault(name, []).extend(found)
        last = {run.group for layer in self._layers if layer.added_up for run in layer.runs["in"]}
        return new_groups(self.groups, self.added, members, last)

    def prunable(self) -> tuple[nn.Module, NewGroups, CostModel]:
        cost = NewChannelsCost(self.cost, self.new_groups, **_counted(self._layers))
        return self.new, self.new_groups, cost

    # -- layers -----------------------------------------------------------------------------------

    def _plan(self, added: Mapping[str, int]) -> list[_Layer]:
        """Return the layers that grow, in the order of the channel groups.

        Raises:
            CodecError: one of them cannot; names it.
        """
        modules = layers_of(self.codec)
        members: dict[str, dict[str, list[tuple[str, Member, int]]]] = {}
        for group in self.groups:
            for member in group.members:
                sides = ("out", "in") if member.axis == "both" else (member.axis,)
                for side in sides:
                    members.setdefault(member.module, {}).setdefault(side, []).append(
                        (group.name, member, added.get(group.name, 0))
                    )
        transforms = transforms_in(self.codec, members)
        found = []
        for name, by_side in members.items():
            if not any(count for side in by_side.values() for *_, count in side):
                continue
            layer = modules[name]
            kind = kind_of(layer)
            grows = kind is not None and (
                (kind.convolution and kind.flow == "dense") or kind.pools or kind.codes
            )
            if kind is None or not grows or not isinstance(layer, nn.Module):
                raise CodecError(
                    f"{name} of {type(self.codec).__name__} cannot grow: no new channels are known"
                    f" for a {type(layer).__name__}; name the groups that may in grow, or take"
                    " another form"
                )
            out, inn = kind.widths(layer)
            runs = {side: self._runs(name, by_side.get(side, [])) for side in ("out", "in")}
            outputs, inputs = _layout(out, runs["out"]), _layout(inn, runs["in"])
            image = "out" not in by_side
            new = bool(outputs.added or image)
            into = self.config.into_old and bool(inputs.added) and not image
            into = into and kind.convolution and transforms[name] == "g_s"
            found.append(_Layer(name, kind, inputs, outputs, runs, new, image, into))
        return found

    def _runs(self, name: str, members: Sequence[tuple[str, Member, int]]) -> list[Run]:
        """Return the new channels along one axis of a layer."""
        found = []
        for group, member, count in members:
            index = member.index
            if not count:
                continue
            if (np.diff(index, axis=0) == 1).all():  # one run each time that the layer has them
                found += [Run(group, int(last) + 1, count) for last in index[-1]]
            elif (np.diff(index.ravel()) == 1).all():  # channel by channel, as pixels are shuffled
                found.append(Run(group, int(index[-1, -1]) + 1, count, index.shape[1]))
            else:
                raise CodecError(
                    f"{name} of {type(self.codec).__name__} cannot grow: its channels stand in no"
                    " order that new ones could follow; take another form"
                )
        return found

    @torch.no_grad()
    def _new(self, layer: _Layer, own: Any) -> nn.Module:
        outputs = layer.outputs.width if layer.added_up else layer.outputs.added
        new: Any = layer.kind.grown(own, layer.inputs.width, outputs)
        if new is None:
            raise CodecError(
                f"{layer.name} of {type(self.codec).__name__} cannot grow: no new channels are"
                f" known for a {type(own).__name__} with these settings; take another form"
            )
        if layer.added_up:
            for parameter in new.parameters():
                parameter.zero_()
            return new  # type: ignore[no-any-return]
        latent = layer.kind.convolution and self._is_of_latents(layer.name)
        if not (latent and on_side(self.codec, layer.name, "encoder")):
            rows = torch.tensor(self._rows(layer.name))
            layer.kind.copy_rows(own, new, rows, layer.inputs)
        if latent:
            for parameter in new.parameters():
                parameter.mul_(SMALL)
        return new  # type: ignore[no-any-return]

    @torch.no_grad()
    def _new_into(self, layer: _Layer, own: Any) -> nn.Module:
        """Return what adds to a layer's own outputs what it makes of new inputs: nothing yet."""
        new: Any = layer.kind.grown(own, layer.inputs.added, layer.kind.widths(own)[0])
        new.register_parameter("bias", None)
        new.weight.zero_()
        return new  # type: ignore[no-any-return]

    def _is_of_latents(self, name: str) -> bool:
        """Return whether a layer makes latents, or their scales and means."""
        return any(
            group.latent is not None
            and any(m.module == name and m.axis == "out" for m in group.members)
            for group in self.groups
        )

    def _weighed_most(self, name: str, count: int) -> list[int]:
        """Return so many channels of a group, those with the largest weights in the layers that
        read them first.
        """
        modules = layers_of(self.codec)
        group = self.groups[name]
        scores = np.zeros(group.width)
        for member in group.members:
            layer = modules[member.module]
            kind = kind_of(layer)
            if member.axis == "in" and kind is not None:
                norms = kind.norms(layer, "in").detach().cpu().double().numpy()
                scores += norms[member.index].sum(1)
        order = np.argsort(-scores, kind="stable").tolist()
        return [order[i % len(order)] for i in range(count)]

    def _rows(self, name: str) -> list[int]:
        """Return the output channels of a layer that its new ones are like, in their order."""
        found: list[tuple[int, list[int]]] = []
        for group in self.groups:
            like = self._like.get(group.name, [])
            for member in group.members if like else ():
                if member.module == name and member.axis != "in":
                    index = member.index
                    if (np.diff(index, axis=0) == 1).all():
                        found += [(int(slot[-1]), slot[like].tolist()) for slot in index.T]
                    else:
                        found.append((int(index[-1, -1]), index[like].ravel().tolist()))
        return [row for _, rows in sorted(found) for row in rows]

    @torch.no_grad()
    def _try(self) -> None:
        """Run the codec as it has grown on a small image.

        Raises:
            CodecError: it does not run, or gives another picture than the source codec.
        """
        codec, name = self.codec, type(self.codec).__name__
        image = example_image(codec, seed=0)
        with left_as_it_was(codec):
            codec.eval()
            expected = forward_for_analysis(codec, image)["x_hat"]
            try:
                with override_attributes(self.overrides(codec)):
                    found = forward_for_analysis(codec, image)["x_hat"]
            except NicpruneError:
                raise
            except Exception as error:  # a foreign codec's own code may raise anything
                raise CodecError(
                    f"{name} cannot grow: {str(error).splitlines()[0]}; take another form"
                ) from error
        if not torch.equal(expected, found):
            raise CodecError(f"{name} cannot grow: it would change from the start")

    # -- computing --------------------------------------------------------------------------------

    def overrides(self, codec: Any) -> Overrides:
        modules: dict[str, Any] = layers_of(codec)
        found: Overrides = []
        for layer in self._layers:
            own = modules[layer.name]
            new = self.new[_key(layer.name)] if layer.new else None
            if layer.kind.codes:
                before, _, last = layer.name.rpartition(".")
                joined = layer.kind.beside(own, new, layer.outputs)
                found.append((codec.get_submodule(before), {last: joined}))
                continue
            masks = share_of(new) if new is not None else None
            if layer.whole:
                both = layer.inputs, layer.outputs
                found.append((own, layer.kind.joined(own, new, *both, masks)))
                continue
            into = self.new[_into(layer.name)] if layer.into else None
            found.append((own, {"forward": _Grown(layer, own, new, into)}))
            if masks is not None and new is not None:
                found.append((new, layer.kind.masked_attributes(new, masks) or {}))
        for group in self.groups:
            added = self.added.get(group.name, 0)
            for attribute in group.attributes if added else ():
                module = codec.get_submodule(attribute.module)
                value = getattr(module, attribute.name) + attribute.times * added
                found.append((module, {attribute.name: value}))
            if group.latent == "y" and added and getattr(codec, "M", None) == group.width:
                found.append((codec, {"M": group.width + added}))
        return found

    def aux_loss(self) -> Tensor | None:
        losses = [bottleneck.loss() for bottleneck in self._bottlenecks()]
        return torch.stack(losses).sum() if losses else None

    def update(self, force: bool) -> None:
        for bottleneck in self._bottlenecks():
            bottleneck.update(force=force)

    def _bottlenecks(self) -> list[Any]:
        return [self.new[_key(layer.name)] for layer in self._layers if layer.kind.codes]


class _Grown:
    """The forward pass of a layer with a new one beside it. The new layer is not called, but its
    `forward` is: hooks on the layer itself serve both, and masks stand in front of parameters.
    """

    def __init__(self, layer: _Layer, own: Any, new: Any, into: Any):
        self.layer, self.own, self.new, self.into = layer, own, new, into

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        layer, own, new = self.layer, self.own, self.new
        if x.shape[1] != layer.inputs.width:
            raise CodecError(
                f"{layer.name} cannot grow: it is given {x.shape[1]} channels and expects"
                f" {layer.inputs.width}; take another form"
            )
        old = layer.inputs.old(x)
        first: Tensor = type(own).forward(own, old, *args)
        if self.into is not None:
            first = first + type(self.into).forward(self.into, layer.inputs.new(x), *args)
        if new is None:
            return first
        if layer.kind.pools:
            second = type(new).forward(new, old, layer.inputs.new(x))
        else:
            second = type(new).forward(new, x, *args)
        return first + second if layer.added_up else layer.outputs.join(first, second)


def _counted(layers: Sequence[_Layer]) -> dict[str, Any]:
    """Return the layers that are not counted as all others; see `CostModel.grown`."""
    return {
        kind: [layer.name for layer in layers if getattr(layer, kind)]
        for kind in ("whole", "added_up", "into")
    }


def _layout(width: int, runs: Sequence[Run]) -> Layout:
    """Return the places of a layer's own and new channels along one axis."""
    found, start = [], 0
    for run in sorted(runs, key=lambda one: one.place):
        found += [(False, run.place - start), (True, run.count * run.each)]
        start = run.place
    return Layout([*found, (False, width - start)])


def _key(name: str) -> str:
    return name.replace(".", "/")


def _into(name: str) -> str:
    return f"{_key(name)}/into"
