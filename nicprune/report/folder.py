"""The folder of a report: tables, BD-rates, records, plots, crops and the page."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from nicprune.common.errors import FileError
from nicprune.common.files import write_atomically, write_text
from nicprune.data.images import SUFFIXES
from nicprune.report.aggregate import aggregate
from nicprune.report.bd_rate import bd_table
from nicprune.report.cautions import cautions
from nicprune.report.crops import no_crops, read_crops
from nicprune.report.csv import csv
from nicprune.report.data_frame import table
from nicprune.report.latex import latex
from nicprune.report.markdown import markdown
from nicprune.report.matching import Records, as_records
from nicprune.report.page import DrawnPlot, render_page
from nicprune.report.plots.plot import plots_in_order
from nicprune.report.plots.theme import DARK
from nicprune.report.record import Record
from nicprune.report.record_files import collect, records_json
from nicprune.report.video_record import read_video_records

FILES = ("records.json", "table.csv", "table.md", "table.tex", "bd.csv", "index.html")
"""Files of every report, those of videos but for LaTeX."""


def check_replaceable(folder: str | Path) -> None:
    """Raise FileError if a folder has files with the names of a report's or holds images, and is no
    report: plots and crops would be taken for images.
    """
    folder = Path(folder)
    there = [name for name in FILES if (folder / name).exists()] or [
        str(path.relative_to(folder))
        for part in (folder, *(folder / split for split in ("train", "test", "validation")))
        for path in (sorted(part.iterdir()) if part.is_dir() else ())
        if path.suffix.lower() in SUFFIXES
    ]
    if not there:
        return
    try:
        if read_video_records([folder]) or collect([folder]):
            return
    except FileError:
        pass
    raise FileError(
        f"{folder / there[0]} exists and is not of a report; name another folder, or replace it"
        " with --force"
    )


def write_report(
    records: Records,
    folder: str | Path,
    title: str | None = None,
    *,
    crops: bool = True,
) -> Path:
    """Write a report; return the path of its index.html.

    The files are table.csv, table.md, table.tex, bd.csv, records.json, a PNG for each plot,
    crops/, and index.html, which is written last and needs none of the others.

    Args:
        records: from `collect`, or their content as mappings (without crops).
        folder: folder to write to. Files of an earlier report are replaced.
        title: heading of the page; by default the names of recipes and codecs.
        crops: write pieces of test images. False leaves those of an earlier report in place.

    Raises:
        FileError: there are no records, or the folder cannot be written to.
    """
    folder, ready = Path(folder), as_records(records)
    if not ready:
        raise FileError("no records to report on; `nicprune run RECIPE` writes them")
    rows = aggregate(ready)
    pieces = read_crops(ready) if crops else no_crops(ready)
    bd = bd_table(ready)
    plots = [DrawnPlot(plot, plot.draw(rows), plot.draw(rows, DARK)) for plot in plots_in_order()]
    at_qualities = [row for row in rows if not row.between()]
    known = cautions(ready, at_qualities, pieces)
    page = render_page(title or _title(ready), ready, rows, bd, plots, pieces, known)
    write_text(folder / "table.csv", csv(table(ready)))
    write_text(folder / "table.md", markdown(ready))
    write_text(folder / "table.tex", latex(ready))
    write_text(folder / "bd.csv", csv(bd))
    for name, content in pieces.files.items():
        _write_bytes(folder / name, content)
    write_text(folder / "records.json", records_json(ready, folder, pieces.of_records))
    for drawn in plots:
        if drawn.light is not None:
            _write_bytes(folder / drawn.plot.file, drawn.light)
        else:  # a plot of an earlier report would be mistaken for one of this report
            with contextlib.suppress(OSError):
                (folder / drawn.plot.file).unlink(missing_ok=True)
    return write_text(folder / "index.html", page)


def _write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _title(records: Sequence[Record]) -> str:
    recipes = sorted({str(r.recipe) for r in records if r.recipe})
    codecs = sorted({r.codec for r in records})
    made = [role for role in ("pruned", "modulated") if any(r.role == role for r in records)]
    return (
        f"{', '.join(recipes) or 'Report'}: {', '.join(codecs)}, {' and '.join(made) or 'pruned'}"
    )
