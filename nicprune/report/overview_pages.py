"""The pages of an overview: a page for each report, with the tables of its sections."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from nicprune.common.errors import RecipeError
from nicprune.report.overview_cells import cells, headers, table
from nicprune.report.overview_config import OverviewConfig, OverviewRow, OverviewSection
from nicprune.report.overview_figures import cost_over_control
from nicprune.report.overview_reports import Arm, Reports
from nicprune.report.plots.cost_curves import STEPS, CostCurve, cost_curves
from nicprune.report.runtime_table import NOTE as RUNTIME_NOTE
from nicprune.report.runtime_table import read_runtime, runtime_table
from nicprune.report.times import read_times, times_lines

PAGE = "README.md"
"""File name of a page: the one that code hosts show for a folder."""

STEPS_PLOT = "steps.png"
"""File name of a page's plot of cost over control against steps of training."""

CONDITIONS = "conditions.md"
"""File name of the page that says how to read the tables of all others."""

NOTE = (
    "PSNR drop and change of bpp are against the original. Control: the original fine-tuned for the"
    " same number of steps without pruning. Cost over control: λ · 255² · MSE + bpp of the codec"
    " against that of the control, mean over qualities; empty where no control was trained for the"
    " same number of steps. Gap closed: (from scratch - codec) / (from scratch - whole codec), in"
    ' cost; "from scratch" is the same small codec trained from random weights, the whole codec is'
    " the original trained on without a method for as many steps as the pruned one, or where there"
    " is none, the original itself. BD-rate: over four qualities or more, against the original,"
    " then against the control; where two curves overlap over little of their range, the overlap is"
    " given. ± is the sample standard deviation over seeds; figures without it are of one seed."
)


def report_pages(config: OverviewConfig, reports: Reports) -> dict[str, str]:
    """Return the text of each page, by its path in the folder of reports.

    Sections of one report share a page.
    """
    sections: dict[str, list[OverviewSection]] = {}
    for section in config.sections:
        sections.setdefault(section.page(), []).append(section)
    return {f"{page}/{PAGE}": _page(page, here, config, reports) for page, here in sections.items()}


def steps_plots(config: OverviewConfig, reports: Reports) -> dict[str, bytes]:
    """Return the plots of cost over control against steps of training, by path like the pages.

    Raises:
        RecipeError: a row has no cost over control, or two sections of one page have such a plot.
    """
    files: dict[str, bytes] = {}
    for section in config.sections:
        if not section.steps_plot:
            continue
        where, path = f"section {section.title!r}", f"{section.page()}/{STEPS_PLOT}"
        if path in files:
            raise RecipeError(f"overview, {where}: its page has a plot against steps already")
        points = []
        for row in filter(lambda row: row.run, section.rows):
            arm = reports.arm(row.report or section.page(), row.arm, row.control, where=where)
            steps = {record.steps for one in arm.rows for record in one.members}
            costs = cost_over_control(arm)
            if not costs or len(steps) > 1 or not (taken := steps.pop()):
                raise RecipeError(
                    f"overview, {where}: arm {row.arm!r} has no cost over control after so many"
                    " steps, which steps_plot needs of each row"
                )
            points.append((taken, costs[0].mean, costs[0].spread or 0.0))
        files[path] = cost_curves(section.title, [CostCurve(section.title, points)], STEPS)
    return files


def conditions_page(config: OverviewConfig) -> str:
    """Return the page that the pages of reports link to: what their columns mean, and what holds
    for all of them.
    """
    parts = ("# How to read the tables", f"[{config.title}]({PAGE})", NOTE, config.conditions)
    return "\n\n".join(filter(None, map(str.strip, parts))) + "\n"


def link(target: str, page: str) -> str:
    """Return the relative link from a page's folder to a file of the folder of reports."""
    return posixpath.relpath(target, page)


def _page(
    page: str, sections: Sequence[OverviewSection], config: OverviewConfig, reports: Reports
) -> str:
    parts = [f"# {page}", f"[{config.title}]({link(PAGE, page)})"]
    parts += [_section(section, page, reports) for section in sections]
    if any(section.rows for section in sections):
        parts.append(f"[How to read these tables]({link(CONDITIONS, page)})")
    return "\n\n".join(filter(None, parts)) + "\n"


def _section(section: OverviewSection, page: str, reports: Reports) -> str:
    if section.times is not None:
        shown, source = _times(reports, section.times)
    elif section.runtime is not None:
        shown, source = _runtime(reports, section.runtime)
    else:
        shown, source = _figures(reports, section, page)
    plot = f"![cost over control against steps of training]({STEPS_PLOT})"
    parts = (
        f"## {section.title}",
        section.text.strip(),
        shown,
        plot if section.steps_plot else "",
        section.below.strip(),
        source,
    )
    return "\n\n".join(filter(None, parts))


def _times(reports: Reports, name: str) -> tuple[str, str]:
    """Return the table of a folder of times, and its conditions and command."""
    times, conditions, command = read_times(reports.folder / name)
    return times_lines(times), (
        f"{conditions}\n\nMade by `{command}`; seconds by transform: [times.md](times.md)."
    )


def _runtime(reports: Reports, name: str) -> tuple[str, str]:
    """Return the tables of a folder of times by backends, and their conditions and command."""
    rows, conditions, command = read_runtime(reports.folder / name)
    return runtime_table(rows), (
        f"{RUNTIME_NOTE} {conditions}\n\nMade by `{command}`; as a table:"
        " [runtime.csv](runtime.csv)."
    )


def _figures(reports: Reports, section: OverviewSection, page: str) -> tuple[str, str]:
    """Return the table of arms of a section, and the recipes that make it."""
    shown: list[tuple[OverviewRow, Arm | None]] = []
    names: dict[str, None] = {}
    for row in section.rows:
        name = row.report or page
        arm = None
        if row.run:
            where = f"section {section.title!r}"
            arm = reports.arm(name, row.arm, row.control, where=where)
            names[name] = None
        shown.append((row, arm))
    qualities = sorted(
        {
            row.quality
            for _, arm in shown
            for row in (arm.rows if arm else ())
            if row.quality is not None
        }
    )
    made = ", then ".join(f"`nicprune run {name}`" for name in [*section.after, *names])
    linked = ", ".join(f"[{name}]({link(f'{name}/table.md', page)})" for name in names)
    return (
        table(headers(qualities), [cells(row, arm, qualities, section.show) for row, arm in shown]),
        f"Made by {made}; every figure by quality: {linked}." if names else "",
    )
