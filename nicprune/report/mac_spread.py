"""MACs per image of codecs with gates, which close channels image by image."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nicprune.report.aggregate import Row
from nicprune.report.derived import AREA

NOTE = (
    "Skipping: time with closed channels multiplied by zero divided by time with closed channels"
    " skipped, over {} images."
)


@dataclass(frozen=True)
class Spread:
    """MACs over the images of one transform of a codec with gates, or of all transforms.

    Attributes:
        row: the codec.
        part: name of the transform, or "all".
        original: MACs of the original, in kMAC/pixel; None if not known.
        mean, least, most: MACs over the images, in kMAC/pixel.
        speed: encoding and decoding speed-up by skipping closed channels; for "all" only, and
            empty where it was not timed.
    """

    row: Row
    part: str
    original: float | None
    mean: float
    least: float
    most: float
    speed: list[float]

    def is_total(self) -> bool:
        """Return True for the MACs of all transforms, which stand above the others."""
        return self.part == "all"

    def percent(self) -> tuple[float, float, float] | None:
        """Return mean, smallest and largest MACs in per cent of the original's."""
        if not self.original:
            return None
        mean, least, most = (100 * v / self.original for v in (self.mean, self.least, self.most))
        return mean, least, most

    def cells(self, timed: bool) -> list[str]:
        """Return the row of a table below `headers(timed)`."""
        percent = self.percent()
        low, high = (f"{p:.0f}" for p in percent[1:]) if percent else ("", "")
        range_ = "–" if percent is None else f"{low} %" if low == high else f"{low} to {high} %"
        speeds = [f"{s:.2f}×" for s in self.speed] or ["", ""]
        return [
            self.part,
            "–" if self.original is None else f"{self.original:.2f}",
            f"{self.mean:.2f}",
            f"{self.least:.2f}",
            f"{self.most:.2f}",
            "–" if percent is None else f"{percent[0]:.1f} %",
            range_,
            *(speeds if timed else ()),
        ]


def headers(timed: bool) -> list[str]:
    """Return the headers of the table of MACs per image, behind quality and codec.

    Args:
        timed: add the speed-up by skipping closed channels.
    """
    speeds = ["encode, skipping", "decode, skipping"] if timed else []
    return ["transform", "original", "mean", "min", "max", "% of original", "min to max", *speeds]


def timed_images(spreads: Sequence[Spread]) -> int:
    """Return the number of images on which skipping was timed; 0 if it was not."""
    return max(
        (
            record.skipping.images
            for spread in spreads
            for record in spread.row.members
            if spread.speed and record.skipping is not None
        ),
        default=0,
    )


def mac_spreads(group: Sequence[Row]) -> list[Spread]:
    """Return the MACs over the images of every codec with gates: all, then each transform.

    Args:
        group: the rows of one setup.
    """
    originals = [record for row in group if row.role == "original" for record in row.members]
    found = []
    for row in group:
        member = row.members[0]
        if row.between() or row.macs_over_images() is None:
            continue
        # MACs follow from the architecture: the original of any quality will do.
        alike = next(
            (
                o.by_transform
                for o in originals
                if o.cost == member.original_cost and o.by_transform
            ),
            {},
        )
        before: dict[str, float] = {"all": member.original_cost.macs}
        before |= {name: macs for name, (macs, _) in alike.items()}
        for part in ("all", *member.by_transform):
            spread = row.macs_over_images("macs" if part == "all" else part)
            original = before.get(part)
            # A transform without gates costs every image what the original does.
            if spread is not None and not spread[1] == spread[2] == original:
                mean, least, most = (macs / AREA / 1000 for macs in spread)
                kmac = None if original is None else original / AREA / 1000
                speed = _skipping_speed(row) if part == "all" else []
                found.append(Spread(row, part, kmac, mean, least, most, speed))
    return found


def _skipping_speed(row: Row) -> list[float]:
    """Return encoding and decoding speed-up by skipping, mean over seeds timed undisturbed."""
    timed = [r.skipping for r in row.members if r.skipping is not None and r.quiet()]
    if not timed:
        return []
    return [
        statistics.fmean(zeroed / skipped for skipped, zeroed in side)
        for side in ([t.encode_s for t in timed], [t.decode_s for t in timed])
    ]
