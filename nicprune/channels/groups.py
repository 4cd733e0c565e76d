"""Find a codec's channel groups: the widths that can shrink, and everything that shrinks
with each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, overload

import numpy as np

from nicprune.codecs.anatomy import SIDES, role_of, transform_of
from nicprune.common.errors import RecipeError, closest

Norms = Literal["pinned", "adapt"]
"""Fate of channels that a norm computes over: they stay, or they may go and its statistics
are of those that stay.
"""

MIN_LATENTS = 2
"""Autoregressive codecs cannot code a single latent channel."""


@dataclass(frozen=True)
class Member:
    """One layer's share in a group.

    Attributes:
        module: dotted name of the layer.
        axis: "out", "in", or "both" (GDN, entropy bottleneck, depthwise convolution).
        index: shape (width, k): the layer's k channels that belong to each of the group's channels.
    """

    module: str
    axis: str
    index: np.ndarray

    def __str__(self) -> str:
        times = f" x{self.index.shape[1]}" if self.index.shape[1] > 1 else ""
        return f"{self.module}{'' if self.axis == 'both' else '.' + self.axis}{times}"


@dataclass(frozen=True)
class Attribute:
    """A whole number of a module that repeats the width of a group.

    Attributes:
        module: dotted name of the module.
        name: the attribute's.
        times: how much less it becomes with each channel of the group that goes.
    """

    module: str
    name: str
    times: int


@dataclass(frozen=True)
class Group:
    """Channels of several layers that can only live or die together: one width.

    Attributes:
        name: the first layer that produces them, with its range of channels where it feeds several
            groups.
        width: how many channels.
        members: every layer that has them.
        latent: "y" or "z" if the bitstream carries them.
        pinned: why they can never be removed, None if they can.
        attributes: numbers in modules of somebody's own that follow the width.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    latent: str | None = None
    pinned: str | None = None
    attributes: tuple[Attribute, ...] = ()

    @property
    def least(self) -> int:
        """The fewest channels that it can have."""
        return MIN_LATENTS if self.latent else 1

    def step(self, round_to: int) -> int:
        """Return how many of its channels are `round_to` channels of a layer: fewer, where each
        stands for several of every layer, as a head does.
        """
        each = min((member.index.shape[1] for member in self.members), default=1)
        return round_to // math.gcd(round_to, each)


@dataclass(frozen=True)
class ProductShares:
    """A matrix product without parameters whose multiply-adds follow channel groups.

    Attributes:
        module: where it runs.
        macs: its multiply-adds in the traced codec.
        widths: the sizes of its two dimensions that may shrink, 1 where there is no second.
        shares: for each of them, how many of its entries go with a channel of each group.
    """

    module: str
    macs: int
    widths: tuple[int, int]
    shares: tuple[Mapping[str, int], ...]


class Groups(Sequence[Group]):
    """The channel groups of one codec, in the order of its forward pass.

    Attributes:
        products: the matrix products, as in attention, that shrink with them.
        roles: the transforms of modules whose names do not say them; see `roles.Roles`.
        norms: how channels that norms compute over were taken; see `find_groups`.
        uncalled: layers with channels that no run of the codec called. Which channels reach them is
            not known, so that no group has them.
        noun: what one of them is called in messages.
    """

    noun: ClassVar[str] = "channel group"

    def __init__(
        self,
        groups: Sequence[Group],
        products: Sequence[ProductShares] = (),
        roles: Mapping[str, str] | None = None,
        norms: Norms = "pinned",
        uncalled: Sequence[str] = (),
    ):
        self.norms = norms
        self.uncalled = tuple(uncalled)
        self.products = tuple(products)
        self.roles = dict(roles or {})
        self._groups = tuple(groups)
        self._by_name = {group.name: group for group in self._groups}

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    @overload
    def __getitem__(self, key: int | str) -> Group: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Group, ...]: ...
    def __getitem__(self, key: int | str | slice) -> Group | tuple[Group, ...]:
        if isinstance(key, str):
            if key not in self._by_name:
                raise RecipeError(f"no {self.noun} {key!r}; {closest(key, self._by_name)}")
            return self._by_name[key]
        return self._groups[key]

    def prunable(self, *, latents: bool = False) -> list[Group]:
        """Return the groups that may shrink, the latents y and z among them only if asked."""
        return [g for g in self._groups if g.pinned is None and (latents or g.latent is None)]

    def on_side(self, side: str) -> list[Group]:
        """Return the groups whose layers all run on one side alone, "encoder" or "decoder"."""
        return [
            group
            for group in self._groups
            if all(self.transform(member.module) in SIDES[side] for member in group.members)
        ]

    def transform(self, module: str) -> str:
        """Return the transform of a layer of the codec, "other" if it has none."""
        known = transform_of(module)
        return known if known != "other" else role_of(self.roles, module)

    def full(self) -> dict[str, list[int]]:
        """Return the keep-list of every group that keeps everything."""
        return {g.name: list(range(g.width)) for g in self._groups}

    def check(
        self, keep: Mapping[str, Sequence[int]], *, latents: bool = True
    ) -> dict[str, np.ndarray]:
        """Validate keep-lists; groups not named keep everything.

        Raises:
            RecipeError: a group is unknown, pinned, or an index is no whole number, out of range,
                repeated or unsorted.
        """
        checked = {}
        for name, indices in keep.items():
            group: Group = self[name]
            kept = np.asarray(list(indices))
            if len(kept) and kept.dtype.kind not in "iu":
                raise RecipeError(
                    f"the keep-list of {name!r} must be indices of channels, not {kept.dtype}"
                    " values: numpy.flatnonzero makes them of booleans"
                )
            kept = kept.astype(np.int64)
            inside = not len(kept) or (kept.min() >= 0 and kept.max() < group.width)
            if not inside or (np.diff(kept) <= 0).any():
                raise RecipeError(
                    f"the keep-list of {name!r} must be increasing indices below {group.width}"
                )
            if len(kept) == group.width:
                continue
            if group.pinned is not None:
                raise RecipeError(f"channel group {name!r} cannot shrink: {group.pinned}")
            if group.latent is not None and not latents:
                raise RecipeError(
                    f"channel group {name!r} is the latent {group.latent}; open it with latents:"
                    " true"
                )
            if len(kept) < group.least:
                raise RecipeError(
                    f"channel group {name!r} must keep at least {group.least} of {group.width}"
                    f" channels (got {len(kept)})"
                )
            checked[name] = kept
        return checked


def removed_inputs(groups: Groups, keep: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the input channels that every layer loses under keep-lists, by its name, as ranges
    ("0-3,7"): what a pruned codec tells of itself.
    """
    gone: dict[str, set[int]] = {}
    for name, kept in keep.items():
        for member in groups[name].members:
            if member.axis == "in":
                gone.setdefault(member.module, set()).update(
                    member.index[np.setdiff1d(np.arange(groups[name].width), kept)].ravel().tolist()
                )
    return {module: to_ranges(sorted(indices)) for module, indices in gone.items() if indices}


def to_ranges(indices: Sequence[int]) -> str:
    """Write increasing indices in short: "0-3,7"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def from_ranges(text: str) -> list[int]:
    """Return the indices that `to_ranges` was given."""
    ends = [part.partition("-") for part in text.split(",") if part]
    return [i for first, _, last in ends for i in range(int(first), int(last or first) + 1)]


def kept_channels(
    groups: Groups, keep: Mapping[str, Sequence[int]], module: str, axis: str, width: int
) -> np.ndarray:
    """Return which of a layer's channels along an axis ("out", "in", "both") stay under keep-lists,
    increasing.
    """
    gone = np.zeros(width, bool)
    for name, kept in keep.items():
        for member in groups[name].members:
            if member.module == module and member.axis == axis:
                gone[member.index[np.setdiff1d(np.arange(groups[name].width), kept)].ravel()] = True
    return np.flatnonzero(~gone)
