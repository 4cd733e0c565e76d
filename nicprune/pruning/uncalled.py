"""Layers that no run of a codec called: those of another quality level, or of another expert than
its content chose.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from nicprune.channels.groups import Groups

LISTS = (nn.ModuleList, nn.ModuleDict)
"""Containers one of whose entries may run in place of another."""


def in_words(names: Sequence[str]) -> str:
    """Return the first of some layers, and how many there are."""
    shown = ", ".join(names[:3])
    return f"{shown}, ... ({len(names)} layers)" if len(names) > 3 else shown


def entries_in_place(codec: nn.Module, uncalled: Collection[str]) -> dict[str, set[str]]:
    """Return for layers that were not called the entries of lists that were, and that have a layer
    like it at the same place. Layers without such an entry are left out.
    """
    modules = dict(codec.named_modules())
    twins = {name: _twins(modules, name) for name in uncalled}
    found: dict[str, set[str]] = {}
    while True:  # in lists of lists, an entry's twin may be one that was not called either
        known = {}
        for name, pairs in twins.items():
            entries = {entry for twin, entry in pairs if twin not in twins}
            if entries := entries.union(*(found.get(twin, ()) for twin, _ in pairs)):
                known[name] = entries
        if known == found:
            return found
        found = known


def _twins(modules: Mapping[str, nn.Module], name: str) -> list[tuple[str, str]]:
    """Return the layers of the same class and shapes at the same place of other entries of a list,
    each with its entry.
    """
    parts, found = name.split("."), []
    for depth in range(len(parts)):
        container = modules[".".join(parts[:depth])]
        if not isinstance(container, LISTS):
            continue
        for key, _ in container.named_children():
            twin = ".".join((*parts[:depth], key, *parts[depth + 1 :]))
            if key != parts[depth] and twin in modules and _alike(modules[name], modules[twin]):
                found.append((twin, ".".join((*parts[:depth], key))))
    return found


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two layers are of one class and have parameters of the same shapes."""
    shapes = [{k: v.shape for k, v in m.named_parameters()} for m in (one, other)]
    return type(one) is type(other) and shapes[0] == shapes[1]


def held_by(groups: Groups, entries: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Return which groups must stay whole for layers that may take the place of such entries, and
    why: those of the channels that go into an entry or come out of it. Channels within one may go.
    """
    held: dict[str, str] = {}
    for name in entries:
        for entry in sorted(entries[name]):
            for group in groups.prunable(latents=True):
                inside = [f"{member.module}.".startswith(f"{entry}.") for member in group.members]
                if any(inside) and not all(inside):
                    why = f"{name}, which no run called, may take the place of {entry}"
                    held.setdefault(group.name, why)
    return held
