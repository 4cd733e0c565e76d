"""One screen of several reports: which figures stand on it, and beside what published ones, says a
YAML file; the figures are read from the reports.

write_overview("reports")   # reads reports/overview.yaml and reports/*/records.json, writes
reports/README.md
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator
from tabulate import tabulate

from nicprune.common.config import StrictConfig, parse
from nicprune.common.errors import FileError, RecipeError, closest
from nicprune.common.files import write_text
from nicprune.report.aggregate import Line, lines
from nicprune.report.bd_rate import ENOUGH_POINTS, bd_table
from nicprune.report.records import Record, read, reference_for
from nicprune.report.scratch_gap import cost, gaps
from nicprune.report.times import read_times, times_lines

NOTE = (
    "PSNR drop, and change of bpp, against the original, which no training touched since; control:"
    " the original trained on for as many steps. Cost: lambda · 255² · MSE + bpp against that"
    " control, mean over qualities; empty where no control was trained for as many steps. Gap"
    " closed: (from scratch - codec) / (from scratch - original), in cost, the same small codec"
    " trained from scratch. BD-rate: over four qualities and more, against the original, the"
    " control; where two curves overlap over little of their range, over how much. ± is the sample"
    " standard deviation over seeds; without, there is one seed."
)


class Row(StrictConfig):
    """A line of a table.

    Args:
        arm: as the report calls it, a slimmable codec's with its width ("slimmable, width 48").
        report: the report's folder, if not the section's.
        name: what to call it here; by default as the report does.
        published: what its authors report.
        run: False for what has not been run: the line stands there without figures.
        control: the arm that its cost is compared with, if not the report's control.
    """

    arm: str
    report: str | None = None
    name: str | None = None
    published: str = ""
    run: bool = True
    control: str | None = None


class Section(StrictConfig):
    """A table: lines of one codec.

    Args:
        after: recipes that make what its recipes start from.
        times: a folder of `nicprune time --out`, whose codecs stand in the table instead of rows.
        show: "drop": PSNR drop and change of bpp against the original; "point": PSNR and bpp as
            they are, for originals and unlike codecs; "cost": the cost over the control's.
        below: text under the table.
    """

    title: str
    report: str | None = None
    after: list[str] = []
    times: str | None = None
    text: str = ""
    show: Literal["drop", "point", "cost"] = "drop"
    rows: list[Row] = []
    below: str = ""

    @model_validator(mode="after")
    def _one_of_both(self) -> Section:
        if bool(self.rows) == bool(self.times):
            raise ValueError("a section has either rows or times")
        return self


class Overview(StrictConfig):
    """The content of overview.yaml."""

    title: str
    text: str = ""
    sections: list[Section] = Field(min_length=1)


def write_overview(folder: str | Path) -> Path:
    """Write README.md into a folder of reports, as the overview.yaml in it says; return its path.

    Raises:
        FileError, RecipeError: as `overview_text`; FileError also where the README cannot be
            written.
    """
    return write_text(Path(folder) / "README.md", overview_text(folder))


def overview_text(folder: str | Path) -> str:
    """The overview of a folder of reports, in Markdown.

    Raises:
        FileError: overview.yaml or a report is not there or unreadable.
        RecipeError: overview.yaml names a setting or an arm that does not exist.
    """
    folder = Path(folder)
    source = folder / "overview.yaml"
    try:
        given = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(
            f"cannot read {source}: {error.strerror or error}; it says what stands in"
            f" {folder / 'README.md'}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileError(f"{source} is not YAML: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(given, dict):
        raise FileError(f"{source} is not an overview: expected title and sections")
    overview = parse(Overview, given, str(source))
    parts = [
        f"# {overview.title}",
        *([overview.text.strip()] if overview.text else []),
        NOTE,
        *(_section(folder, section) for section in overview.sections),
    ]
    return "\n\n".join(parts) + "\n"


def _report(folder: Path, name: str | None, row: Row) -> Path:
    if name is None:
        raise RecipeError(
            f"overview: the line {row.arm!r} names no report, and neither does its section"
        )
    path = folder / name / "records.json"
    if not path.exists():
        there = sorted(p.parent.name for p in folder.glob("*/records.json"))
        raise RecipeError(
            f"overview: no report {name!r}; {closest(name, there)}; or say run: false"
        )
    return path


def _timed(folder: Path, section: Section, name: str) -> str:
    times, conditions, command = read_times(folder / name)
    said = f"{conditions}\n\nMade by `{command}`; seconds by transform: [{name}]({name}/times.md)."
    return "\n\n".join(
        part
        for part in (
            f"## {section.title}",
            section.text.strip(),
            times_lines(times),
            section.below.strip(),
            said,
        )
        if part
    )


def _section(folder: Path, section: Section) -> str:
    if section.times is not None:
        return _timed(folder, section, section.times)
    found: list[tuple[Row, list[Line], list[Record]]] = []
    reports: dict[Path, list[Record]] = {}
    for row in section.rows:
        if not row.run:
            found.append((row, [], []))
            continue
        path = _report(folder, row.report or section.report, row)
        records = reports.setdefault(path, read(path) if path not in reports else [])
        every = lines(records)
        chosen = [line for line in every if line.label == row.arm and not line.between()]
        if not chosen:
            raise RecipeError(
                f"overview: no arm {row.arm!r} in report {path.parent.name!r};"
                f" {closest(row.arm, sorted({line.label for line in every}))}"
            )
        if len({line.setting for line in chosen}) > 1:
            raise RecipeError(
                f"overview: arm {row.arm!r} of report {path.parent.name!r} was tested on several"
                " sets of photographs: make a report of each"
            )
        if row.control is not None and row.control not in {line.label for line in every}:
            raise RecipeError(
                f"overview: no arm {row.control!r} in report {path.parent.name!r} to compare"
                f" {row.arm!r} with"
            )
        found.append(
            (row, chosen, [record for record in records if record.setting() == chosen[0].setting])
        )
    qualities = sorted(
        {line.quality for _, chosen, _ in found for line in chosen if line.quality is not None}
    )
    headers = [
        "",
        "FLOP reduction",
        *(f"q{quality}" for quality in qualities),
        "cost over control",
        "gap closed",
        "BD-rate",
        "published",
    ]
    body = [_cells(row, chosen, records, qualities, section.show) for row, chosen, records in found]
    keep = [n for n, header in enumerate(headers) if any(cells[n] for cells in body)]
    align = ["left" if headers[n] in ("", "published") else "right" for n in keep]
    text = tabulate(
        [[cells[n] for n in keep] for cells in body],
        [headers[n] for n in keep],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=align,
    )
    names = list(dict.fromkeys(path.parent.name for path in reports))
    made = ", then ".join(f"`nicprune run {name}`" for name in [*section.after, *names])
    linked = ", ".join(f"[{name}]({name}/table.md)" for name in names)
    said = f"Made by {made}; every figure by quality: {linked}." if names else ""
    return "\n\n".join(
        part
        for part in (f"## {section.title}", section.text.strip(), text, section.below.strip(), said)
        if part
    )


def _cells(
    row: Row, chosen: list[Line], records: list[Record], qualities: list[int], show: str
) -> list[str]:
    name = _plain(row.name or row.arm)
    if not chosen:
        return [name, "not run", *([""] * (len(qualities) + 3)), _plain(row.published)]
    by_quality = {line.quality: line for line in chosen}
    whole = chosen[0].role in ("original", "control")
    reduction = "" if whole else _span([line.mean["flop_reduction"] for line in chosen])
    cells = {
        "drop": _drop,
        "point": _point,
        "cost": lambda line: _over_control([line], records, row.control),
    }
    each = [
        cells[show](by_quality[quality]) if quality in by_quality else "" for quality in qualities
    ]
    over = "" if whole and show != "cost" else _over_control(chosen, records, row.control)
    return [
        name,
        reduction,
        *each,
        over,
        _closed(chosen, records),
        _bd(chosen, records),
        _plain(row.published),
    ]


def _plain(text: str) -> str:
    """As a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _span(values: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return f"{low}×" if low == high else f"{low}–{high}×"


def _drop(line: Line) -> str:
    return f"{line.show('psnr_drop_db', 'z.2f')} dB, {line.show('bpp_change_pct', '+.1f')} %"


def _point(line: Line) -> str:
    return f"{line.show('psnr_db', '.2f')} dB, {line.show('bpp', '.3f')}"


def _over_control(chosen: list[Line], records: list[Record], named: str | None) -> str:
    """Mean over qualities of the cost against the control's of the same quality, seed by seed where
    there is one of the seed; empty where no control was trained for as many steps. Named ones are
    taken for controls, however long they were trained.
    """
    by_seed: dict[Any, list[float]] = {}
    for line in chosen:
        for record in line.members:
            controls = [
                r for r in records if r["role"] == "control" and r["steps"] == record["steps"]
            ]
            if named is not None:
                controls = [Record(r | {"role": "control"}) for r in records if r["label"] == named]
            control = reference_for(record, controls, "control")
            # Costs by different lambdas, as the widths of a slimmable codec have, say nothing about
            # each other.
            costs = [
                cost(r)
                for r in (record, control)
                if r is not None
                and math.isclose(r["lmbda"] or 0, record["lmbda"] or 0, rel_tol=1e-4)
            ]
            if len(costs) == 2 and costs[0] is not None and costs[1] is not None:
                by_seed.setdefault(record["seed"], []).append(100 * (costs[0] / costs[1] - 1))
    means = [statistics.fmean(values) for values in by_seed.values()]
    if not means:
        return ""
    return (
        f"{statistics.fmean(means):+z.1f}"
        + (f" ±{statistics.stdev(means):.1f}" if len(means) > 1 else "")
        + " %"
    )


def _closed(chosen: list[Line], records: list[Record]) -> str:
    """The share of the gap to the same small codec from scratch that is closed, where one was
    trained; the one trained longest counts.
    """
    found = [
        gap for gap in gaps(lines(records)) if gap.arm == chosen[0].arm and gap.closed() is not None
    ]
    longest = [gap for gap in found if gap.steps == max(g.steps for g in found)]
    closed = [value for gap in longest if (value := gap.closed()) is not None]
    share = statistics.fmean(closed) if closed else math.nan
    return (
        "" if math.isnan(share) else f"{share:.0f} %" if share > 0 else "none"
    )  # worse than from scratch, by however much


def _bd(chosen: list[Line], records: list[Record]) -> str:
    """BD-rate against the original and, of what is no control, against the control; empty below
    four qualities. Beside it the overlap if it is small.
    """
    if len({line.quality for line in chosen}) < ENOUGH_POINTS:
        return ""
    table = bd_table(records)
    table = table[(table["label"] == chosen[0].arm) & (table["role"] == chosen[0].role)]
    shown = []
    for against in ("original", "control"):
        found = table[(table["against"] == against) & table["bd_rate_pct"].notna()]
        if len(found):
            least = found["overlap_pct"].min()
            shown.append(
                f"{found['bd_rate_pct'].mean():+.1f} %"
                + (f" (over {least:.0f} % of the range)" if (found["caution"] != "").any() else "")
            )
    return ", ".join(shown)
