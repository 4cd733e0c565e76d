"""The gap to the same small codec trained from scratch, and how much of it a pruned codec closes.

cost = λ · 255² · MSE + bpp
gap closed = (cost from scratch − cost of the codec) / (cost from scratch − cost of the whole codec)

The whole codec is the original trained on without a method for as many steps as the pruned one: a
control, or an arm `none`. Where there is none, it is the original, whose training ended earlier.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nicprune.report.aggregate import Row
from nicprune.report.columns import column_of
from nicprune.report.matching import closeness
from nicprune.report.rate_distortion_cost import cost, same_lambda

TOLERANCE = 0.03
"""Largest relative difference of the MACs of two codecs of the same size."""

NOTE = (
    "Cost: λ · 255² · MSE + bpp, real bits and 8-bit images, mean over images. Gap closed: (from"
    " scratch - codec) / (from scratch - whole codec). The whole codec is the original trained on"
    " without a method for as many steps as the pruned codec; where there is none, the original"
    " itself. 100 % is as good as the whole codec; 0 % is no better than the same small codec"
    " trained from scratch for the steps given."
)


@dataclass(frozen=True)
class Gap:
    """A pruned codec beside one of the same size that was trained from scratch.

    Attributes:
        quality: quality level.
        arm: name of the pruned codec.
        scratch: name of the codec trained from scratch.
        steps: training steps of the codec trained from scratch.
        reduction: FLOP reduction of the pruned codec.
        whole: name of the unpruned codec.
        whole_cost, from_scratch, codec: costs of the three, mean over seeds.
    """

    quality: int | None
    arm: str
    scratch: str
    steps: int
    reduction: float
    whole: str
    whole_cost: float
    from_scratch: float
    codec: float

    def closed(self) -> float | None:
        """Return the fraction of the gap that is closed, in per cent; None without a gap."""
        gap = self.from_scratch - self.whole_cost
        return 100 * (self.from_scratch - self.codec) / gap if gap > 0 else None

    def cells(self) -> list[str]:
        """Return the row of a table below `headers()`."""
        closed = self.closed()
        return [
            "–" if self.quality is None else str(self.quality),
            self.arm,
            f"{self.reduction:.2f}×",
            self.scratch,
            f"{self.steps:,}",
            self.whole,
            f"{self.whole_cost:.4f}",
            f"{self.codec:.4f}",
            f"{self.from_scratch:.4f}",
            "–" if closed is None else f"{closed:.0f} %",
        ]


def headers() -> list[str]:
    """Return the headers of a table of gaps."""
    return [
        *(column_of(name).header for name in ("quality", "label", "flop_reduction")),
        "same size, from scratch",
        "its steps",
        "whole codec",
        "its cost",
        "cost of the codec",
        "cost from scratch",
        "gap closed",
    ]


def scratch_gaps(group: Sequence[Row]) -> list[Gap]:
    """Return every pruned codec beside each codec from scratch of its quality, size and lambda.

    Args:
        group: the rows of one setup.
    """
    found = []
    scratches = [row for row in group if row.members[0].method == "scratch"]
    for row in group:
        if row.role != "pruned" or row in scratches:
            continue
        whole = _whole_codec(row, group)
        for scratch in scratches:
            gap = _gap(row, whole, scratch)
            if gap is not None:
                found.append(gap)
    return sorted(found, key=lambda gap: (gap.quality or 0, gap.steps, gap.scratch, gap.codec))


def _whole_codec(row: Row, group: Sequence[Row]) -> Row | None:
    """Return the control that was trained for as many steps as a row, or else another codec trained
    on without a method, or else the original; of several, the closest.
    """
    record = row.members[0]

    def rank(other: Row) -> int | None:
        one = other.members[0]
        if (
            other.quality != row.quality
            or not same_lambda(other.members[0], row.members[0])  # their costs cannot be compared
            or record.original_cost not in (one.cost, one.original_cost)
        ):
            return None
        if other.role == "original":
            return 0
        if one.steps != record.steps:
            return None
        return 2 if other.role == "control" else 1 if one.method == "none" else None

    ranked = [(found, other) for other in group if (found := rank(other)) is not None]
    return max(
        ranked, key=lambda one: (one[0], closeness(record, one[1].members[0])), default=(0, None)
    )[1]


def _gap(row: Row, whole: Row | None, scratch: Row) -> Gap | None:
    """Return the gap of one pair; None where the two cannot be compared."""
    if (
        whole is None
        or scratch.quality != row.quality
        or abs(row.mean["macs"] / scratch.mean["macs"] - 1) > TOLERANCE
        # Costs at different lambdas cannot be compared.
        or not same_lambda(scratch.members[0], row.members[0])
    ):
        return None
    before, from_scratch, after = map(_mean_cost, (whole, scratch, row))
    if before is None or from_scratch is None or after is None:
        return None
    return Gap(
        row.quality,
        row.arm,
        scratch.arm,
        int(scratch.members[0].steps or 0),
        row.mean["flop_reduction"],
        whole.arm,
        before,
        from_scratch,
        after,
    )


def _mean_cost(row: Row) -> float | None:
    found = [value for value in map(cost, row.members) if value is not None]
    return statistics.fmean(found) if found else None
