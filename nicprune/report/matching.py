"""Match records: sort them, name their arms, and find the original or control of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nicprune.report.record import ROLES, Record

Records = Sequence[Record | Mapping[str, Any]]
"""Records, or their content as mappings."""


def as_records(records: Records) -> list[Record]:
    """Return records, parsed where they are mappings, in the order of a table.

    Sorted by setup, quality, role, label and seed; rates between qualities come last.

    Raises:
        FileError: a mapping is not a record.
    """
    checked = [
        record if isinstance(record, Record) else Record.parse(record, None, f"record {n}")
        for n, record in enumerate(records, 1)
    ]

    def place(record: Record) -> tuple[Any, ...]:
        return (
            record.setup(),
            record.between(),
            none_first(record.quality),
            ROLES.index(record.role),
            record.label,
            none_first(record.seed),
            none_first(record.level),
            none_first(record.width),
        )

    return sorted(checked, key=place)


def none_first(value: float | None) -> float:
    """Return a sort key that puts None before every number that records hold."""
    return -1.0 if value is None else float(value)


def arms(records: Sequence[Record]) -> list[str]:
    """Return the name of each record's arm: its label, made unique.

    Where one label stands for different results of one seed, or for results of several seeds that
    were not made alike (steps, lambda, settings, number of images), the recipe's name is added,
    then a number. Repeated measurements of the same codec (equal MACs, bpp and PSNR) share an arm.
    """

    def clashing(names: Sequence[str]) -> set[Any]:
        results: dict[Any, Any] = {}
        terms: dict[Any, Any] = {}
        found = set()
        for record, name in zip(records, names, strict=True):
            place = (record.setup(), record.rate_point(), record.role, name)
            result = (record.cost.macs, record.bpp, record.psnr_db)
            differs = results.setdefault((place, record.seed), result) != result
            if terms.setdefault(place, _terms(record)) != _terms(record) or differs:
                found.add((record.setup(), record.role, name))
        return found

    names = [record.label for record in records]
    if found := clashing(names):
        names = [
            (
                f"{name} ({record.recipe or 'no recipe'})"
                if (record.setup(), record.role, name) in found
                else name
            )
            for record, name in zip(records, names, strict=True)
        ]
    if found := clashing(names):
        counts: dict[Any, int] = {}
        numbers: dict[Any, dict[Any, int]] = {}
        for index, (record, name) in enumerate(zip(records, names, strict=True)):
            if (record.setup(), record.role, name) in found:
                place = (record.setup(), record.rate_point(), record.role, name)
                repeated = (place, record.seed, _terms(record))
                counts[repeated] = counts.get(repeated, 0) + 1
                own = numbers.setdefault(place, {})
                number = own.setdefault((_terms(record), counts[repeated]), len(own) + 1)
                names[index] = f"{name} #{number}"
    return names


def _terms(record: Record) -> str:
    """Return what must be equal for two seeds to be of one arm, as text."""

    def without_seeds(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {k: without_seeds(v) for k, v in value.items() if k != "seed"}

    settings = json.dumps(without_seeds(record.settings), sort_keys=True, default=str)
    return f"{record.steps} {record.lmbda} {record.train_images} {settings}"


def reference_for(record: Record, records: Sequence[Record], role: str) -> Record | None:
    """Return the original or control that a record is compared with, or None.

    It has the same setup, quality and original cost. One codec for all rates is compared at each
    quality with the codec of that quality, provided that this has the architecture it started
    from. Of several candidates the closest is taken; see `closeness`.
    """
    if record.between():
        return None
    candidates = (
        other
        for other in records
        if other.role == role
        and other.quality == record.quality
        and other.setup() == record.setup()
        and record.original_cost in (other.cost, other.original_cost)
    )
    return max(candidates, key=lambda other: closeness(record, other), default=None)


def closeness(record: Record, other: Record) -> tuple[bool, ...]:
    """Return which circumstances two records share, the most important first; larger is closer."""
    return tuple(
        getattr(record, name) == getattr(other, name)
        for name in ("recipe", "seed", "steps", "recipe_sha256", "machine", "threads")
    )
