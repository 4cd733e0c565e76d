"""The content of overview.yaml: which figures of which reports an overview shows."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from nicprune.common.config import StrictConfig, parse, read_yaml
from nicprune.common.errors import FileError, RecipeError


class OverviewRow(StrictConfig):
    """A row of a table: one arm of one report.

    Args:
        arm: name of the arm in the report; of a slimmable codec with its width ("slimmable,
            width 48").
        report: folder of the report, if it is not the section's.
        name: name of the row; by default that of the arm.
        published: figures of the method's authors.
        run: False for an arm that has not been run; its row has no figures.
        control: arm that its cost is compared with, if it is not the report's control.
    """

    arm: str
    report: str | None = None
    name: str | None = None
    published: str = ""
    run: bool = True
    control: str | None = None


class OverviewSection(StrictConfig):
    """A table of one codec.

    Args:
        title: heading.
        report: folder of the report of its rows.
        after: recipes that make what the section's recipes start from.
        times: folder of `nicprune time --out`, whose codecs are the rows.
        runtime: folder of `nicprune time --report`, likewise.
        text: text above the table.
        show: figures of each quality. "drop": PSNR drop and change of bpp against the original;
            "point": PSNR and bpp, for originals and codecs that differ in architecture; "cost":
            cost over the control's.
        rows: rows, unless `times` or `runtime` is given.
        below: text below the table.
    """

    title: str
    report: str | None = None
    after: list[str] = []
    times: str | None = None
    runtime: str | None = None
    text: str = ""
    show: Literal["drop", "point", "cost"] = "drop"
    rows: list[OverviewRow] = []
    below: str = ""

    @model_validator(mode="after")
    def _one_table(self) -> OverviewSection:
        if sum(map(bool, (self.rows, self.times, self.runtime))) != 1:
            raise ValueError("a section has either rows or times or runtime")
        return self


class OverviewConfig(StrictConfig):
    """The content of overview.yaml.

    Args:
        title: heading.
        text: text below it.
        sections: tables in their order.
    """

    title: str
    text: str = ""
    sections: list[OverviewSection] = Field(min_length=1)


def read_overview_config(folder: Path) -> OverviewConfig:
    """Read overview.yaml in a folder of reports.

    Raises:
        FileError: the file is missing, unreadable or not YAML, or a key stands twice.
        RecipeError: a key is unknown, missing or has a wrong value.
    """
    source = folder / "overview.yaml"
    try:
        given = read_yaml(source.read_text(encoding="utf-8"), str(source))
    except OSError as error:
        raise FileError(
            f"cannot read {source}: {error.strerror or error}; it names the figures of"
            f" {folder / 'README.md'}"
        ) from error
    except (RecipeError, UnicodeDecodeError) as error:
        raise FileError(f"{source} is not YAML: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(given, dict):
        raise FileError(f"{source} is not an overview: expected title and sections")
    return parse(OverviewConfig, given, str(source))
