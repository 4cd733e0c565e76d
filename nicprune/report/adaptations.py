"""Codecs adapted to another domain: what it gains there, and what it forgets of the first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nicprune.report.aggregate import Row
from nicprune.report.columns import column_of
from nicprune.report.derived import derive
from nicprune.report.rate_distortion_cost import change_pct, cost, same_lambda
from nicprune.report.record import Record

NOTE = (
    "Cost: λ · 255² · MSE + bpp, real bits and 8-bit images, mean over images. Forgetting: change"
    " of the cost on images of the source domain; a codec with two domains codes them in the source"
    " domain. Control: the original fine-tuned on the target's images for the same number of steps."
    " Old files: encoded by the original, decoded with the codec."
)


@dataclass(frozen=True)
class Adapted:
    """One codec on the images of both domains, mean over seeds.

    Attributes:
        quality, arm, steps: of the row.
        images: number of training images; None for all.
        gain: change of the cost on the target's images against the original, in per cent.
        against_control: the same against the control, which is fine-tuned.
        forgetting: change of the cost on the source's images, in per cent.
        macs: MACs over those of the original.
        params: parameters more than the original has.
        old_files: what becomes of files of the original.
    """

    quality: int | None
    arm: str
    steps: int
    images: int | None
    gain: float
    against_control: float
    forgetting: float
    macs: float
    params: int
    old_files: str

    def cells(self) -> list[str]:
        """Return the row of a table below `headers()`."""
        return [
            "–" if self.quality is None else str(self.quality),
            self.arm,
            f"{self.steps:,}",
            "all" if self.images is None else str(self.images),
            *(
                f"{value:+z.2f} %" if math.isfinite(value) else "–"
                for value in (self.gain, self.against_control, self.forgetting)
            ),
            f"{self.macs:.2f}×",
            f"{self.params:+,}",
            self.old_files,
        ]


def headers() -> list[str]:
    """Return the headers of a table of adapted codecs."""
    return [
        *(column_of(name).header for name in ("quality", "label", "steps")),
        column_of("train_images").header,
        "cost on the target",
        "against the control",
        column_of("forgetting_pct").header,
        "MACs",
        "params",
        column_of("old_files").header,
    ]


def adaptations(group: Sequence[Row]) -> list[Adapted]:
    """Return every codec that was measured on images of a source domain too.

    Args:
        group: the rows of one setup.
    """
    records = [record for row in group for record in row.members]
    return [
        _adapted(row, group, records)
        for row in group
        if row.role != "original" and all(record.source is not None for record in row.members)
    ]


def _adapted(row: Row, group: Sequence[Row], records: Sequence[Record]) -> Adapted:
    figures = [derive(record, records) for record in row.members]
    first = row.members[0]
    control = next((r for r in group if r.role == "control" and r.quality == row.quality), None)
    same = (
        control is not None
        and control.members[0].steps == first.steps
        and same_lambda(control.members[0], first)
    )
    return Adapted(
        row.quality,
        row.arm,
        int(first.steps or 0),
        first.train_images,
        statistics.fmean(f.cost_change_pct for f in figures),
        change_pct(_mean_cost(row), _mean_cost(control)) if control and same else math.nan,
        statistics.fmean(f.forgetting_pct for f in figures),
        first.cost.macs / first.original_cost.macs,
        first.cost.params - first.original_cost.params,
        ", ".join(sorted({f.old_files for f in figures})),
    )


def _mean_cost(row: Row) -> float | None:
    found = [value for value in map(cost, row.members) if value is not None]
    return statistics.fmean(found) if found else None
