"""Sizes of codec files: one file for all rates against one file for each quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nicprune.report.aggregate import Row
from nicprune.report.matching import closeness
from nicprune.report.record import Record


@dataclass(frozen=True)
class FileSizes:
    """Files of an arm, and of the originals that they take the place of.

    Attributes:
        arm: name of the arm.
        role: role of its records.
        points: qualities that the files serve; of a slimmable codec, indices of its widths.
        files: number of files.
        size: size of these files, in bytes.
        originals: size of the originals' files for the same qualities, in bytes; None if not
            known. For widths: size of the parameters of one codec for each width.
        widths: True for a slimmable codec.
    """

    arm: str
    role: str
    points: tuple[int, ...]
    files: int
    size: int
    originals: int | None
    widths: bool = False

    def saving(self) -> str:
        """Return the difference to the originals in words; empty if not known."""
        if not self.originals or self.role == "original":
            return ""
        percent = 100 * (1 - self.size / self.originals)
        return f"{percent:.0f} % less" if percent >= 0 else f"{-percent:.0f} % more"

    def summary(self) -> str:
        """Return size and saving in words."""
        if self.originals is None:
            return (
                f"one file of {format_bytes(self.size)}; the size of the originals' files is not"
                " known"
            )
        before = f"{len(self.points)} of {format_bytes(self.originals)}"
        parameters = " (parameters alone)" if self.widths else ""
        return (
            f"one file of {format_bytes(self.size)} instead of {before}{parameters}:"
            f" {self.saving()}"
        )


def format_bytes(count: float) -> str:
    """Return a size in MB or kB; 1 MB is 1,000,000 bytes."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def file_sizes(group: Sequence[Row]) -> list[FileSizes]:
    """Return the file sizes of every arm; empty unless one of them is one codec for all rates.

    Args:
        group: the rows of one setup.
    """
    arms: dict[tuple[str, str], dict[int, Record]] = {}
    for row in group:
        record = row.members[0]
        if row.quality is not None and row.role != "control" and record.file_bytes:
            point = row.quality if record.width is None else record.width
            arms.setdefault((row.role, row.arm), {})[point] = record
    found = []
    for (role, arm), members in arms.items():
        one = role == "modulated"
        sizes = [record.file_bytes or 0 for record in members.values()]
        # A slimmable codec takes the place of one codec for each width: 4 bytes a parameter.
        before = [
            _original_bytes(record, group) if record.width is None else 4 * record.cost.params
            for record in members.values()
        ]
        found.append(
            FileSizes(
                arm,
                role,
                tuple(members),
                1 if one else len(sizes),
                sizes[0] if one else sum(sizes),
                None if None in before else sum(b for b in before if b is not None),
                any(record.width is not None for record in members.values()),
            )
        )
    return found if any(sizes.role == "modulated" for sizes in found) else []


def _original_bytes(record: Record, group: Sequence[Row]) -> int | None:
    """Return the file size of the original of a record's quality, whatever its architecture."""
    originals = [
        original
        for row in group
        if row.role == "original" and row.quality == record.quality
        for original in row.members
        if original.file_bytes
    ]
    closest = max(originals, key=lambda original: closeness(record, original), default=None)
    return None if closest is None else closest.file_bytes
