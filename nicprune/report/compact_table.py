"""The compact table for people: its headers, cells and footnotes, whatever the markup."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nicprune.report.aggregate import Row, why_no_drop
from nicprune.report.columns import column_of
from nicprune.report.file_sizes import file_sizes

COLUMNS = (
    "quality",
    "label",
    "kmac_per_pixel",
    "flop_reduction",
    "bpp",
    "psnr_db",
    "psnr_drop_db",
    "ms_ssim",
    "encode_s",
    "decode_s",
)
ALIGN = ("right", "left", *["right"] * 8)


def headers() -> list[str]:
    """Return the headers of the compact table."""
    drop = f"{column_of('psnr_drop_db').header} ({column_of('psnr_drop_pct').unit})"
    return [drop if name == "psnr_drop_db" else column_of(name).header for name in COLUMNS]


def cells(row: Row, times: str = "×", plus_minus: str = "±", missing: str = "–") -> list[str]:
    """Return the cells of one row.

    Args:
        times: sign behind a ratio.
        plus_minus: sign before a standard deviation.
        missing: text of an empty cell.
    """

    def show(name: str, form: str) -> str:
        return row.show(name, form, plus_minus, missing)

    drop = missing
    if row.role != "original" and math.isfinite(row.mean["psnr_drop_db"]):
        drop = f"{show('psnr_drop_db', 'z.2f')} ({row.mean['psnr_drop_pct']:z.2f} %)"
    reduction = missing
    if row.role != "original" or row.mean["flop_reduction"] != 1:
        reduction = f"{row.mean['flop_reduction']:.2f}{times}{row.show_reductions(missing)}"
    return [
        missing if row.quality is None else str(row.quality),
        row.label,
        f"{row.mean['kmac_per_pixel']:.2f}",
        reduction,
        show("bpp", ".4f"),
        show("psnr_db", "z.2f"),
        drop,
        show("ms_ssim", ".4f").split(f" {plus_minus}")[0],
        show("encode_s", ".3f").split(f" {plus_minus}")[0],
        show("decode_s", ".3f").split(f" {plus_minus}")[0],
    ]


def footnote(group: Sequence[Row]) -> str:
    """Return definitions of the figures of a table, and the conditions of their measurement.

    Args:
        group: the rows of the table.
    """
    members = [record for row in group for record in row.members]

    def values(name: str) -> str:
        found = sorted({str(v) for record in members if (v := getattr(record, name)) is not None})
        return ", ".join(found) or "unknown"

    notes = [
        f"MACs: counted by {values('counter')} at 64x64 pixels.",
        "bpp: of the real bitstreams.",
        "PSNR: over RGB, rounded to 8 bits, mean over images; the drop is against the original.",
        f"Times: seconds per image on {values('device')}, {_threads(values('threads'))}.",
    ]
    # `nicprune time` measures speed-ups; times of a table are for orientation.
    if not all(record.quiet() for record in members):
        notes.append(
            "During some evaluations other programs used the processor, or may have: their times"
            " are rough, and no speed-up is computed from them."
        )
    if seeds := sorted({row.seeds for row in group if row.seeds > 1}):
        notes.append(
            f"Rows with +-: mean and sample standard deviation over {' or '.join(map(str, seeds))}"
            " seeds."
        )
    if any(row.reductions() for row in group):
        notes.append(
            "With gates: MACs are means over the images; in brackets, the range over the images."
        )
    if slimmable := dict.fromkeys(row.arm for row in group if row.members[0].width is not None):
        each = "each one codec" if len(slimmable) > 1 else "one codec"
        notes.append(
            f"Slimmable ({', '.join(slimmable)}): {each} of several widths, each with a lambda of"
            " its own."
        )
    if modulated := dict.fromkeys(
        row.arm for row in group if row.role == "modulated" and row.members[0].width is None
    ):
        each = "each one codec" if len(modulated) > 1 else "one codec"
        notes.append(
            f"Modulated ({', '.join(modulated)}): {each} for all rates, compared at each quality"
            " with the original trained for it."
        )
    notes += dict.fromkeys(
        f"No drop where {why_no_drop(row, group)}."
        for row in group
        if row.role != "original" and not math.isfinite(row.mean["psnr_drop_db"])
    )
    return " ".join(notes)


def _threads(count: str) -> str:
    return f"{count} thread{'s' * (count != '1')}"


def storage_note(group: Sequence[Row]) -> list[str]:
    """Return one paragraph on the files of codecs for all rates; none without such codecs."""
    said = [f"{s.arm}: {s.summary()}" for s in file_sizes(group) if s.role == "modulated"]
    return [f"Storage. {'. '.join(said)}."] if said else []
