"""Find a codec's channel groups by following channels through one run of it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from nicprune.channels.groups import Group, Groups, Member, Norms, ProductShares
from nicprune.channels.tracer import Tracer
from nicprune.codecs.anatomy import check_codec, transform_of
from nicprune.codecs.example import forget_image
from nicprune.codecs.layer_kinds.kind import channel_kind
from nicprune.codecs.layer_kinds.parameters import layers_of
from nicprune.codecs.roles import forget_roles, roles_of
from nicprune.common.errors import CodecError

MAKERS = ("dense", "grouped", "attention")
"""Flows of layers that make channels of their own."""


def find_groups(codec: nn.Module, norms: Norms = "pinned") -> Groups:
    """Find the channel groups of any `CompressionModel` built of convolutions, GDN and CompressAI's
    entropy models.

    The codec is traced once on a small image and left as it was.

    Args:
        norms: whether channels that a norm computes over, as a layer norm does, are "pinned", or
            may go: "adapt".

    Raises:
        CodecError: nothing in the codec can be pruned safely; names the layers that stand in the
            way.
    """
    check_codec(codec)
    forget_image(codec)
    forget_roles(codec)
    tracer = Tracer(codec, norms)
    try:
        tracer.run()
        if tracer.mixed:  # a softmax over the channels of a head: heads may still go as a whole
            by_head = Tracer(codec, norms, whole_heads=tracer.mixed)
            by_head.run()
            if len(by_head.pinned()) < len(tracer.pinned()):
                tracer = by_head
    except CodecError:
        raise
    except Exception as error:  # a foreign codec's own code may raise anything
        raise CodecError(
            f"the forward pass of {type(codec).__name__} cannot be followed, at {tracer.where}:"
            f" {error}"
        ) from error
    unprunable: dict[int, str] = {}
    for number, reason in tracer.unprunable.items():
        unprunable.setdefault(tracer.root(number), reason)
    latents = {tracer.root(number): name for number, name in tracer.latents.items()}
    modules = layers_of(codec)

    # Channels with the same members, the same reason to stay and the same role are one group.
    sets: dict[tuple[object, str | None, str | None], list[list[tuple[str, str, int]]]] = {}
    for root, members in tracer.classes().items():
        shape = tuple(
            sorted(
                (m, a, sum(1 for x in members if x[:2] == (m, a)))
                for m, a in {x[:2] for x in members}
            )
        )
        sets.setdefault((shape, unprunable.get(root), latents.get(root)), []).append(members)

    groups: list[tuple[Member, Group]] = []
    for (_, pinned, latent), channels in sets.items():
        channels.sort(key=lambda members: members[0][2])
        order = list(dict.fromkeys((module, axis) for module, axis, _ in channels[0]))
        shares = tuple(
            Member(
                module,
                axis,
                np.array(
                    [[i for m, a, i in channel if (m, a) == (module, axis)] for channel in channels]
                ),
            )
            for module, axis in order
        )
        if pinned is None and not any(
            m.axis == "out" and channel_kind(modules[m.module]).flow in MAKERS for m in shares
        ):
            pinned = "no convolution produces these channels"
        maker = next((m for m in shares if m.axis == "out"), shares[0])
        groups.append((maker, Group(maker.module, len(channels), shares, latent, pinned)))

    named = _unique_names([(first, g) for first, g in groups if g.pinned != "image"])
    unknown = any(transform_of(m.module) == "other" for group in named for m in group.members)
    found = Groups(
        named,
        _shares_of(tracer, named),
        roles_of(codec).transforms if unknown else None,
        norms,
        tracer.uncalled(),
    )
    if norms == "adapt" and tracer.over_channels:
        _tell_of_norms(codec, tracer.over_channels)
    if not found.prunable():
        reasons = sorted({g.pinned for g in named if g.pinned})
        raise CodecError(
            f"nothing in {type(codec).__name__} can be pruned safely:"
            f" {'; '.join(reasons[:4]) or 'no convolution was run'}"
        )
    return found


def _tell_of_norms(codec: nn.Module, over_channels: Mapping[str, str]) -> None:
    """Warn of modules that compute over channels and that are no norm known or recognised."""
    modules = dict(codec.named_modules())
    told = [
        f"{name} in {where or 'the codec'} ({type(modules.get(where, codec)).__name__})"
        for where, name in over_channels.items()
    ]
    warnings.warn(
        f"norms: adapt does not reach {', '.join(told[:3])}{', ...' if len(told) > 3 else ''}, over"
        " channels, which stay: if it is a norm, make it a module of its own, or register its class"
        " with register_kind (see docs/howto/own_codec.md)",
        stacklevel=2,
    )


def _shares_of(tracer: Tracer, groups: Sequence[Group]) -> list[ProductShares]:
    """Return what matrix products have of each group."""
    group_of: dict[int, str] = {}
    for group in groups:
        for member in group.members:
            ids = tracer.uses[member.module, member.axis].ids[member.index.ravel()]
            group_of |= dict.fromkeys(map(tracer.root, ids.tolist()), group.name)
    widths = {group.name: group.width for group in groups}
    found = []
    for product in tracer.products:
        shares = []
        for ids in product.ids:
            names = [group_of.get(tracer.root(number)) for number in ids.tolist()]
            shares.append({n: names.count(n) // widths[n] for n in dict.fromkeys(names) if n})
        sizes = [len(ids) for ids in product.ids] + [1]
        found.append(
            ProductShares(product.module, product.macs, (sizes[0], sizes[1]), tuple(shares))
        )
    return found


def _unique_names(groups: Sequence[tuple[Member, Group]]) -> list[Group]:
    """Name groups by the layer that makes their channels; by the layer that reads them and ".in"
    where nothing makes them and the layer makes others. Where several still have a name in common,
    the range of channels tells them apart, and then a number.
    """
    made = {group.name for first, group in groups if first.axis != "in"}
    plain = [
        f"{group.name}.in" if first.axis == "in" and group.name in made else group.name
        for first, group in groups
    ]
    count = Counter(plain)
    named: dict[str, Group] = {}
    for (first, group), base in zip(groups, plain, strict=True):
        name, number = base, 2
        if count[base] > 1:
            name = base = f"{base}[{int(first.index.min())}:{int(first.index.max()) + 1}]"
        while name in named:
            name, number = f"{base}-{number}", number + 1
        named[name] = replace(group, name=name)
    return list(named.values())
