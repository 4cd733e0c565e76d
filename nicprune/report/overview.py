"""The overview of several reports: one page of claims, and a page for each report.

overview.yaml names reports, arms and published figures; all other figures are read from the
reports.

write_overview("reports")  # reads reports/overview.yaml and reports/*/records.json
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nicprune.common.files import check_writable, write_atomically
from nicprune.report.overview_claims import (
    bases_table,
    claims_table,
    methods_plot,
    plot_caption,
    tried_table,
)
from nicprune.report.overview_config import OverviewConfig, read_overview_config
from nicprune.report.overview_pages import (
    CONDITIONS,
    PAGE,
    conditions_page,
    report_pages,
    steps_plots,
)
from nicprune.report.overview_reports import Reports

PLOT = "overview.png"
TRIED = "tried.md"


def write_overview(folder: str | Path) -> Path:
    """Write the overview of a folder of reports, as its overview.yaml says; return its README.md.

    Nothing is written unless all of it can be made.

    Raises:
        FileError: a file is missing or unreadable, or a page cannot be written.
        RecipeError: overview.yaml has an unknown key or a wrong value, or names a report, an arm
            or a figure that does not exist.
    """
    folder = Path(folder)
    if folder.is_dir():  # what is read says that it is missing
        check_writable(folder, [PAGE, TRIED, CONDITIONS, PLOT])
    for name, content in overview_files(folder).items():
        write_atomically(folder / name, partial(Path.write_bytes, data=content))
    return folder / PAGE


def overview_files(folder: str | Path) -> dict[str, bytes]:
    """Return the content of README.md, of its plot, of the pages beside it, and of the page of each
    report, by path.

    Paths are relative to the folder.

    Raises:
        FileError: overview.yaml or a report is missing or unreadable.
        RecipeError: as for `write_overview`.
    """
    folder = Path(folder)
    config, reports = read_overview_config(folder), Reports(folder)
    pages = report_pages(config, reports)
    tried = tried_table(config.claims, reports, pages)
    files = {PAGE: _front_page(config, reports, pages, tried=bool(tried)).encode()}
    if tried:
        files[TRIED] = (
            f"# Goals, and what was tried\n\n[{config.title}]({PAGE})\n\n{tried}\n".encode()
        )
    if any(section.rows for section in config.sections):
        files[CONDITIONS] = conditions_page(config).encode()
    if config.plot is not None:
        files[PLOT] = methods_plot(config.plot, reports)
    files |= steps_plots(config, reports)
    return files | {name: text.encode() for name, text in pages.items()}


def _front_page(
    config: OverviewConfig, reports: Reports, pages: dict[str, str], *, tried: bool
) -> str:
    """Return the page that is read in a minute."""
    parts = [f"# {config.title}", config.text.strip()]
    if config.claims:
        parts += ["## Claims of the field", claims_table(config.claims, reports, pages)]
    if tried:
        parts.append(f"[Our goals for these claims, and what was tried to reach them]({TRIED})")
    if config.plot is not None:
        parts += [
            "## Methods on one base",
            f"![cost over control against FLOP reduction of each method]({PLOT})",
            plot_caption(config.plot, pages),
        ]
    if config.bases:
        parts += [
            "## Distance of the bases from the official weights",
            bases_table(config.bases, reports, pages),
            config.bases_text.strip(),
        ]
    return "\n\n".join(filter(None, [*parts, "## Details", _links(config, reports, pages)])) + "\n"


def _links(config: OverviewConfig, reports: Reports, pages: dict[str, str]) -> str:
    """Return a line for each page with its sections, and the reports that have no page."""
    titles: dict[str, list[str]] = {}
    for section in config.sections:
        titles.setdefault(f"{section.page()}/{PAGE}", []).append(section.title)
    lines = [f"- [{Path(page).parent}]({page}): {'; '.join(titles[page])}" for page in pages]
    tables = sorted(path.relative_to(reports.folder) for path in reports.folder.glob("*/table.md"))
    others = [
        f"[{table.parent}]({table.as_posix()})"
        for table in tables
        if f"{table.parent}/{PAGE}" not in pages
    ]
    return "\n".join([*lines, *([f"- Others: {', '.join(others)}"] if others else [])])
