"""What share of the way from the same small codec trained from scratch to the original a pruned
codec has gone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nicprune.report.aggregate import Line
from nicprune.report.records import Record

ALIKE = 0.03
"""Codecs of the same budget may differ by this share of their MACs."""

NOTE = (
    "Cost: lambda * 255^2 * MSE + bpp, real bits and 8-bit images, mean over images. Gap closed:"
    " (from scratch - codec) / (from scratch - original); 100 % is as good as the original, 0 % no"
    " better than the same small codec trained from scratch, for as many steps as are given"
    " beside it."
)


def cost(record: Record) -> float | None:
    """lambda * 255^2 * MSE + bpp of a record, mean over images; None where it was not trained for
    squared error, or a figure is missing.
    """
    errors = [
        10 ** (-image["psnr_db"] / 10)
        for image in record["images"]
        if isinstance(image.get("psnr_db"), int | float)
    ]
    if (
        record["metric"] not in ("mse", None)
        or record["lmbda"] is None
        or record["bpp"] is None
        or not errors
    ):
        return None
    return float(record["lmbda"] * 255**2 * statistics.fmean(errors) + record["bpp"])


@dataclass(frozen=True)
class Gap:
    """A pruned codec beside one of its size that was trained from scratch; costs are means over
    seeds.
    """

    quality: int | None
    arm: str
    scratch: str
    steps: int
    reduction: float
    original: float
    from_scratch: float
    codec: float

    def closed(self) -> float | None:
        """The share of the gap that is closed, in per cent; None where there is none."""
        gap = self.from_scratch - self.original
        return 100 * (self.from_scratch - self.codec) / gap if gap > 0 else None

    def cells(self) -> list[str]:
        """The line of a table under HEADERS."""
        closed = self.closed()
        return [
            "–" if self.quality is None else str(self.quality),
            self.arm,
            f"{self.reduction:.2f}×",
            self.scratch,
            f"{self.steps:,}",
            f"{self.original:.4f}",
            f"{self.codec:.4f}",
            f"{self.from_scratch:.4f}",
            "–" if closed is None else f"{closed:.0f} %",
        ]


HEADERS = (
    "q",
    "codec",
    "FLOP reduction",
    "same size, from scratch",
    "its steps",
    "cost of the original",
    "of the codec",
    "from scratch",
    "gap closed",
)


def _mean(line: Line) -> float | None:
    found = [value for value in map(cost, line.members) if value is not None]
    return statistics.fmean(found) if found else None


def gaps(group: Sequence[Line]) -> list[Gap]:
    """Every pruned codec beside each of its quality and size from scratch, among the lines of one
    setting.
    """
    found = []
    scratches = [line for line in group if line.members[0]["method"] == "scratch"]
    for line in group:
        if line.role != "pruned" or line in scratches:
            continue
        original = next(
            (
                other
                for other in group
                if other.role == "original" and other.quality == line.quality
            ),
            None,
        )
        for scratch in scratches:
            macs = [other.mean["macs"] for other in (line, scratch)]
            values = [_mean(other) for other in (original, scratch, line) if other is not None]
            if (
                scratch.quality != line.quality
                or abs(macs[0] / macs[1] - 1) > ALIKE
                or len(values) < 3
                or None in values
            ):
                continue
            # Costs by different lambdas say nothing about each other.
            if any(
                not math.isclose(
                    other.members[0]["lmbda"] or 0, line.members[0]["lmbda"] or 0, rel_tol=1e-4
                )
                for other in (original, scratch)
                if other
            ):
                continue
            before, from_scratch, after = (float(value) for value in values if value is not None)
            steps = int(scratch.members[0]["steps"] or 0)
            found.append(
                Gap(
                    line.quality,
                    line.arm,
                    scratch.arm,
                    steps,
                    line.mean["flop_reduction"],
                    before,
                    from_scratch,
                    after,
                )
            )
    return sorted(found, key=lambda gap: (gap.quality or 0, gap.steps, gap.scratch, gap.codec))
