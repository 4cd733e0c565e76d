"""Report of codecs on clips: records, tables, BD-rates, plots and a page.

The figures are those of `evaluation.video`. A record holds one codec at one setting: a width, or a
constant rate factor of x264 or x265.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from nicprune.common.errors import FileError
from nicprune.common.files import write_atomically, write_text
from nicprune.common.machine import BUSY, machine_line, versions
from nicprune.evaluation.video import COUNTER, VideoEvaluation
from nicprune.report.bd_rate import MIN_POINTS, bjontegaard
from nicprune.report.column import Column
from nicprune.report.csv import csv
from nicprune.report.markdown import escape
from nicprune.report.page import css_width, data_uri
from nicprune.report.plots.theme import DARK
from nicprune.report.plots.video import arms_of, name_of, video_rd, video_widths
from nicprune.report.templates import template
from nicprune.report.video_record import ClipResult, Role, VideoRecord

TABLE = {
    "label": "", "setting": "", "bpp": ".4f", "kbits": ".1f", "psnr_db": ".2f",
    "psnr_yuv_db": ".2f", "ms_ssim": ".4f", "bpp_intra": ".4f", "bpp_predicted": ".4f",
    "intra_encode_kmac": ".2f", "intra_decode_kmac": ".2f", "predicted_encode_kmac": ".2f",
    "predicted_decode_kmac": ".2f", "encode_peak_mb": ".1f", "decode_peak_mb": ".1f",
    "encode_ms": ".1f", "decode_ms": ".1f",
}  # fmt: skip
"""Columns of the table for people, with their formats."""

MEANS = ("bpp", "bpp_intra", "bpp_predicted", "kbits", "psnr_db", "psnr_yuv_db", "ms_ssim")
"""Fields that are means over the clips."""

PLOTS = (
    (
        "rd.png",
        video_rd,
        "Rate and distortion",
        "Rate and distortion, mean over frames, then over clips. Up and to the left is better.",
    ),
    (
        "widths.png",
        video_widths,
        "Widths",
        "What each width of a slimmable codec needs: rate, MACs, peak memory and time a frame.",
    ),
)
"""File, function, heading and caption of each plot."""


def video_record(
    evaluation: VideoEvaluation,
    role: Role,
    label: str,
    command: str | None = None,
) -> VideoRecord:
    """Return the record of an evaluation.

    Args:
        evaluation: from `evaluate_video` or `evaluate_classical_video`.
        role: "codec", "intra" for the control with I frames alone, or "classical".
        label: name of the codec in tables.
        command: what made it.
    """
    costs = [cost for cost in (evaluation.intra, evaluation.predicted) if cost is not None]
    means = {name: evaluation.mean(name) for name in MEANS}
    macs = {
        f"{kind}_{side}_kmac": getattr(cost, f"{side}_kmac", None)
        for kind, cost in (("intra", evaluation.intra), ("predicted", evaluation.predicted))
        for side in ("encode", "decode")
    }
    peaks = {
        f"{side}_peak_mb": max(each) / 1e6
        for side in ("encode", "decode")
        if (each := [b for c in costs if (b := getattr(c, f"{side}_peak_bytes")) is not None])
    }
    content: dict[str, Any] = means | macs | peaks
    return VideoRecord(
        role=role,
        label=label,
        setting=evaluation.setting,
        width=evaluation.width,
        quality=evaluation.quality,
        gop=evaluation.gop,
        encode_ms=1000 * (evaluation.mean("encode_s") or 0.0),
        decode_ms=1000 * (evaluation.mean("decode_s") or 0.0),
        clips=[ClipResult(**asdict(clip)) for clip in evaluation.clips],
        counter=COUNTER if costs else None,
        device=evaluation.device,
        threads=evaluation.threads,
        busy=evaluation.busy,
        machine=machine_line(),
        versions=versions(),
        command=command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **content,
    )


def video_table(records: Sequence[VideoRecord]) -> str:
    """Return the table of records as Markdown, and the conditions below it."""
    names = _columns(records)
    rows = [[escape(_cell(record, name)) for name in names] for record in records]
    headers = [Column.of(VideoRecord, name).header for name in names]
    align = ["left", "left", *["right"] * (len(names) - 2)]
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align)
    return "\n".join([table, "", *(f"{escape(note)}\n" for note in notes(records))])


def notes(records: Sequence[VideoRecord]) -> list[str]:
    """Return sentences on clips, definitions and the machine."""
    clips = dict.fromkeys(
        f"{c.name} ({c.width}x{c.height}, {c.frames} frames)" for r in records for c in r.clips
    )
    groups = _each(r.gop for r in records if r.role != "intra")
    found = [
        f"Clips: {', '.join(clips)}. Groups of {groups} frames; low delay, no B frames.",
        "Rate: strings of the codec, without headers and checksums of the file; of x264 and x265,"
        " the elementary stream. PSNR and rate: mean over frames, then over clips. YUV 6:1:1:"
        " (6 Y + U + V) / 8 in 4:2:0, converted from RGB.",
    ]
    if counters := [r.counter for r in records if r.counter]:
        found.append(
            f"MACs of all that runs, counted by {counters[0]}; memory: tensors alive, weights not"
            f" counted, at {records[0].clips[0].width}x{records[0].clips[0].height} pixels."
        )
    busy = [r.busy for r in records if r.busy is not None]
    loud = busy and max(busy) > BUSY
    threads, machine = (_each(getattr(r, what) for r in records) for what in ("threads", "machine"))
    rough = " Other programs kept the processor busy: times are rough." if loud else ""
    found.append(f"{threads} thread(s), {machine}.{rough}")
    return found


def bd_rates(records: Sequence[VideoRecord]) -> pd.DataFrame:
    """Return BD-rates (RGB) of every curve against the others that are anchors: the control with I
    frames alone, x264 and x265. Curves of fewer than three points are left out.
    """
    arms = {
        arm: [(r.bpp, r.psnr_db) for r in members]
        for arm, members in arms_of(records).items()
        if len(members) >= MIN_POINTS
    }
    gops = {arm: {r.gop for r in members} for arm, members in arms_of(records).items()}
    rows = []
    for arm, anchor in itertools.product(arms, arms):
        if arm[0] != "codec" or anchor[0] == "codec":
            continue
        if anchor[0] == "intra" and anchor[1] != arm[1]:
            continue
        row = bjontegaard(arms[anchor], arms[arm])
        if anchor[0] == "classical" and gops[arm] != gops[anchor]:
            own, its = (_each(sorted(gops[one])) for one in (arm, anchor))
            unequal = f"groups of {own} frames against {its}"
            row["caution"] = "; ".join(filter(None, (row["caution"], unequal)))
        rows.append({"codec": name_of(arm), "against": name_of(anchor)} | row)
    columns = ["codec", "against", "points", "bd_rate_pct", "bd_psnr_db", "overlap_pct", "caution"]
    return pd.DataFrame(rows, columns=columns)


def write_video_report(
    records: Sequence[VideoRecord], folder: str | Path, title: str | None = None
) -> Path:
    """Write records.json, table.csv, table.md, bd.csv, plots, and index.html, which needs none of
    the others; return its path.

    Raises:
        FileError: there are no records, or the folder cannot be written to.
    """
    folder = Path(folder)
    if not records:
        raise FileError("no records to report on; `nicprune eval-video --report` writes them")
    if len(sets := list(dict.fromkeys(record.tested_on() for record in records))) > 1:
        one, other = (set(found) for found in sets[:2])
        told = sorted(one ^ other)[0]
        raise FileError(
            f"codecs of one report are measured on the same clips: {told} is not among those of"
            " all; write a report for each set"
        )
    content = [record.model_dump(exclude_none=True) for record in records]
    flat = [{k: v for k, v in one.items() if not isinstance(v, (list, dict))} for one in content]
    bd = bd_rates(records)
    write_text(folder / "records.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "table.csv", csv(pd.DataFrame(flat)))
    write_text(folder / "table.md", video_table(records))
    write_text(folder / "bd.csv", csv(bd))
    pictures = []
    for file, draw, heading, caption in PLOTS:
        light, dark = draw(records), draw(records, DARK)
        if light is None or dark is None:
            with contextlib.suppress(OSError):
                (folder / file).unlink(missing_ok=True)
            continue
        _write_bytes(folder / file, light)
        pictures.append(
            {
                "heading": heading,
                "caption": caption,
                "light": data_uri(light),
                "dark": data_uri(dark),
                "width": css_width(light),
            }
        )
    names = _columns(records)
    page = template("video.html.j2").render(
        title=title or f"Video: {', '.join(dict.fromkeys(r.label for r in records))}",
        columns=[Column.of(VideoRecord, name) for name in names],
        rows=[(record, [_cell(record, name) for name in names]) for record in records],
        notes=notes(records),
        bd=bd.astype(object).where(bd.notna(), None).to_dict("records"),
        plots=pictures,
        commands=list(dict.fromkeys(r.command for r in records if r.command)),
        versions=records[0].versions,
    )
    return write_text(folder / "index.html", page)


def _columns(records: Sequence[VideoRecord]) -> list[str]:
    """Return the columns in which some record has a value."""
    fixed = ("label", "setting")
    return [n for n in TABLE if n in fixed or any(getattr(r, n) is not None for r in records)]


def _cell(record: VideoRecord, name: str) -> str:
    value = getattr(record, name)
    if name == "label":
        return name_of((record.role, record.label))
    if value is None or value == "":
        return "–"
    return format(value, TABLE[name])


def _each(values: Any) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def _write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
