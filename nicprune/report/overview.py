"""The overview of several reports on one screen: README.md in a folder of reports.

overview.yaml names the reports and arms, and published figures beside them; all other figures are
read from the reports.

write_overview("reports")  # reads reports/overview.yaml and reports/*/records.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from nicprune.common.errors import RecipeError, closest
from nicprune.common.files import write_text
from nicprune.report.aggregate import aggregate
from nicprune.report.overview_cells import Chosen, cells, headers
from nicprune.report.overview_config import OverviewRow, OverviewSection, read_overview_config
from nicprune.report.record import Record
from nicprune.report.record_files import read
from nicprune.report.runtime_table import NOTE as RUNTIME_NOTE
from nicprune.report.runtime_table import read_runtime, runtime_table
from nicprune.report.times import read_times, times_lines

NOTE = (
    "PSNR drop and change of bpp are against the original. Control: the original fine-tuned for the"
    " same number of steps without pruning. Cost over control: λ · 255² · MSE + bpp of the codec"
    " against that of the control, mean over qualities; empty where no control was trained for the"
    " same number of steps. Gap closed: (from scratch - codec) / (from scratch - original), in"
    ' cost; "from scratch" is the same small codec trained from random weights. BD-rate: over four'
    " qualities or more, against the original, then against the control; where two curves overlap"
    " over little of their range, the overlap is given. ± is the sample standard deviation over"
    " seeds; figures without it are of one seed."
)


def write_overview(folder: str | Path) -> Path:
    """Write README.md into a folder of reports, as its overview.yaml says; return its path.

    Raises:
        FileError: a file is missing or unreadable, or README.md cannot be written.
        RecipeError: overview.yaml has an unknown key, or names an arm that does not exist.
    """
    return write_text(Path(folder) / "README.md", overview_text(folder))


def overview_text(folder: str | Path) -> str:
    """Return the overview of a folder of reports, in Markdown.

    Raises:
        FileError: overview.yaml or a report is missing or unreadable.
        RecipeError: overview.yaml has an unknown key, or names an arm that does not exist.
    """
    folder = Path(folder)
    config = read_overview_config(folder)
    parts = [
        f"# {config.title}",
        config.text.strip(),
        NOTE,
        *(_section(folder, section) for section in config.sections),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _section(folder: Path, section: OverviewSection) -> str:
    if section.times is not None:
        table, source = _times(folder, section.times)
    elif section.runtime is not None:
        table, source = _runtime(folder, section.runtime)
    else:
        table, source = _figures(folder, section)
    parts = (f"## {section.title}", section.text.strip(), table, section.below.strip(), source)
    return "\n\n".join(filter(None, parts))


def _times(folder: Path, name: str) -> tuple[str, str]:
    """Return the table of a folder of times, and its conditions and command."""
    times, conditions, command = read_times(folder / name)
    return times_lines(times), (
        f"{conditions}\n\nMade by `{command}`; seconds by transform: [{name}]({name}/times.md)."
    )


def _runtime(folder: Path, name: str) -> tuple[str, str]:
    """Return the tables of a folder of times by backends, and their conditions and command."""
    rows, conditions, command = read_runtime(folder / name)
    return runtime_table(rows), (
        f"{RUNTIME_NOTE} {conditions}\n\nMade by `{command}`; as a table:"
        f" [{name}]({name}/runtime.csv)."
    )


def _figures(folder: Path, section: OverviewSection) -> tuple[str, str]:
    """Return the table of arms of a section, and the recipes that make it."""
    reports: dict[Path, list[Record]] = {}
    chosen = [_choose(folder, row, section.report, reports) for row in section.rows]
    qualities = sorted(
        {row.quality for one in chosen for row in one.rows if row.quality is not None}
    )
    names = list(dict.fromkeys(path.parent.name for path in reports))
    made = ", then ".join(f"`nicprune run {name}`" for name in [*section.after, *names])
    linked = ", ".join(f"[{name}]({name}/table.md)" for name in names)
    return (
        _table(headers(qualities), [cells(one, qualities, section.show) for one in chosen]),
        f"Made by {made}; every figure by quality: {linked}." if names else "",
    )


def _choose(
    folder: Path, config: OverviewRow, default: str | None, reports: dict[Path, list[Record]]
) -> Chosen:
    """Return the rows of an arm. Reports that were read are kept in `reports`."""
    if not config.run:
        return Chosen(config, [], [])
    path = _report(folder, config.report or default, config.arm)
    if path not in reports:
        reports[path] = read(path)
    records, name = reports[path], path.parent.name
    every = aggregate(records)
    labels = sorted({row.label for row in every})
    rows = [row for row in every if row.label == config.arm and not row.between()]
    if not rows:
        raise RecipeError(
            f"overview: no arm {config.arm!r} in report {name!r}; {closest(config.arm, labels)}"
        )
    if len({row.setup for row in rows}) > 1:
        raise RecipeError(
            f"overview: arm {config.arm!r} of report {name!r} was tested on several sets of"
            " images: make a report of each"
        )
    if config.control is not None and config.control not in labels:
        raise RecipeError(
            f"overview: no arm {config.control!r} in report {name!r} to compare {config.arm!r} with"
        )
    return Chosen(config, rows, [r for r in records if r.setup() == rows[0].setup])


def _report(folder: Path, name: str | None, arm: str) -> Path:
    """Return the records.json of a report."""
    if name is None:
        raise RecipeError(
            f"overview: the row {arm!r} names no report, and neither does its section"
        )
    path = folder / name / "records.json"
    if not path.exists():
        there = sorted(p.parent.name for p in folder.glob("*/records.json"))
        raise RecipeError(
            f"overview: no report {name!r}; {closest(name, there)}; or say run: false"
        )
    return path


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table without the columns that are empty."""
    keep = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    return tabulate(
        [[row[n] for n in keep] for row in rows],
        [columns[n] for n in keep],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left" if columns[n] in ("", "published") else "right" for n in keep],
    )
