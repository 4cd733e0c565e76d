"""The new channels of a codec that has grown, as channel groups of their own, and what they cost:
what pruners beside an adaptation prune in place of the source codec.

A group of new channels has the name of the source codec's group that they widen. Its members are
the new layers, whose names are those of the source codec's with / in place of dots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from nicprune.channels.groups import Group, Groups, Member
from nicprune.codecs.layer_kinds.kind import widths_of
from nicprune.codecs.layer_operations import remove
from nicprune.pruning.cost import CostModel
from nicprune.pruning.totals import Totals


@dataclass(frozen=True)
class Run:
    """New channels that stand together along one axis of a layer.

    Attributes:
        group: the channel group that they widen.
        place: number of the layer's own channels before them.
        count: how many new channels of the group.
        each: how many channels of the layer belong to each of them.
    """

    group: str
    place: int
    count: int
    each: int = 1


def places(runs: Sequence[Run], *, among_own: bool) -> dict[str, np.ndarray]:
    """Return the places of new channels along an axis of a layer by group, (count, channels of the
    layer for each).

    Args:
        among_own: the axis has the layer's own channels too.
    """
    found: dict[str, list[np.ndarray]] = {}
    before = 0
    for run in sorted(runs, key=lambda one: one.place):
        total = run.count * run.each
        start = before + (run.place if among_own else 0)
        index = np.arange(start, start + total).reshape(run.count, run.each)
        found.setdefault(run.group, []).append(index)
        before += total
    return {name: np.concatenate(parts, axis=1) for name, parts in found.items()}


@dataclass(frozen=True)
class NewGroup(Group):
    """The new channels of a channel group.

    Attributes:
        fewest: 0, as all may go; 1 where they alone bring what is new to the picture.
    """

    fewest: int = 0

    @property
    def least(self) -> int:
        return self.fewest


class NewGroups(Groups):
    """The groups that have new channels."""

    noun = "channel group with new channels"


def new_groups(
    source: Groups,
    added: Mapping[str, int],
    members: Mapping[str, Sequence[Member]],
    at_the_end: Collection[str],
) -> NewGroups:
    """Return the groups of new channels, in the order of the source codec's.

    Args:
        source: the source codec's groups.
        added: the number of new channels by group.
        members: the new layers that have them, by group.
        at_the_end: groups that the picture is computed from.
    """
    return NewGroups(
        [
            NewGroup(
                name=group.name,
                width=added[group.name],
                members=tuple(members[group.name]),
                latent=group.latent,
                fewest=int(group.name in at_the_end),
            )
            for group in source
            if added.get(group.name, 0)
        ]
    )


class NewChannelsCost(CostModel):
    """Cost of the target domain by the numbers of new channels: what runs there, and the parameters
    of both domains. Budgets are relative to the source codec as it is.

    Args:
        source: the source codec's cost.
        groups: the groups of new channels.
        whole, added_up, into: see `CostModel.grown`.
    """

    base: ClassVar[str] = "the source codec"

    def __init__(  # counted already: nothing of the base class's is done again
        self,
        source: CostModel,
        groups: NewGroups,
        *,
        whole: Iterable[str],
        added_up: Iterable[str],
        into: Iterable[str],
    ):
        self.groups, self.names = groups, [group.name for group in groups]
        self.original = source.totals()
        self._full = np.array([group.width for group in groups], np.int64)
        self._source, self._whole = source, tuple(whole)
        self._added_up, self._into = tuple(added_up), tuple(into)
        self._columns = [source.names.index(name) for name in self.names]

    def _cost(self, widths: np.ndarray, what: str) -> Any:
        added = np.zeros((len(self._source.names), *widths.shape[1:]), widths.dtype)
        added[self._columns] = widths
        return self._source.grown(added, self._whole, self._added_up, self._into, what)

    def totals(self, keep: Mapping[str, Sequence[int] | int] | np.ndarray | None = None) -> Totals:
        widths = keep if isinstance(keep, np.ndarray) else self.widths(keep)
        quantities = ("macs", "encoder", "decoder", "params")
        return Totals(**{what: int(self._cost(widths, what)) for what in quantities})

    def soft(self, widths: np.ndarray, what: str = "macs") -> float:
        return float(self._cost(widths, what))

    def decreases(self, widths: np.ndarray, deltas: np.ndarray, what: str) -> np.ndarray:
        # Of the last channels of a group more goes than theirs: so each case is counted.
        fewer = widths[:, None] - np.diag(deltas)
        found: np.ndarray = self._cost(widths, what) - self._cost(fewer, what)
        return found


def read_channels(groups: NewGroups, keep: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return keep-lists without the new channels that nothing reads where these stay alone: those
    of which every reader has lost its own. What is coded counts as read.
    """
    found = dict(keep)
    while True:
        left = {group.name: len(found.get(group.name, range(group.width))) for group in groups}
        made, writers = set(), set()
        for group in groups:
            for member in group.members:
                if member.axis != "in":
                    made.add(member.module)
                    writers.update([member.module] if left[group.name] else [])
        unread = [
            group.name
            for group in groups
            if left[group.name]
            and group.latent is None
            and all(
                member.module in made - writers for member in group.members if member.axis == "in"
            )
        ]
        if not unread:
            return found
        found |= dict.fromkeys(unread, np.arange(0))


def remove_new_channels(
    layers: nn.ModuleDict, groups: NewGroups, keep: Mapping[str, np.ndarray]
) -> None:
    """Remove new channels from new layers, in place; a layer that has none left is removed."""
    losses: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, kept in keep.items():
        gone = np.setdiff1d(np.arange(groups[name].width), kept)
        for member in groups[name].members:
            losses[member.module, member.axis] += member.index[gone].ravel().tolist()
    for (name, axis), indices in losses.items():
        if name in layers and len(set(indices)) == widths_of(layers[name])[axis == "in"]:
            del layers[name]
    for (name, axis), indices in losses.items():
        if name in layers:
            remove(layers[name], axis, sorted(set(indices)))
