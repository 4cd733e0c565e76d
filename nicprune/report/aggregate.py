"""Aggregate records over seeds into the rows of a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nicprune.report.columns import NUMERIC, values_of
from nicprune.report.derived import number_or_nan
from nicprune.report.experimental_setup import Setup
from nicprune.report.matching import Records, arms, as_records
from nicprune.report.record import Record


@dataclass(frozen=True)
class Row:
    """The records of one arm at one quality, or at one rate between two qualities.

    Attributes:
        setup: codec, training metric and test images.
        quality: quality level; None between two levels.
        role: role of the records.
        arm: name of the arm.
        seeds: number of seeds.
        mean: mean over seeds of each numeric column.
        spread: sample standard deviation over seeds; empty for one seed.
        members: the records.
    """

    setup: Setup
    quality: int | None
    role: str
    arm: str
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]
    members: tuple[Record, ...]

    def show(self, name: str, form: str, plus_minus: str = "±", missing: str = "–") -> str:
        """Return one figure as text, followed by its spread where there are several seeds."""
        if not math.isfinite(self.mean[name]):
            return missing
        spread = self.spread.get(name, 0.0)
        return format(self.mean[name], form) + (
            f" {plus_minus}{format(spread, form.lstrip('+'))}" if spread > 0 else ""
        )

    @property
    def label(self) -> str:
        """Name in a table: the arm, and the width of a slimmable codec."""
        width = self.members[0].width
        return self.arm if width is None else f"{self.arm}, width {width}"

    def between(self) -> bool:
        """Return True for a rate between two qualities: a point of a curve, not of a table."""
        return self.members[0].between()

    def macs_over_images(self, part: str = "macs") -> tuple[float, float, float] | None:
        """Return mean, smallest and largest MACs for 64 x 64 pixels over the images.

        Args:
            part: a transform, or "macs" for all.

        Returns None where every image costs the same by design.
        """
        found = [record.dynamic[part] for record in self.members if part in record.dynamic]
        if not found:
            return None
        means, smallest, largest = zip(*found, strict=True)
        return statistics.fmean(means), min(smallest), max(largest)

    def reductions(self) -> tuple[float, float] | None:
        """Return smallest and largest FLOP reduction over the images; None without gates."""
        spread, before = self.macs_over_images(), self.members[0].original_cost.macs
        return (before / spread[2], before / spread[1]) if spread else None

    def show_reductions(self, dash: str = "–") -> str:
        """Return the range of the FLOP reduction over the images, for example " (2.2–2.7)".

        Empty where both ends look the same.
        """
        for form in (".1f", ".2f"):
            low, high = (format(r, form) for r in self.reductions() or (1, 1))
            if low != high:
                return f" ({low}{dash}{high})"
        return ""


def aggregate(records: Records) -> list[Row]:
    """Return one row for each setup, quality and arm, in the order of a table."""
    ready = as_records(records)
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record, arm in zip(ready, arms(ready), strict=True):
        key = (record.setup(), record.rate_point(), record.role, arm)
        groups.setdefault(key, []).append(record)
    rows = []
    for (setup, (quality, _, _), role, arm), members in groups.items():
        # A seed that was measured more than once counts once.
        by_seed: dict[int | None, list[Any]] = {}
        for record in members:
            by_seed.setdefault(record.seed, []).append(values_of(record, ready))
        seeds = len(by_seed)
        columns = {
            name: [
                statistics.fmean(number_or_nan(value[name]) for value in values)
                for values in by_seed.values()
            ]
            for name in NUMERIC
        }
        mean = {name: statistics.fmean(column) for name, column in columns.items()}
        spread = (
            {n: statistics.stdev(column) for n, column in columns.items() if math.isfinite(mean[n])}
            if seeds > 1
            else {}
        )
        rows.append(Row(setup, quality, role, arm, seeds, mean, spread, tuple(members)))
    return rows


def by_setup(rows: Sequence[Row]) -> dict[Setup, list[Row]]:
    """Return the rows of each setup: the content of one table."""
    groups: dict[Setup, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.setup, []).append(row)
    return groups


def compact_rows(records: Records) -> dict[Setup, list[Row]]:
    """Return the rows of each setup's compact table: those at a quality."""
    return by_setup([row for row in aggregate(records) if not row.between()])


def why_no_drop(row: Row, group: Sequence[Row]) -> str:
    """Return the reason why a row has no PSNR drop.

    One codec for all rates is compared only with originals of the architecture it started from.
    """
    started = row.members[0].original_cost
    other_architecture = any(
        other.role == "original"
        and other.quality == row.quality
        and other.members[0].cost != started
        for other in group
    )
    if row.role == "modulated" and other_architecture:
        return "the codec of that quality has another architecture"
    return "the original was not evaluated on the same images"
