"""Channel groups of codecs that were analysed before: kept with the codec as long as it is what it
was, and written to files.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from nicprune.channels.groups import Attribute, Group, Groups, Member, Norms, ProductShares
from nicprune.codecs.anatomy import CDF_BUFFERS
from nicprune.codecs.layer_kinds.kind import widths_of
from nicprune.codecs.layer_kinds.parameters import layers_of
from nicprune.codecs.structure import structure
from nicprune.common.errors import CodecError, FileError, RecipeError

Place = tuple[str, str, int]
"""A layer, an axis and a channel along it."""


@dataclass
class _Known:
    """Knowledge of a codec, kept as an attribute of it. Copies and pickles of the codec have None
    in its place: they may be changed, and are read where this package is not.

    Attributes:
        state: what the codec was when its groups were found; see `_state`.
        groups: its groups; None where it was pruned since and they are to be found again.
        norms: what becomes of channels that a norm computes over.
        before: the groups of the codec that it was pruned from, by where their channels are now.
        uncalled: the layers that no run of that codec called.
    """

    state: list[Any]
    groups: Groups | None
    norms: Norms
    before: dict[Place, Group]
    uncalled: tuple[str, ...] = ()

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


ATTRIBUTE = "_nicprune_groups"
"""Attribute of a codec that holds what is known of it."""


def remember(codec: nn.Module, groups: Groups) -> None:
    """Keep the groups of a codec, which `recall` returns until a part of it is another."""
    codec.__dict__[ATTRIBUTE] = _Known(_state(codec), groups, groups.norms, {})


def recall(
    codec: nn.Module, find: Callable[[nn.Module, Norms], Groups], norms: Norms | None = None
) -> Groups | None:
    """Return the groups of a codec if they are known and it is what it was, but for its weights;
    None too if none of them can shrink any more.

    Args:
        find: finds the groups of a codec that was pruned since they were known: `find_groups`.
        norms: what becomes of channels that a norm computes over; None for what is known.
    """
    known: _Known | None = codec.__dict__.get(ATTRIBUTE)
    if known is None or norms not in (None, known.norms):
        return None
    if not _same(known.state, _state(codec)):
        return None
    if known.groups is None:
        try:
            found = find(codec, known.norms)
        except CodecError:  # nothing is left to prune, which only who wants to prune has to know
            return None
        left = Groups(
            [_as_before(group, known.before) for group in found],
            found.products,
            found.roles,
            found.norms,
            [name for name in found.uncalled if name in known.uncalled],
        )
        if not left.prunable():
            return None
        known.groups = left
    return known.groups


def _as_before(group: Group, before: Mapping[Place, Group]) -> Group:
    """Return a group with what trials have shown of the groups that it is what is left of."""
    if group.pinned:
        return group
    were = {g.name: g for place in _places(group) if (g := before.get(place)) is not None}
    pinned = next((g.pinned for g in were.values() if g.pinned), None)
    attributes = dict.fromkeys(a for g in were.values() for a in g.attributes)
    return replace(group, pinned=pinned, attributes=() if pinned else tuple(attributes))


def remember_pruned(
    codec: nn.Module, small: nn.Module, groups: Groups, keep: Mapping[str, np.ndarray]
) -> None:
    """Keep for a pruned codec what trials have shown of the codec that it was made from, if these
    are that codec's groups.
    """
    known: _Known | None = codec.__dict__.get(ATTRIBUTE)
    if known is None or known.groups is not groups:
        return
    gone: dict[tuple[str, str], list[int]] = {}
    for name, kept in keep.items():
        away = np.setdiff1d(np.arange(groups[name].width), kept)
        for member in groups[name].members:
            gone.setdefault((member.module, member.axis), []).extend(member.index[away].ravel())
    before = {layer: np.sort(indices) for layer, indices in gone.items()}
    told = {
        (module, axis, index - int(np.searchsorted(before.get((module, axis), []), index))): group
        for group in groups
        if group.pinned is not None or group.attributes
        for module, axis, index in _places(group)
        if index not in gone.get((module, axis), ())
    }
    small.__dict__[ATTRIBUTE] = _Known(_state(small), None, groups.norms, told, groups.uncalled)


def _places(group: Group) -> Iterable[Place]:
    for member in group.members:
        for index in member.index.ravel().tolist():
            yield member.module, member.axis, index


def _state(codec: nn.Module) -> list[Any]:
    """Return what a codec's channel groups depend on: its modules, the shapes of their weights, and
    their other attributes.
    """
    found: list[Any] = []
    for name, module in codec.named_modules():
        found += [name, type(module)]
        tensors = [*module._parameters.items(), *module._buffers.items()]
        found += [(k, v.shape) for k, v in tensors if v is not None and k not in CDF_BUFFERS]
        found += [
            (key, value)
            for key, value in module.__dict__.items()
            if key not in OF_MODULES
            and not key.startswith("_nicprune")
            and not isinstance(value, Tensor)
        ]
    return found


OF_MODULES = set(nn.Module().__dict__)
"""Attributes that torch gives every module."""

PLAIN = (bool, int, float, str, bytes, type(None), tuple)


def _same(first: list[Any], second: list[Any]) -> bool:
    """Return whether two states are the same: numbers and texts by value, other attributes if they
    are the same objects.
    """
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if a is b:
            continue
        if type(a) is not type(b) or not isinstance(a, PLAIN):
            return False
        if isinstance(a, tuple):
            if not _same(list(a), list(b)):
                return False
        elif a != b:
            return False
    return True


# -- in files -------------------------------------------------------------------------------------


def fingerprint(codec: nn.Module) -> int:
    """CRC-32 of what a codec's channel groups depend on: its structure, and the shapes of its
    weights.
    """
    shapes = {
        key: list(value.shape)
        for key, value in codec.state_dict().items()
        if key.rpartition(".")[2] not in CDF_BUFFERS
    }
    return zlib.crc32(json.dumps([structure(codec), shapes], sort_keys=True).encode())


def as_plain(codec: nn.Module, groups: Groups) -> dict[str, Any]:
    """Return a codec's groups in the form that JSON writes."""
    return {
        "fingerprint": fingerprint(codec),
        "groups": [
            [
                group.name,
                group.latent,
                group.pinned,
                [
                    [member.module, member.axis, [_runs(column) for column in member.index.T]]
                    for member in group.members
                ],
                [[a.module, a.name, a.times] for a in group.attributes],
            ]
            for group in groups
        ],
        "products": [
            [product.module, product.macs, list(product.widths), list(map(dict, product.shares))]
            for product in groups.products
        ],
        "roles": groups.roles,
        "norms": groups.norms,
        **({"uncalled": list(groups.uncalled)} if groups.uncalled else {}),
    }


def from_plain(codec: nn.Module, written: Any) -> Groups | None:
    """Return the groups that `as_plain` wrote; None if they are those of another codec.

    Raises:
        FileError: they cannot be this codec's, whatever wrote them.
    """
    try:
        if written["fingerprint"] != fingerprint(codec):
            return None
        found = Groups(
            [_group(*entry) for entry in written["groups"]],
            [
                ProductShares(
                    str(module),
                    int(macs),
                    (int(widths[0]), int(widths[1])),
                    tuple({str(n): int(c) for n, c in share.items()} for share in shares),
                )
                for module, macs, widths, shares in written["products"]
            ],
            {str(module): str(transform) for module, transform in written["roles"].items()},
            "adapt" if written["norms"] == "adapt" else "pinned",
            [str(name) for name in written.get("uncalled", ())],
        )
        _check(codec, found)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecipeError) as error:
        raise FileError(f"its channel groups are damaged ({error})") from None
    return found


def _check(codec: nn.Module, groups: Groups) -> None:
    """Raise an error unless every channel that groups name is there, and in one group."""
    modules, named = layers_of(codec), dict(codec.named_modules())
    seen: set[Place] = set()
    for group in groups:
        for member in group.members:
            out, inn = widths_of(modules[member.module])
            width = inn if member.axis == "in" else out
            if member.axis not in ("out", "in", "both") or not group.width:
                raise ValueError(f"{group.name} has no such axis or no channels")
            if int(member.index.min()) < 0 or int(member.index.max()) >= width:
                raise ValueError(f"{member.module} has {width} channels")
        for attribute in group.attributes:
            if type(named[attribute.module].__dict__[attribute.name]) is not int:
                raise ValueError(f"{attribute.name} is no whole number")
        places = list(_places(group))
        if len(set(places)) < len(places) or seen & set(places):
            raise ValueError(f"{group.name} shares channels with another")
        seen |= set(places)
    if len({group.name for group in groups}) < len(groups):
        raise ValueError("two have one name")
    for product in groups.products:
        for share in product.shares:
            for name in share:
                groups[name]
    if not groups.prunable():
        raise ValueError("none can be pruned")


def _group(
    name: str,
    latent: str | None,
    pinned: str | None,
    members: Sequence[Any],
    attributes: Sequence[Any],
) -> Group:
    made = tuple(
        Member(
            str(module),
            str(axis),
            np.stack([np.concatenate([_run(*run) for run in runs]) for runs in columns], 1),
        )
        for module, axis, columns in members
    )
    numbers = tuple(Attribute(str(module), str(key), int(n)) for module, key, n in attributes)
    return Group(str(name), len(made[0].index), made, latent, pinned, numbers)


MOST = 1 << 16
"""More channels than any layer has."""


def _run(start: int, step: int, count: int) -> np.ndarray:
    if not 0 < count < MOST:
        raise ValueError(f"{count} channels in a row")
    return start + step * np.arange(count, dtype=np.int64)


def _runs(values: np.ndarray) -> list[list[int]]:
    """Write indices as evenly spaced ones: [first, step, how many]."""
    found: list[list[int]] = []
    for value in values.tolist():
        if found and found[-1][2] == 1:
            found[-1][1:] = [value - found[-1][0], 2]
        elif found and value == found[-1][0] + found[-1][1] * found[-1][2]:
            found[-1][2] += 1
        else:
            found.append([value, 1, 1])
    return found
