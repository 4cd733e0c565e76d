"""Rate-distortion curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def rd_curves(lines: Sequence[Line], theme: Theme = LIGHT) -> bytes | None:
    """PSNR, and MS-SSIM where every codec has it, over bpp; one row of panels per codec and test
    folder.
    """
    groups = settings(
        [
            line
            for line in lines
            if math.isfinite(line.mean["psnr_db"]) and math.isfinite(line.mean["bpp"])
        ]
    )
    if not groups:
        return None
    structural = all(0 < line.mean["ms_ssim"] < 1 for group in groups.values() for line in group)
    panels: list[tuple[str, str, Callable[[float], float]]] = [
        ("psnr_db", "PSNR, RGB (dB)", lambda v: v)
    ]
    if structural:
        panels.append(
            ("ms_ssim", "MS-SSIM, −10·log₁₀(1 − MS-SSIM) (dB)", lambda v: -10 * math.log10(1 - v))
        )
    with themed(theme):
        figure = new_figure(5.2 * len(panels) if structural else 7.0, 0.6 + 3.9 * len(groups))
        rows = figure.subplots(len(groups), len(panels), squeeze=False)
        handles: dict[tuple[str, str], Any] = {}
        pruned = pruned_arms(lines)
        later = []
        for (setting, group), row in zip(groups.items(), rows, strict=True):
            for axes, (key, label, scale) in zip(row, panels, strict=True):
                points, obstacles = [], []
                curves: dict[tuple[str, str], list[Line]] = {}
                for line in group:
                    curves.setdefault((line.role, line.arm), []).append(line)
                for (role, arm), members in reversed(curves.items()):  # the original lies on top
                    one = (
                        role == "modulated"
                    )  # one codec: its rates, those between qualities too, are points of one curve
                    members = sorted(members, key=lambda line: line.mean["bpp"]) if one else members
                    xy = [(line.mean["bpp"], scale(line.mean[key])) for line in members]
                    look = look_of(members[0], pruned, theme)
                    spread = [line.spread.get(key, 0.0) for line in members]
                    if key == "psnr_db" and any(spread):
                        axes.errorbar(
                            *zip(*xy, strict=True),
                            yerr=spread,
                            fmt="none",
                            ecolor=look["color"],
                            elinewidth=0.9,
                            capsize=2.5,
                        )
                    (handle,) = axes.plot(
                        *zip(*xy, strict=True), linewidth=1.5, markersize=3.5 if one else 6, **look
                    )
                    handles.setdefault((role, arm), handle)
                    obstacles += xy
                    if role == "original" or "original" not in {r for r, _ in curves}:
                        points += [
                            (*p, quality_of(line), theme.muted)
                            for p, line in zip(xy, members, strict=True)
                            if quality_of(line)
                        ]
                axes.set(xlabel="rate (bpp)", ylabel=label)
                axes.margins(0.09, 0.12)
                axes.grid(color=theme.grid, linewidth=0.7)
                axes.set_axisbelow(True)
                if len(groups) > 1 and axes is row[0]:
                    axes.set_title(plain(str(setting)))
                later.append((axes, points, obstacles))
        legend(figure, handles)
        for axes, points, obstacles in later:
            annotate(axes, points, obstacles, 110)
        return to_png(figure)


PLOTS.register("rd")(
    Plot(
        file="rd.png",
        draw=rd_curves,
        alt="Rate-distortion curves of the original, control and pruned codecs",
        caption=lambda lines: (
            "Rate and distortion, mean over images; q marks the original's quality levels. Up and"
            " to the left is better."
        ),
        place=1,
    )
)
