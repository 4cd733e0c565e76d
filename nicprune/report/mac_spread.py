"""Parts of a report that only some codecs have: MACs per image of those with gates, and the storage
of one codec for all rates.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nicprune.report.aggregate import AREA, Line
from nicprune.report.records import Record, closeness


@dataclass(frozen=True)
class Spread:
    """MACs of one transform (or of everything) of a codec with gates over the images, in
    kMAC/pixel, and of the original, None if not known.

    Beside everything, `speed`: how many times as fast closed channels left out are as closed
        channels multiplied by zero, encoding and decoding.
    """

    line: Line
    part: str
    original: float | None
    mean: float
    least: float
    most: float
    speed: list[float]

    def first(self) -> bool:
        """Whether this is the line of everything, which comes before those of the transforms."""
        return self.part == "all"

    def share(self) -> tuple[float, float, float] | None:
        """Mean, smallest and largest MACs in per cent of the original's."""
        return (
            (
                100 * self.mean / self.original,
                100 * self.least / self.original,
                100 * self.most / self.original,
            )
            if self.original
            else None
        )

    def cells(self, timed: bool) -> list[str]:
        """The line of a table under `columns(timed)`, behind quality and codec."""
        share = self.share()
        low, high = (f"{s:.0f}" for s in share[1:]) if share else ("", "")
        range_ = "–" if share is None else f"{low} %" if low == high else f"{low} to {high} %"
        before = "–" if self.original is None else f"{self.original:.2f}"
        mean = "–" if share is None else f"{share[0]:.1f} %"
        speeds = [f"{s:.2f}×" for s in self.speed] or ["", ""]
        return [
            self.part,
            before,
            f"{self.mean:.2f}",
            f"{self.least:.2f}",
            f"{self.most:.2f}",
            mean,
            range_,
            *(speeds if timed else ()),
        ]


def columns(timed: bool) -> list[str]:
    """Headers of the table of MACs per image, behind quality and codec, with `timed` those of the
    speed of skipping.
    """
    speeds = ["encode, skipping", "decode, skipping"] if timed else []
    return [
        "transform",
        "original",
        "mean",
        "min",
        "max",
        "mean share",
        "share, min to max",
        *speeds,
    ]


SPEEDS = (
    "Skipping: how many times as fast the codec is with closed channels left out as with them"
    " multiplied by zero, over {} images."
)


def timed(spreads: Sequence[Spread]) -> int:
    """Over how many images skipping closed channels was timed; 0 if it was not."""
    return max(
        (
            record["skipping"].get("images", 0)
            for s in spreads
            for record in s.line.members
            if s.speed
        ),
        default=0,
    )


def per_image(group: Sequence[Line]) -> list[Spread]:
    """What the images cost codecs with gates, everything and each transform that has gates, from
    the lines of one setting.
    """
    originals = [record for line in group if line.role == "original" for record in line.members]
    found = []
    for line in group:
        member = line.members[0]
        if line.between() or line.dynamic() is None:
            continue
        # MACs follow from the architecture: the original of any quality will do.
        alike: dict[str, tuple[int, int]] = next(
            (
                o["by_transform"]
                for o in originals
                if o["cost"] == member["original_cost"] and o["by_transform"]
            ),
            {},
        )
        before = {"all": member["original_cost"]["macs"]} | {
            name: macs for name, (macs, _) in alike.items()
        }
        sides = [
            [
                record["skipping"][side]
                for record in line.members
                if record["skipping"] and record.quiet()
            ]
            for side in ("encode_s", "decode_s")
        ]
        speed = [
            statistics.fmean(zeroed / left_out for left_out, zeroed in side)
            for side in sides
            if side
        ]
        for part in ("all", *member["by_transform"]):
            spread, original = line.dynamic("macs" if part == "all" else part), before.get(part)
            # Without gates otherwise.
            if spread is not None and not spread[1] == spread[2] == original:
                mean, least, most = (macs / AREA / 1000 for macs in spread)
                found.append(
                    Spread(
                        line,
                        part,
                        None if original is None else original / AREA / 1000,
                        mean,
                        least,
                        most,
                        speed if part == "all" else [],
                    )
                )
    return found


@dataclass(frozen=True)
class Stored:
    """Bytes of an arm's files for its qualities, and of the originals' files for the same ones; for
    widths, of parameters of codecs as wide.
    """

    arm: str
    role: str
    qualities: tuple[int, ...]
    files: int
    size: int
    originals: int | None
    widths: bool = False

    def saving(self) -> str:
        """The saving against the originals in words; empty where nothing is known, or to
        compare.
        """
        if not self.originals or self.role == "original":
            return ""
        percent = 100 * (1 - self.size / self.originals)
        return f"{percent:.0f} % less" if percent >= 0 else f"{-percent:.0f} % more"

    def swap(self) -> str:
        """What one codec for all rates takes the place of, in words."""
        if self.originals is None:
            return (
                f"one file of {megabytes(self.size)}; how large the originals' files are is not"
                " known"
            )
        before = (
            f"{len(self.qualities)} of"
            f" {megabytes(self.originals)}{' (parameters alone)' if self.widths else ''}"
        )
        return f"one file of {megabytes(self.size)} instead of {before}: {self.saving()}"


def megabytes(count: float) -> str:
    """Bytes as people read them: 15.5 MB; a megabyte is 1,000,000 bytes."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def storage(group: Sequence[Line]) -> list[Stored]:
    """Bytes of the files that hold an arm's rates, from the lines of one setting; nothing unless
    one codec for all rates is among them.
    """
    arms: dict[tuple[str, str], dict[int, Record]] = {}
    for line in group:
        if line.quality is not None and line.role != "control" and line.members[0]["file_bytes"]:
            width = line.members[0]["width"]
            arms.setdefault((line.role, line.arm), {})[line.quality if width is None else width] = (
                line.members[0]
            )
    found = []
    for (role, arm), members in arms.items():
        one = role == "modulated"
        widths = any(record["width"] is not None for record in members.values())
        sizes = [record["file_bytes"] for record in members.values()]
        # A slimmable codec takes the place of one codec for each width: float32 parameters each.
        before = [
            _original(record, group) if record["width"] is None else 4 * record["cost"]["params"]
            for record in members.values()
        ]
        known = None if None in before else sum(b for b in before if b is not None)
        found.append(
            Stored(
                arm,
                role,
                tuple(members),
                1 if one else len(sizes),
                sizes[0] if one else sum(sizes),
                known,
                widths,
            )
        )
    return found if any(stored.role == "modulated" for stored in found) else []


def _original(record: Record, group: Sequence[Line]) -> int | None:
    """Bytes of the file of the original of a record's quality, whatever its architecture."""
    originals = [
        o
        for line in group
        if line.role == "original" and line.quality == record["quality"]
        for o in line.members
        if o["file_bytes"]
    ]
    closest = max(originals, key=lambda o: closeness(record, o), default=None)
    return None if closest is None else int(closest["file_bytes"])
