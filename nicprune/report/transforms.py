"""MACs and parameters of each transform, for the original and every arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nicprune.report.aggregate import Row
from nicprune.report.derived import AREA

Costs = Mapping[str, tuple[float, float]]
"""MACs for 64 x 64 pixels and parameters, by transform."""


@dataclass(frozen=True)
class TransformRow:
    """One transform at one quality.

    Attributes:
        quality: quality level.
        first: True for the first transform of a quality.
        name: name of the transform.
        cells: kMAC/pixel, reduction and parameters for each arm, as text.
    """

    quality: int | None
    first: bool
    name: str
    cells: list[tuple[str, str, str]]


@dataclass(frozen=True)
class TransformTable:
    """The table of a setup.

    Attributes:
        columns: name and role of each arm.
        rows: its rows, by quality.
    """

    columns: list[tuple[str, str]]
    rows: list[TransformRow]


def transforms(group: Sequence[Row]) -> TransformTable:
    """Return the table of one setup, without controls, which have the original's transforms."""
    having = [
        row
        for row in group
        if row.members[0].by_transform and row.role != "control" and not _same_transforms(row)
    ]
    roles = {row.label: row.role for row in reversed(having)}
    labels = list(dict.fromkeys(row.label for row in having))
    rows = []
    for quality in dict.fromkeys(row.quality for row in having):
        here: dict[str, Row] = {row.label: row for row in having if row.quality == quality}
        costs: dict[str, Costs] = {n: row.members[0].by_transform for n, row in here.items()}
        base = next((costs[n] for n, row in here.items() if row.role == "original"), {})
        for index, name in enumerate(dict.fromkeys(n for c in costs.values() for n in c)):
            cells = [
                _cell(costs.get(n, {}).get(name), None if roles[n] == "original" else base, name)
                for n in labels
            ]
            rows.append(TransformRow(quality, index == 0, name, cells))
    return TransformTable([(n, roles[n]) for n in labels], rows)


def _same_transforms(row: Row) -> bool:
    """Return True for an arm that adds a rate modulator to the original's transforms."""
    record = row.members[0]
    return row.role == "modulated" and record.cost.macs == record.original_cost.macs


def _cell(cost: tuple[float, float] | None, base: Costs | None, name: str) -> tuple[str, str, str]:
    if cost is None:
        return "–", "", "–"
    macs, params = cost
    before = None if base is None or name not in base else base[name][0]
    reduction = f"{before / macs:.2f}×" if macs and before else ""
    return f"{macs / AREA / 1000:.2f}", reduction, f"{params:,}"
