"""The reports that an overview shows: each is read once, and its arms are found by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nicprune.common.errors import RecipeError, closest
from nicprune.report.aggregate import Row, aggregate
from nicprune.report.record import Record
from nicprune.report.record_files import read


@dataclass(frozen=True)
class Arm:
    """An arm of a report.

    Attributes:
        name: name of the arm.
        rows: its rows, by quality.
        records: all records of the report with the setup of these rows; where another control was
            asked for, that one is the control among them.
        own_control: True if another control was asked for.
    """

    name: str
    rows: list[Row]
    records: list[Record]
    own_control: bool = False


class Reports:
    """The reports of a folder.

    Args:
        folder: folder with a folder for each report.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[str, tuple[list[Record], list[Row]]] = {}

    def arm(
        self,
        report: str,
        name: str,
        control: str | None = None,
        *,
        qualities: Sequence[int] | None = None,
        where: str,
    ) -> Arm:
        """Return an arm of a report.

        Args:
            report: folder of the report.
            name: name of the arm; of a slimmable codec with its width ("slim, width 1").
            control: arm to compare it with in place of the report's control.
            qualities: qualities to look at; all of the arm if None.
            where: place in overview.yaml, for errors.

        Raises:
            FileError: the report is unreadable.
            RecipeError: there is no such report or arm, the arm lacks a quality, or it was tested
                on several sets of images.
        """
        records, rows = self._rows(report, where)
        arms: dict[str, list[Row]] = {}
        for row in rows:
            arms.setdefault(row.label, []).append(row)
        for wanted in filter(None, (name, control)):
            if wanted not in arms:
                raise RecipeError(
                    f"overview, {where}: no arm {wanted!r} in report {report!r};"
                    f" {closest(wanted, arms)}"
                )
        chosen = arms[name]
        if len({row.setup for row in chosen}) > 1:
            raise RecipeError(
                f"overview, {where}: arm {name!r} of report {report!r} was tested on several sets"
                " of images: make a report of each"
            )
        if qualities is not None:
            if missing := set(qualities) - {row.quality for row in chosen}:
                raise RecipeError(
                    f"overview, {where}: arm {name!r} of report {report!r} has no quality"
                    f" {min(missing)}"
                )
            chosen = [row for row in chosen if row.quality in qualities]
        alike = [
            record
            for record in records
            if record.setup() == chosen[0].setup
            and (qualities is None or record.quality in qualities)
        ]
        if control is None:
            return Arm(name, chosen, alike)
        controls = [record for row in arms[control] for record in row.members if record in alike]
        return Arm(
            name,
            chosen,
            [record for record in alike if record.role != "control"]
            + [record.model_copy(update={"role": "control"}) for record in controls],
            own_control=True,
        )

    def _rows(self, name: str, where: str) -> tuple[list[Record], list[Row]]:
        """Return the records of a report and its rows at qualities."""
        if name not in self._read:
            path = self.folder / name / "records.json"
            if not path.exists():
                there = [p.parent.name for p in self.folder.glob("*/records.json")]
                raise RecipeError(f"overview, {where}: no report {name!r}; {closest(name, there)}")
            records = read(path)
            self._read[name] = records, [row for row in aggregate(records) if not row.between()]
        return self._read[name]
