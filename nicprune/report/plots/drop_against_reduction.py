"""PSNR drop against FLOP reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nicprune.report.aggregate import Line, settings
from nicprune.report.plots.plot import PLOTS, Plot
from nicprune.report.plots.style import (
    LIGHT,
    Theme,
    annotate,
    legend,
    look_of,
    new_figure,
    plain,
    pruned_arms,
    quality_of,
    themed,
    to_png,
)

ROOM = 14
"""Points in a panel that can all have the change of bpp beside them."""


def drop_against_reduction(lines: Sequence[Line], theme: Theme = LIGHT) -> bytes | None:
    """PSNR drop over FLOP reduction of each pruned codec and the controls, with the change of bpp
    beside each; one panel per codec and test folder.

    With gates, the bar through a point goes from the image with the smallest reduction to that with
    the largest.
    """
    shown = [
        line
        for line in lines
        if line.role != "original"
        and math.isfinite(line.mean["psnr_drop_db"])
        and math.isfinite(line.mean["flop_reduction"])
    ]
    if not any(
        line.role == "pruned" or (line.role == "modulated" and line.mean["flop_reduction"] > 1.005)
        for line in shown
    ):
        return None
    groups = settings(shown)
    with themed(theme):
        figure = new_figure(7.6, 0.6 + 3.9 * len(groups))
        rows = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
        handles: dict[tuple[str, str], Any] = {}
        pruned = pruned_arms(lines)
        later = []
        for (setting, group), axes in zip(groups.items(), rows, strict=True):
            points, obstacles = [], [(1.0, 0.0)]
            several = len({line.quality for line in group}) > 1
            curves: dict[tuple[str, str], list[Line]] = {}
            for line in group:
                curves.setdefault((line.role, line.arm), []).append(line)
            for (role, arm), members in reversed(curves.items()):
                look = look_of(members[0], pruned, theme) | {"linestyle": "none"}
                xy = [(line.mean["flop_reduction"], line.mean["psnr_drop_db"]) for line in members]
                spread = [line.spread.get("psnr_drop_db", 0.0) for line in members]
                if any(spread):
                    axes.errorbar(
                        *zip(*xy, strict=True),
                        yerr=spread,
                        fmt="none",
                        ecolor=look["color"],
                        elinewidth=0.9,
                        capsize=2.5,
                    )
                for line, (x, y) in zip(members, xy, strict=True):
                    if reach := line.reductions():
                        bar = [[max(x - reach[0], 0)], [max(reach[1] - x, 0)]]
                        axes.errorbar(
                            x,
                            y,
                            xerr=bar,
                            fmt="none",
                            ecolor=look["color"],
                            elinewidth=0.9,
                            capsize=2.5,
                        )
                        obstacles += [
                            (reach[0] + (reach[1] - reach[0]) * part / 12, y) for part in range(13)
                        ]
                (handle,) = axes.plot(*zip(*xy, strict=True), markersize=7, zorder=3, **look)
                handles.setdefault((role, arm), handle)
                obstacles += xy
                # All of them stand close to (1, 0): the table tells them apart.
                if role == "control":
                    continue
                for line, p in zip(members, xy, strict=True):
                    # Of about the same cost at every rate.
                    if (
                        role == "modulated"
                        and len(group) > ROOM
                        and line not in (members[0], members[-1])
                    ):
                        continue
                    change = line.mean["bpp_change_pct"]
                    rate = (
                        f"{change:+.1f} % bpp"
                        if len(group) <= ROOM and math.isfinite(change)
                        else ""
                    )
                    text = ", ".join(
                        filter(None, (quality_of(line) if several or rate else "", rate))
                    )
                    if text:
                        points.append((*p, text, look["color"]))
            axes.axhline(0, color=theme.muted, linewidth=0.9, zorder=1)
            (handles["original", "original"],) = axes.plot(
                [1], [0], "o", color=theme.ink, markersize=7, zorder=3
            )
            top = max(
                max(line.mean["flop_reduction"], *(line.reductions() or (1,))) for line in group
            )
            axes.set_xlim(1 - 0.12 * max(top - 1, 0.25), top + 0.35 * max(top - 1, 0.25))
            axes.margins(y=0.16)
            axes.set(
                xlabel="FLOP reduction (original MACs ÷ MACs, ×)",
                ylabel="PSNR drop (dB), lower is better",
            )
            axes.grid(color=theme.grid, linewidth=0.7)
            axes.set_axisbelow(True)
            if len(groups) > 1:
                axes.set_title(plain(str(setting)))
            later.append((axes, sorted(points, key=lambda p: -p[1]), obstacles))
        legend(figure, handles)
        for axes, points, obstacles in later:
            annotate(axes, points, obstacles, 0)
        return to_png(figure)


def _caption(lines: Sequence[Line]) -> str:
    told = (
        "What each codec loses for what it saves. The change of bpp stands beside each point where"
        " there is room: the same drop at fewer bits is a smaller loss."
    )
    if any(line.show_reductions() for line in lines):
        told += " With gates, the bar goes from the dearest image to the cheapest."
    return told


PLOTS.register("drop_vs_reduction")(
    Plot(
        file="drop_vs_reduction.png",
        draw=drop_against_reduction,
        alt="PSNR drop over FLOP reduction",
        caption=_caption,
        place=2,
    )
)
