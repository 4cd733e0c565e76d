"""Plots: rate-distortion curves, PSNR drop against FLOP reduction, and widths before and after."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from nicprune.report.aggregate import Line, settings
from nicprune.report.records import ROLES

DPI = 150
MARKERS = "^DvPX*<>hpd"
"""Of what was made, those of original and control apart: as many as have no divisor in common with
the number of hues.
"""
ROWS = 2
"""Rows of a legend that a figure has room for as it is."""
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
MAX_PANELS = 4
ROOM = 14
"""Points in a panel that can all have the change of bpp beside them."""
TURNS = ((0, 30, -30), (60, -60, 90, -90), (135, -135, 180))
"""Directions around a point in which a text is tried, in degrees from the preferred one."""
REACHES = (7, 11, 16, 24, 34)
"""Distances of a text from its point, in typographic points."""


@dataclass(frozen=True)
class Theme:
    """Colours of a plot; hues are Okabe and Ito's, which colour-blind readers can tell apart."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    hues: tuple[str, ...]


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1d2329",
    "#6b7480",
    "#e3e6ea",
    ("#0072b2", "#d55e00", "#009e73", "#a8488a", "#b07400", "#3d8fc4"),
)
DARK = Theme(
    "dark",
    "#171b20",
    "#e4e7eb",
    "#98a2ae",
    "#323942",
    ("#56b4e9", "#f0883e", "#2dbf95", "#d98fbf", "#e6b422", "#9fc9f0"),
)


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Draw in a theme's colours."""
    rc: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.usetex": False,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.muted,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.grid": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "regular",
        "legend.frameon": False,
        "legend.fontsize": 9.5,
    }
    with matplotlib.rc_context(rc), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # a label in a script the font lacks still makes a plot
        yield


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    figure = Figure(
        figsize=(width, height),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.04, hspace=0.06),
    )
    FigureCanvasAgg(figure)
    return figure


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # not mathematics


def _look(line: Line, pruned: Sequence[tuple[str, str]], theme: Theme) -> dict[str, Any]:
    """Colour, marker and dash of an arm: no two arms differ by colour alone."""
    if line.role == "original":
        return {"color": theme.ink, "marker": "o", "linestyle": "-", "markerfacecolor": theme.ink}
    if line.role == "control":
        return {
            "color": theme.muted,
            "marker": "s",
            "linestyle": ":",
            "markerfacecolor": theme.background,
        }
    n = pruned.index((line.role, line.arm))
    return {
        "color": theme.hues[n % len(theme.hues)],
        "marker": MARKERS[n % len(MARKERS)],
        "linestyle": DASHES[n % len(DASHES)],
    }


def _pruned_arms(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """Role and arm of what was made, the pruned ones first."""
    return [
        key
        for role in ("pruned", "modulated")
        for key in dict.fromkeys((line.role, line.arm) for line in lines if line.role == role)
    ]


def _quality(line: Line) -> str:
    return "" if line.quality is None else f"q{line.quality}"


def _annotate(
    axes: Axes,
    points: Sequence[tuple[float, float, str, str]],
    obstacles: Sequence[tuple[float, float]],
    first: float,
) -> None:
    """Write a text beside each point (x, y, text, colour), at the first of the places around it
    that covers neither marker nor text.

    Args:
        obstacles: every marker drawn, in data coordinates.
        first: the direction tried first, in degrees.
    """
    figure = axes.figure
    figure.canvas.draw()  # positions are known once the layout is
    to_pixels = axes.transData.transform
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in (to_pixels(p) for p in obstacles)]
    scale = figure.dpi / 72
    for x, y, text, colour in points:
        px, py = to_pixels((x, y))
        width, height = 5.2 * scale * len(text), 10 * scale
        best: tuple[float, Any] = (math.inf, None)
        for reach, turn in ((reach, turn) for near in TURNS for reach in REACHES for turn in near):
            angle = math.radians(first + turn)
            bx, by = (
                px + math.cos(angle) * (reach * scale + width / 2),
                py + math.sin(angle) * (reach * scale + height / 2),
            )
            box = (bx - width / 2, by - height / 2, bx + width / 2, by + height / 2)
            frame = axes.bbox
            outside = (
                box[2] > frame.x1 or box[0] < frame.x0 or box[3] > frame.y1 or box[1] < frame.y0
            )
            cost = sum(_common(box, other) for other in taken) + 1e6 * outside
            if cost < best[0]:
                best = (cost, (bx, by, box, reach))
            if cost == 0:
                break
        bx, by, box, reach = best[1]
        taken.append(box)
        arrow = (
            {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            if reach > 11
            else None
        )
        note = axes.annotate(
            _plain(text),
            (x, y),
            ((bx - px) / scale, (by - py) / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            color=colour,
            arrowprops=arrow,
        )
        note.set_in_layout(False)


def _common(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


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
        pruned = _pruned_arms(lines)
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
                    look = _look(members[0], pruned, theme)
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
                            (*p, _quality(line), theme.muted)
                            for p, line in zip(xy, members, strict=True)
                            if _quality(line)
                        ]
                axes.set(xlabel="rate (bpp)", ylabel=label)
                axes.margins(0.09, 0.12)
                axes.grid(color=theme.grid, linewidth=0.7)
                axes.set_axisbelow(True)
                if len(groups) > 1 and axes is row[0]:
                    axes.set_title(_plain(str(setting)))
                later.append((axes, points, obstacles))
        _legend(figure, handles)
        for axes, points, obstacles in later:
            _annotate(axes, points, obstacles, 110)
        return to_png(figure)


def _legend(figure: Figure, handles: dict[tuple[str, str], Any]) -> None:
    """A legend below the panels, never over data; the original first, then the control."""
    keys = sorted(handles, key=lambda key: (ROLES.index(key[0]), key[1]))
    columns = max(
        1,
        min(
            len(keys),
            int(figure.get_figwidth() / (0.75 + 0.085 * max(len(arm) for _, arm in keys))),
        ),
    )
    more = max(0, math.ceil(len(keys) / columns) - ROWS)
    figure.set_figheight(
        figure.get_figheight() + 0.21 * more
    )  # at the expense of the page, not of the panels
    figure.legend(
        [handles[key] for key in keys],
        [_plain(arm) for _, arm in keys],
        loc="outside lower center",
        ncols=columns,
        handlelength=3.2,
    )


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
        pruned = _pruned_arms(lines)
        later = []
        for (setting, group), axes in zip(groups.items(), rows, strict=True):
            points, obstacles = [], [(1.0, 0.0)]
            several = len({line.quality for line in group}) > 1
            curves: dict[tuple[str, str], list[Line]] = {}
            for line in group:
                curves.setdefault((line.role, line.arm), []).append(line)
            for (role, arm), members in reversed(curves.items()):
                look = _look(members[0], pruned, theme) | {"linestyle": "none"}
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
                        filter(None, (_quality(line) if several or rate else "", rate))
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
                axes.set_title(_plain(str(setting)))
            later.append((axes, sorted(points, key=lambda p: -p[1]), obstacles))
        _legend(figure, handles)
        for axes, points, obstacles in later:
            _annotate(axes, points, obstacles, 0)
        return to_png(figure)


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
        pruned = _pruned_arms(lines)
        places = list(range(len(groups)))
        for line, axes in zip(shown, panels, strict=True):
            found = whole(line) | line.members[0]["widths"]
            pairs = [found.get(name, (0, 0)) for name in groups]
            colour = _look(line, pruned, theme)["color"]
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
            name = " ".join((line.arm, _quality(line))) if line.role == "pruned" else line.arm
            axes.set_title(
                _plain("\n".join(filter(None, (line.setting.codec if several else "", name))))
            )
            axes.tick_params(axis="y", length=0, labelsize=6 if small else 9)
            axes.spines["left"].set_visible(False)
        figure.supxlabel(
            "channels per group (wide bar: before, narrow bar: after)", fontsize=10, color=theme.ink
        )
        panels[0].set_yticks(places, [_plain(name) for name in groups])
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


def lambda_schedule(lines: Sequence[Line], theme: Theme = LIGHT) -> bytes | None:
    """How the lambdas of slimmable codecs' widths were lowered over the steps, and the curve
    through the widths at each validation.
    """
    shown = [line for line in lines if line.members[0]["schedule"]][:MAX_PANELS]
    if not shown:
        return None
    with themed(theme):
        figure = new_figure(10.4, 0.6 + 3.6 * len(shown))
        for line, (left, right) in zip(
            shown, figure.subplots(len(shown), 2, squeeze=False), strict=True
        ):
            log = line.members[0]["schedule"]
            count = len(log[0]["lambdas"])
            for width in range(count):
                colour = theme.hues[width % len(theme.hues)]
                lambdas = [row["lambdas"][width] for row in log]
                left.step(
                    [row["step"] for row in log],
                    lambdas,
                    where="post",
                    color=colour,
                    linestyle=DASHES[width % len(DASHES)],
                    label=f"width {width}",
                )
                right.plot(
                    [row["bpp"][width] for row in log],
                    [row["psnr_db"][width] for row in log],
                    color=colour,
                    marker=MARKERS[width % len(MARKERS)],
                    markersize=3,
                    linewidth=0.8,
                    linestyle=":",
                )
            for row, style in ((log[0], "--"), (log[-1], "-")):
                right.plot(
                    row["bpp"],
                    row["psnr_db"],
                    color=theme.ink,
                    linewidth=1.2,
                    linestyle=style,
                    label="first" if row is log[0] else "last",
                    zorder=1,
                )
            left.set(xlabel="step", ylabel="λ", yscale="log")
            right.set(
                xlabel="estimated rate on validation photographs (bpp)", ylabel="PSNR, RGB (dB)"
            )
            for axes in (left, right):
                axes.grid(color=theme.grid, linewidth=0.7)
                axes.set_axisbelow(True)
                axes.legend()
            if len(shown) > 1:
                left.set_title(_plain(line.arm))
        return to_png(figure)
