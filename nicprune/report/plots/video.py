"""Plots of codecs on clips: rate and distortion, and what each width costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes

from nicprune.report.column import Column
from nicprune.report.plots.figure import draw_grid, new_figure, plain, to_png
from nicprune.report.plots.look import DASHES, MARKERS
from nicprune.report.plots.theme import LIGHT, Theme, themed
from nicprune.report.video_record import VideoRecord

Arm = tuple[str, str]
"""Role and label of a curve."""


def arms_of(records: Sequence[VideoRecord]) -> dict[Arm, list[VideoRecord]]:
    """Return the records of each curve; where a codec was measured with groups of several lengths,
    each is a curve of its own.
    """
    lengths: dict[Arm, set[int]] = {}
    for record in records:
        lengths.setdefault((record.role, record.label), set()).add(record.gop)
    found: dict[Arm, list[VideoRecord]] = {}
    for record in records:
        several = len(lengths[record.role, record.label]) > 1 and record.role != "intra"
        label = f"{record.label}, groups of {record.gop}" if several else record.label
        found.setdefault((record.role, label), []).append(record)
    return found


def name_of(arm: Arm) -> str:
    """Return the name of a curve."""
    role, label = arm
    return f"{label}, I frames alone" if role == "intra" else label


def video_rd(records: Sequence[VideoRecord], theme: Theme = LIGHT) -> bytes | None:
    """Draw PSNR over RGB, YUV 6:1:1 and, where every codec has it, MS-SSIM over bpp."""
    finite = [r for r in records if math.isfinite(r.psnr_db) and math.isfinite(r.psnr_yuv_db)]
    if not finite:
        return None
    panels: list[tuple[str, str, Callable[[float], float]]] = [
        (name, Column.of(VideoRecord, name).axis, float) for name in ("psnr_db", "psnr_yuv_db")
    ]
    if all(r.ms_ssim is not None and r.ms_ssim < 1 for r in finite):
        panels.append(("ms_ssim", "−10·log₁₀(1 − MS-SSIM) (dB)", lambda v: -10 * math.log10(1 - v)))
    with themed(theme):
        figure = new_figure(4.6 * len(panels), 4.4)
        handles = {}
        for axes, (name, axis, scale) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for number, (arm, members) in enumerate(arms_of(finite).items()):
                points = sorted((r.bpp, scale(getattr(r, name))) for r in members)
                look = _look(arm, number, theme)
                (handles[name_of(arm)],) = axes.plot(
                    *zip(*points, strict=True), linewidth=1.5, markersize=5, **look
                )
            axes.set(xlabel=Column.of(VideoRecord, "bpp").axis, ylabel=axis)
            draw_grid(axes, theme)
        _legend(figure, handles)
        return to_png(figure)


COSTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("rate (bpp)", (("bpp_intra", "I frames"), ("bpp_predicted", "P frames"))),
    (
        "MACs (kMAC/pixel)",
        (
            ("intra_encode_kmac", "I, encoding"),
            ("intra_decode_kmac", "I, decoding"),
            ("predicted_encode_kmac", "P, encoding"),
            ("predicted_decode_kmac", "P, decoding"),
        ),
    ),
    ("peak memory (MB)", (("encode_peak_mb", "encoding"), ("decode_peak_mb", "decoding"))),
    ("time a frame (ms)", (("encode_ms", "encoding"), ("decode_ms", "decoding"))),
)
"""Panels over widths: label of the axis, and the fields that it shows with their names."""


def video_widths(records: Sequence[VideoRecord], theme: Theme = LIGHT) -> bytes | None:
    """Draw rate, MACs, memory and time a frame over the widths of each slimmable codec."""
    slim = [r for r in records if r.role == "codec" and r.width is not None]
    arms = [sorted(m, key=lambda r: r.width or 0) for m in arms_of(slim).values() if len(m) > 1]
    if not arms:
        return None
    with themed(theme):
        figure = new_figure(3.0 * len(COSTS), 0.6 + 3.0 * len(arms))
        grid = figure.subplots(len(arms), len(COSTS), squeeze=False)
        for members, row in zip(arms, grid, strict=True):
            for axes, (label, fields) in zip(row, COSTS, strict=True):
                _draw_costs(axes, members, fields, theme)
                axes.set(xlabel="width (0 is the widest)", ylabel=label)
            row[0].set_title(plain(members[0].label))
        return to_png(figure)


def _draw_costs(
    axes: Axes,
    members: Sequence[VideoRecord],
    fields: Sequence[tuple[str, str]],
    theme: Theme,
) -> None:
    for number, (field, name) in enumerate(fields):
        points = [(r.width, v) for r in members if (v := getattr(r, field)) is not None]
        if points:
            look: dict[str, Any] = {"color": theme.hues[number], "marker": MARKERS[number]}
            axes.plot(*zip(*points, strict=True), linewidth=1.5, markersize=5, label=name, **look)
    axes.set_xticks([r.width or 0 for r in members])
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    draw_grid(axes, theme)
    axes.legend(loc="best", fontsize=8)


def _look(arm: Arm, number: int, theme: Theme) -> dict[str, Any]:
    """Return colour, marker and dash of a curve: the control is grey, classical codecs dashed."""
    if arm[0] == "intra":
        return {"color": theme.muted, "marker": "s", "linestyle": ":"}
    return {
        "color": theme.hues[number % len(theme.hues)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[1] if arm[0] == "classical" else DASHES[0],
    }


def _legend(figure: Any, handles: dict[str, Any]) -> None:
    figure.legend(
        list(handles.values()),
        [plain(name) for name in handles],
        loc="outside lower center",
        ncols=min(4, len(handles)),
        handlelength=3.2,
    )
