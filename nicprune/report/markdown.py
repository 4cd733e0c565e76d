"""The compact table as Markdown, followed by tables that only some codecs have."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from nicprune.report import adaptations, mac_spread, scratch_gap
from nicprune.report.aggregate import Row, compact_rows
from nicprune.report.columns import column_of
from nicprune.report.compact_table import ALIGN, cells, footnote, headers, storage_note
from nicprune.report.matching import Records


def markdown(records: Records) -> str:
    """Return a table for each setup, with MACs per image and gaps to training from scratch."""
    return "\n".join(
        f"**{escape(str(setup))}**\n\n"
        + _pipe_table([list(map(escape, cells(row))) for row in group], headers(), ALIGN)
        + "\n"
        + "".join(
            f"\n{escape(note.replace('+-', '±'))}\n"
            for note in (footnote(group), *storage_note(group))
        )
        + _per_image(group)
        + _scratch_gaps(group)
        + _adaptations(group)
        for setup, group in compact_rows(records).items()
    )


def escape(text: str) -> str:
    """Return the text without markup."""
    for sign in "\\`*_|<>[]":
        text = text.replace(sign, "\\" + sign)
    return text


def _pipe_table(rows: Sequence[Sequence[str]], headers: Sequence[str], align: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def _per_image(group: Sequence[Row]) -> str:
    spreads = mac_spread.mac_spreads(group)
    if not spreads:
        return ""
    count = mac_spread.timed_images(spreads)
    rows = [
        [
            "–" if spread.row.quality is None else str(spread.row.quality),
            escape(spread.row.arm),
            *map(escape, spread.cells(count > 0)),
        ]
        for spread in spreads
    ]
    columns = mac_spread.headers(count > 0)
    align = ("right", "left", "left", *["right"] * (len(columns) - 1))
    names = [column_of(name).header for name in ("quality", "label")]
    tested = len(group[0].setup.images)
    note = f"\n{mac_spread.NOTE.format(count)}\n" if count else ""
    return (
        f"\n**Per image** (kMAC/pixel with gates, over {tested} image{'s' * (tested != 1)})\n\n"
        f"{_pipe_table(rows, [*names, *columns], align)}\n{note}"
    )


def _scratch_gaps(group: Sequence[Row]) -> str:
    gaps = scratch_gap.scratch_gaps(group)
    if not gaps:
        return ""
    columns = scratch_gap.headers()
    align = ["left" if n in (1, 3, 5) else "right" for n in range(len(columns))]
    body = _pipe_table([list(map(escape, gap.cells())) for gap in gaps], columns, align)
    return f"\n**Against training from scratch**\n\n{body}\n\n{escape(scratch_gap.NOTE)}\n"


def _adaptations(group: Sequence[Row]) -> str:
    found = adaptations.adaptations(group)
    if not found:
        return ""
    columns = adaptations.headers()
    align = ["left" if n in (1, len(columns) - 1) else "right" for n in range(len(columns))]
    body = _pipe_table([list(map(escape, one.cells())) for one in found], columns, align)
    return f"\n**Two domains**\n\n{body}\n\n{escape(adaptations.NOTE)}\n"
