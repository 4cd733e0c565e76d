"""`nicprune report` and `nicprune overview`."""

from __future__ import annotations

from typing import Annotated

import typer

from nicprune.cli.options import Force


def report(
    paths: Annotated[
        list[str], typer.Argument(help="Folders of runs or reports, or record files.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the report.")
    ] = "reports/report",
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    crops: Annotated[
        bool, typer.Option(help="Show crops of the images, where the records have them.")
    ] = True,
    force: Force = False,
) -> None:
    """Join finished runs into one report.

    Runs are joined by quality. The report holds tables, plots and a page.
    """
    from pathlib import Path

    from nicprune.common.errors import FileError
    from nicprune.common.files import check_writable
    from nicprune.report.folder import FILES, check_replaceable, write_report
    from nicprune.report.record_files import collect
    from nicprune.report.terminal import text_table
    from nicprune.report.video import video_table, write_video_report
    from nicprune.report.video_record import read_video_records

    folders = [path if path.is_dir() else path.parent for path in map(Path, paths)]
    among = [given for given in folders if given.resolve() == Path(output).resolve()]
    if among and len(paths) > 1:
        raise FileError(f"{output} is an input of this command; name another folder (-o)")
    check_writable(output, FILES)
    if not among and not force:
        check_replaceable(output)
    if videos := read_video_records(paths):
        page = write_video_report(videos, output, title=title)
        typer.echo(f"{video_table(videos)}\nreport: {page}")
        return
    records = collect(paths)
    page = write_report(records, output, title=title, crops=crops)
    typer.echo(text_table(records))
    typer.echo(f"\nreport: {page}")


def overview(
    folder: Annotated[
        str,
        typer.Argument(
            help="Folder of reports, with an overview.yaml that names the figures to show."
        ),
    ] = "reports",
) -> None:
    """Write an overview of several reports.

    README.md in the folder shows claims of the field beside our figures, a plot, and the distance
    of the bases from the official weights. README.md in the folder of each report has its tables.
    """
    from nicprune.report.overview import write_overview

    typer.echo(f"wrote {write_overview(folder)}")
