"""The content of overview.yaml: which figures of which reports an overview shows.

Claims, plot, bases and sections are data: figures are named here and read from the reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from nicprune.common.config import StrictConfig, parse, read_yaml
from nicprune.common.errors import FileError, RecipeError, closest
from nicprune.report.overview_figures import FIGURES

Verdict = Literal["beaten", "reproduced", "not seen", "not reached"]

VERDICTS: dict[Verdict, str] = {
    "beaten": "better than published",
    "reproduced": "as published, under our conditions",
    "not seen": "the published advantage does not show",
    "not reached": "it shows, but less than published or than our goal",
}
"""Meaning of each verdict."""


Qualities = Annotated[list[int], Field(min_length=1)]

NO_GOAL = "–"


class ClaimFigure(StrictConfig):
    """A figure of ours for a claim.

    Args:
        figure: name of a figure in `nicprune.report.overview_figures.FIGURES`.
        report: folder of the report.
        arm: name of the arm in the report, or of several, whose range is shown.
        control: arm to compare it with in place of the report's control; for several arms one for
            all, or one for each.
        caption: words before the figure; by default its title.
        qualities: qualities that it is of; by default all of the arm.
    """

    figure: str
    report: str
    arm: str | list[str]
    control: str | list[str] | None = None
    caption: str | None = None
    qualities: Qualities | None = None

    @field_validator("figure")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FIGURES:
            raise ValueError(f"no figure of this name; {closest(name, FIGURES)}")
        return name

    @model_validator(mode="after")
    def _one_control_each(self) -> ClaimFigure:
        if isinstance(self.control, list) and len(self.control) != len(self.arms()):
            raise ValueError("give one control for all arms, or one for each")
        if not self.arms():
            raise ValueError("give an arm")
        return self

    def arms(self) -> list[tuple[str, str | None]]:
        """Return each arm with the control that it is compared with, if not the report's."""
        arms = [self.arm] if isinstance(self.arm, str) else self.arm
        controls = self.control if isinstance(self.control, list) else [self.control] * len(arms)
        return list(zip(arms, controls, strict=False))


class Claim(StrictConfig):
    """A row of the table of claims: what the field says, and what we measured.

    Args:
        claim: the claim, in words.
        published: figures of its authors.
        goal: what we want to reach.
        ours: our figures; none yet if empty.
        verdict: verdict on the claim; none without figures.
        because: reason of the verdict, or why there are no figures, in few words.
        tried: figures of what was tried to come closer to the goal.
    """

    claim: str
    published: str = "–"
    goal: str = NO_GOAL
    ours: list[ClaimFigure]
    verdict: Verdict | None = None
    because: str = Field(min_length=1)
    tried: list[ClaimFigure] = []

    @model_validator(mode="after")
    def _figures_with_verdict(self) -> Claim:
        if bool(self.ours) != (self.verdict is not None):
            raise ValueError(
                "a claim with figures has a verdict"
                f" ({', '.join(get_args(Verdict))}), one without figures has none"
            )
        return self


class Method(StrictConfig):
    """The points of one method in the plot.

    Args:
        name: name of the method.
        arms: names of its arms in the report.
        report: folder of the report, if it is not the plot's.
    """

    name: str
    arms: list[str] = Field(min_length=1)
    report: str | None = None


class MethodsPlot(StrictConfig):
    """The plot of cost over control against FLOP reduction, on one base.

    Args:
        title: codec, qualities and training, in few words.
        report: folder of the report.
        methods: what is plotted.
        qualities: qualities that costs are means over; by default all, which must be the same for
            every arm.
        text: text below the plot.
    """

    title: str
    report: str
    methods: list[Method] = Field(min_length=1)
    qualities: Qualities | None = None
    text: str = ""


class OfficialPoint(StrictConfig):
    """Rate and distortion of official weights at one quality.

    Args:
        psnr_db: PSNR, in dB.
        bpp: rate, in bits per pixel.
    """

    psnr_db: float
    bpp: float


class Base(StrictConfig):
    """A codec that the methods start from, beside its official weights.

    Args:
        name: name of the base.
        report: folder of its report.
        official: what the official weights achieve, by quality.
        arm: name of its arm in the report.
    """

    name: str
    report: str
    official: dict[int, OfficialPoint] = Field(min_length=3)
    arm: str = "original"


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
    """A table on the page of a report.

    Args:
        title: heading.
        report: folder of the report of its rows, where the page stands.
        after: recipes that make what the section's recipes start from.
        times: folder of `nicprune time --out`, whose codecs are the rows.
        runtime: folder of `nicprune time --report`, likewise.
        text: text above the table.
        show: figures of each quality. "drop": PSNR drop and change of bpp against the original;
            "point": PSNR and bpp, for originals and codecs that differ in architecture; "cost":
            cost over the control's.
        rows: rows, unless `times` or `runtime` is given.
        below: text below the table.
        steps_plot: whether the page shows a plot of the rows' costs over the control against their
            steps of training, too.
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
    steps_plot: bool = False

    @model_validator(mode="after")
    def _one_table(self) -> OverviewSection:
        if sum(map(bool, (self.rows, self.times, self.runtime))) != 1:
            raise ValueError("a section has either rows or times or runtime")
        if not self.page():
            raise ValueError("a section of rows names its report, where its page stands")
        if self.steps_plot and not self.rows:
            raise ValueError("steps_plot shows rows, and this section has none")
        if Path(self.page()).is_absolute() or {"..", "."} & set(self.page().split("/")):
            raise ValueError("a report is a folder below the one of overview.yaml")
        return self

    def page(self) -> str:
        """Return the folder that the section's page stands in."""
        return self.report or self.times or self.runtime or ""


class OverviewConfig(StrictConfig):
    """The content of overview.yaml.

    Args:
        title: heading.
        text: opening: what was measured, and on what.
        claims: table of claims.
        plot: plot of the methods on one base.
        bases: distance of the bases from the official weights.
        bases_text: text below it.
        conditions: text of the page that says how to read the tables of the reports.
        sections: tables of the pages of the reports; those of one report share a page.
    """

    title: str
    text: str = ""
    claims: list[Claim] = []
    plot: MethodsPlot | None = None
    bases: list[Base] = []
    bases_text: str = ""
    conditions: str = ""
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
