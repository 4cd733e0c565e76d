"""The table: one row per record with every figure, and its compact forms for people (terminal,
Markdown, LaTeX).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from tabulate import tabulate

from nicprune.report.aggregate import COLUMNS, FIRST_LATER, Line, blank, compact, row
from nicprune.report.mac_spread import SPEEDS, columns, per_image, storage, timed
from nicprune.report.records import LATER, ROLES, as_records, number
from nicprune.report.scratch_gap import HEADERS as HEADERS_OF_GAPS
from nicprune.report.scratch_gap import NOTE, gaps

WIDTH = 120
MS_SSIM = 7
"""The column of the terminal's table that goes first where there is no room."""


def table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per record, sorted by codec, quality, role (original, control, pruned) and label;
    blank (NaN) where there is no original to compare to.

    kmac_per_pixel is 1,000 MACs per pixel; reductions and speed-ups are before / after;
    bpp_change_pct, psnr_drop_db and psnr_drop_pct are relative to the original of the same codec,
    quality and test images; times are seconds per image. One codec for all rates has a row for
    each, those between qualities last. level, kmac_per_pixel_min and _max (over the images, with
    gates) and file_bytes are columns only where a record has one of them; so are width, and the
    peak of memory.
    """
    ready = as_records(records)
    ordered = sorted(
        ready,
        key=lambda r: (
            r["codec"],
            r.between(),
            number(r["quality"]),
            ROLES.index(r["role"]),
            r["label"],
        ),
    )
    groups = (FIRST_LATER, ("width",), ("encode_peak_bytes", "decode_peak_bytes"), ("busy",))
    held = {key for record in ready for key in LATER if record[key] not in (None, {}, [])}
    later = [
        key
        for keys in groups
        if held & {*keys, *(("dynamic", "skipping") if keys is FIRST_LATER else ())}
        for key in keys
    ]
    frame = pd.DataFrame([row(record, ready) for record in ordered], columns=[*COLUMNS, *later])
    whole: list[str] = [
        key
        for key in ("file_bytes", "width", "encode_peak_bytes", "decode_peak_bytes")
        if key in later
    ]
    if all(isinstance(record["quality"], int | None) for record in ready):
        whole.append("quality")
    return (
        frame.astype(dict.fromkeys(whole, "Int64")) if later else frame
    )  # blanks among them would make 1.0 of 1


HEADERS = (
    "q",
    "codec",
    "kMAC/pixel",
    "FLOP reduction",
    "bpp",
    "PSNR dB",
    "PSNR drop dB (%)",
    "MS-SSIM",
    "encode s",
    "decode s",
)


def cells(line: Line, times: str = "×", plus_minus: str = "±", missing: str = "–") -> list[str]:
    """One line of the compact table."""

    def show(key: str, form: str) -> str:
        return line.show(key, form, plus_minus, missing)

    drop = missing
    if line.role != "original" and math.isfinite(line.mean["psnr_drop_db"]):
        drop = f"{show('psnr_drop_db', 'z.2f')} ({line.mean['psnr_drop_pct']:z.2f} %)"
    reduction = missing
    if line.role != "original" or line.mean["flop_reduction"] != 1:
        reduction = f"{line.mean['flop_reduction']:.2f}{times}{line.show_reductions(missing)}"
    return [
        missing if line.quality is None else str(line.quality),
        line.label,
        f"{line.mean['kmac_per_pixel']:.2f}",
        reduction,
        show("bpp", ".4f"),
        show("psnr_db", "z.2f"),
        drop,
        show("ms_ssim", ".4f").split(f" {plus_minus}")[0],
        show("encode_s", ".3f").split(f" {plus_minus}")[0],
        show("decode_s", ".3f").split(f" {plus_minus}")[0],
    ]


ALIGN = ("right", "left", *["right"] * 8)


def footnote(group: Sequence[Line]) -> str:
    """What the figures of a table mean and where they were measured, in one sentence each."""
    members = [record for line in group for record in line.members]

    def said(key: str) -> str:
        return (
            ", ".join(sorted({str(record[key]) for record in members if record[key] is not None}))
            or "unknown"
        )

    note = (
        f"MACs counted by {said('counter')} at 64x64. bpp of the real bitstreams. PSNR: RGB, 8-bit"
        " rounded, mean over images; drop relative to the original. Times: seconds per image,"
        f" {said('device')}, {said('threads')} thread(s)"
    )
    # Seconds stand there for orientation; `nicprune time` takes codecs in turns.
    note += (
        "."
        if all(record.quiet() for record in members)
        else "; other programs used the processor meanwhile, or may have: no speed-ups."
    )
    seeds = sorted({line.seeds for line in group if line.seeds > 1})
    if seeds:
        note += (
            f" Rows with +- are means over {' or '.join(map(str, seeds))} seeds with the sample"
            " standard deviation."
        )
    if any(line.reductions() for line in group):
        note += (
            " With gates: MACs are means over the images; in brackets the range over the images."
        )
    if slim := list(
        dict.fromkeys(line.arm for line in group if line.members[0]["width"] is not None)
    ):
        note += (
            f" Slimmable ({', '.join(slim)}): {'each one codec' if len(slim) > 1 else 'one codec'}"
            " of several widths, each with a lambda of its own."
        )
    if modulated := list(
        dict.fromkeys(
            line.arm
            for line in group
            if line.role == "modulated" and line.members[0]["width"] is None
        )
    ):
        each = "each one codec" if len(modulated) > 1 else "one codec"
        note += (
            f" Modulated ({', '.join(modulated)}): {each} for all rates, compared at each quality"
            " with the original trained for it."
        )
    for reason in dict.fromkeys(
        blank(line, group)
        for line in group
        if line.role != "original" and not math.isfinite(line.mean["psnr_drop_db"])
    ):
        note += f" No drop where {reason}."
    return note


def text_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A compact plain-text table for the terminal, at most 120 columns wide, one per codec and test
    folder; ASCII but for names.
    """
    headers = [
        "q",
        "codec",
        "kMAC\n/pixel",
        "FLOP\nreduction",
        "bpp",
        "PSNR\ndB",
        "PSNR drop\ndB (%)",
        "MS-SSIM",
        "encode\ns",
        "decode\ns",
    ]
    blocks = []
    for setting, group in compact(records).items():
        rows = [cells(line, "x", "+-", "-") for line in group]
        columns, widest = list(range(len(headers))), max(len(r[1]) for r in rows)
        while True:
            # Long labels are wrapped, not cut: what tells two arms apart may stand at their end.
            shown = [[r[0], "\n".join(textwrap.wrap(r[1], widest)), *r[2:]] for r in rows]
            text = tabulate(
                [[row[c] for c in columns] for row in shown], [headers[c] for c in columns],
                tablefmt="simple", disable_numparse=True, colalign=[ALIGN[c] for c in columns],
            )  # fmt: skip
            over = max(map(len, text.splitlines())) - WIDTH
            if over <= 0 or (widest <= 8 and MS_SSIM not in columns):
                break
            if MS_SSIM in columns:  # the files have it
                columns.remove(MS_SSIM)
            else:
                widest = max(8, widest - over)
        below = [footnote(group), *_storage(group)]
        blocks.append(
            "\n".join(
                [
                    textwrap.shorten(str(setting), WIDTH),
                    text,
                    *(textwrap.fill(said, WIDTH) for said in below),
                ]
            )
        )
    return "\n\n".join(blocks)


def _storage(group: Sequence[Line]) -> list[str]:
    """One paragraph on files, if there is something to say."""
    said = [
        f"{stored.arm}: {stored.swap()}" for stored in storage(group) if stored.role == "modulated"
    ]
    return [f"Storage. {'. '.join(said)}."] if said else []


def _formatted(
    records: Sequence[Mapping[str, Any]],
    fmt: str,
    escape: Callable[[str], str],
    title: str,
    note: str,
    times: str,
    plus_minus: str,
    extra: Callable[[Sequence[Line]], str] = lambda group: "",
) -> str:
    blocks = []
    for setting, group in compact(records).items():
        # Escape before the signs go in, which are markup in LaTeX.
        rows = [
            [
                escape(c).replace("\0", times).replace("\1", plus_minus)
                for c in cells(line, "\0", "\1", "–")
            ]
            for line in group
        ]
        body = tabulate(
            rows, [escape(h) for h in HEADERS], tablefmt=fmt, disable_numparse=True, colalign=ALIGN
        )
        below = [
            escape(said.replace("+-", "\1")).replace("\1", plus_minus)
            for said in (footnote(group), *_storage(group))
        ]
        blocks.append(
            title.format(escape(str(setting)))
            + body
            + "\n"
            + "".join(note.format(said) for said in below)
            + extra(group)
        )
    return "\n".join(blocks)


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The compact table as Markdown, with a table of the MACs per image below it where there are
    gates.
    """

    def escape(text: str) -> str:
        for sign in "\\`*_|<>[]":
            text = text.replace(sign, "\\" + sign)
        return text

    def images(group: Sequence[Line]) -> str:
        spreads = per_image(group)
        count = timed(spreads)
        rows = [
            [
                "–" if s.line.quality is None else str(s.line.quality),
                escape(s.line.arm),
                *map(escape, s.cells(count > 0)),
            ]
            for s in spreads
        ]
        align = ("right", "left", "left", *["right"] * (len(columns(count > 0)) - 1))
        body = tabulate(
            rows,
            ["q", "codec", *columns(count > 0)],
            tablefmt="pipe",
            disable_numparse=True,
            colalign=align if rows else None,
        )
        below = f"\n{SPEEDS.format(count)}\n" if count else ""
        tested = len(group[0].setting.images)
        return (
            f"\n**Per image** (kMAC/pixel with gates, over {tested}"
            f" image{'s' * (tested != 1)})\n\n{body}\n{below}"
            if rows
            else ""
        )

    def scratch(group: Sequence[Line]) -> str:
        rows = [[escape(cell) for cell in gap.cells()] for gap in gaps(group)]
        align = ["left" if i in (1, 3) else "right" for i in range(len(HEADERS_OF_GAPS))]
        body = tabulate(
            rows,
            HEADERS_OF_GAPS,
            tablefmt="pipe",
            disable_numparse=True,
            colalign=align if rows else None,
        )
        return f"\n**Against training from scratch**\n\n{body}\n\n{escape(NOTE)}\n" if rows else ""

    return _formatted(
        records,
        "pipe",
        escape,
        "**{}**\n\n",
        "\n{}\n",
        "×",
        "±",
        lambda group: images(group) + scratch(group),
    )


LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
}


def latex(records: Sequence[Mapping[str, Any]]) -> str:
    """The compact table as LaTeX tabulars that need no package."""

    def escape(text: str) -> str:
        return "".join(LATEX.get(sign, sign) for sign in text)

    return _formatted(
        records,
        "latex_raw",
        escape,
        "% {}\n",
        "\n\\par\\smallskip\\noindent{{\\footnotesize {}}}\n",
        r"$\times$",
        r"$\pm$",
    )
