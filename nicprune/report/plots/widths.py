"""Channels per group before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from nicprune.report.aggregate import Line
from nicprune.report.plots.plot import PLOTS, Plot
from nicprune.report.plots.style import (
    LIGHT,
    MAX_PANELS,
    Theme,
    look_of,
    new_figure,
    plain,
    pruned_arms,
    quality_of,
    themed,
    to_png,
)


def widths(lines: Sequence[Line], theme: Theme = LIGHT) -> bytes | None:
    """Channels per group before and after, as bars; a panel per arm and quality, or per arm at its
    highest quality where these are too many.
    """
    shown = width_lines(lines)
    if not shown:
        return None
    groups: list[str] = []
    for line in shown:
        at = 0 if any(name in groups for name in line.members[0]["widths"]) else len(groups)
        # What one arm leaves alone has its place among the others all the same.
        for name in line.members[0]["widths"]:
            if name not in groups:
                groups.insert(at, name)
            at = groups.index(name) + 1
    several = len({line.setting for line in shown}) > 1
    small = len(groups) > 40

    def whole(line: Line) -> dict[str, tuple[float, float]]:
        """Groups that other arms on the same architecture name: one that `line` does not name was
        left as it is.
        """
        alike = [
            o
            for o in shown
            if o.setting == line.setting
            and o.members[0]["original_cost"] == line.members[0]["original_cost"]
        ]
        return {
            name: (before, before)
            for other in alike
            for name, (before, _) in other.members[0]["widths"].items()
        }

    with themed(theme):
        figure = new_figure(
            1.6 + 2.9 * len(shown) if len(shown) > 1 else 6.0,
            1.0 + (0.17 if small else 0.27) * len(groups),
        )
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        pruned = pruned_arms(lines)
        places = list(range(len(groups)))
        for line, axes in zip(shown, panels, strict=True):
            found = whole(line) | line.members[0]["widths"]
            pairs = [found.get(name, (0, 0)) for name in groups]
            colour = look_of(line, pruned, theme)["color"]
            axes.barh(places, [b for b, _ in pairs], height=0.78, color=theme.grid)
            axes.barh(places, [a for _, a in pairs], height=0.44, color=colour)
            most = max(b for b, _ in pairs)
            for place, (b, a) in zip(places, pairs, strict=True):
                if b:
                    axes.text(
                        b + 0.02 * most,
                        place,
                        f"{a:g} of {b:g}",
                        va="center",
                        fontsize=6 if small else 8,
                        color=theme.muted if a == b else theme.ink,
                    )
            axes.set_xlim(0, 1.32 * most)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            name = " ".join((line.arm, quality_of(line))) if line.role == "pruned" else line.arm
            axes.set_title(
                plain("\n".join(filter(None, (line.setting.codec if several else "", name))))
            )
            axes.tick_params(axis="y", length=0, labelsize=6 if small else 9)
            axes.spines["left"].set_visible(False)
        figure.supxlabel(
            "channels per group (wide bar: before, narrow bar: after)", fontsize=10, color=theme.ink
        )
        panels[0].set_yticks(places, [plain(name) for name in groups])
        panels[0].set_ylim(len(groups) - 0.4, -0.6)
        return to_png(figure)


def width_lines(lines: Sequence[Line]) -> list[Line]:
    """The pruned codecs whose widths are drawn; one codec for all rates has the same widths at each
    of them and is drawn once.
    """
    having = [line for line in lines if line.role == "pruned" and line.members[0]["widths"]]
    having += {
        (line.setting, line.arm): line
        for line in lines
        if line.role == "modulated" and line.members[0]["widths"] and not line.between()
    }.values()
    if len(having) <= MAX_PANELS:
        return having
    highest: dict[Any, Line] = {}
    for line in having:  # lines come in order of quality
        highest[(line.setting, line.arm)] = line
    return list(highest.values())[:MAX_PANELS]


def _caption(lines: Sequence[Line]) -> str:
    # One codec for all rates has the same widths at each.
    made = {
        (line.setting, line.role, line.arm, line.quality if line.role == "pruned" else None)
        for line in lines
        if line.role == "pruned" or (line.role == "modulated" and line.members[0]["widths"])
    }
    shown, all_ = len(width_lines(lines)), len(made)
    told = "Channels of each group before and after."
    if shown < all_:
        told += f" Shown: {shown} of {all_} pruned codecs, each arm at its highest quality."
    return told


PLOTS.register("widths")(
    Plot(
        file="widths.png",
        draw=widths,
        heading="Widths",
        alt="Channels per group before and after",
        caption=_caption,
        place=4,
    )
)
