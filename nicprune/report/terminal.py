"""The compact table as plain text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from nicprune.report.aggregate import Row, compact_rows
from nicprune.report.compact_table import ALIGN, COLUMNS, cells, footnote, headers, storage_note
from nicprune.report.matching import Records

WIDTH = 120
"""Characters of the widest line."""
NARROWEST_LABEL = 8
"""Characters that a label is wrapped to at the least."""


def text_table(records: Records) -> str:
    """Return a table for each setup, at most 120 characters wide; ASCII except for names.

    Where there is no room, the column MS-SSIM is left out, then labels are wrapped.
    """
    return "\n\n".join(
        "\n".join(
            [
                textwrap.shorten(str(setup), WIDTH),
                _fitted(group),
                *(textwrap.fill(note, WIDTH) for note in (footnote(group), *storage_note(group))),
            ]
        )
        for setup, group in compact_rows(records).items()
    )


def _fitted(group: Sequence[Row]) -> str:
    rows = [cells(row, "x", "+-", "-") for row in group]
    ms_ssim = COLUMNS.index("ms_ssim")
    columns, widest = list(range(len(COLUMNS))), max(len(row[1]) for row in rows)
    while True:
        # Labels are wrapped, not cut: the end of a label may be what tells two arms apart.
        shown = [[row[0], "\n".join(textwrap.wrap(row[1], widest)), *row[2:]] for row in rows]
        text = tabulate(
            [[row[c] for c in columns] for row in shown],
            [_broken(headers()[c]) for c in columns],
            tablefmt="simple",
            disable_numparse=True,
            colalign=[ALIGN[c] for c in columns],
        )
        excess = max(map(len, text.splitlines())) - WIDTH
        if excess <= 0 or (widest <= NARROWEST_LABEL and ms_ssim not in columns):
            return text
        if ms_ssim in columns:  # table.csv has it
            columns.remove(ms_ssim)
        else:
            widest = max(NARROWEST_LABEL, widest - excess)


def _broken(header: str) -> str:
    """Break a header into two lines: before a slash, or else before the unit."""
    if "/" in header:
        return header.replace("/", "\n/")
    first, _, _ = header.removesuffix(" (%)").rpartition(" ")
    rest = header[len(first) :].strip()
    return f"{first}\n{rest}" if first else header
