"""A report of `nicprune time`: its table, its figures for others to read, and a plot of where the
time goes.

    write_times(
        times, "reports/times", conditions="Seconds for photo.png ...",
        command="nicprune time a.safetensors b.safetensors --out reports/times",
    )
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from nicprune.common.errors import FileError
from nicprune.common.files import write_atomically, write_text
from nicprune.evaluation.transform_times import REST, Times, times_table
from nicprune.pruning.cost import Totals
from nicprune.report.plots.style import LIGHT, new_figure, themed, to_png

FILE = "times.json"
SIDES = ("encode", "decode")
HATCHES = ("", "///", "...")
FOLLOWING = "if it followed the MACs"


def write_times(times: list[Times], folder: str | Path, *, conditions: str, command: str) -> Path:
    """Write times.md, times.json and times.png into a folder; return the folder.

    Args:
        times: the first is what the others are compared with.
        conditions: what was timed, how and on what machine.
        command: what makes these files again.

    Raises:
        FileError: the folder cannot be written to.
    """
    folder = Path(folder)
    write_text(
        folder / FILE,
        json.dumps(
            {"command": command, "conditions": conditions, "times": [asdict(one) for one in times]},
            indent=1,
        )
        + "\n",
    )
    write_text(folder / "times.md", f"{times_table(times, conditions)}\n\nMade by `{command}`.\n")
    picture = plot_times(times)
    write_atomically(folder / "times.png", lambda temporary: temporary.write_bytes(picture))
    return folder


def read_times(folder: str | Path) -> tuple[list[Times], str, str]:
    """Times, conditions and command that `write_times` wrote.

    Raises:
        FileError: the folder has no such file, or it is not one of `write_times`.
    """
    path = Path(folder) / FILE
    try:
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        times = [Times(**one | {"cost": Totals(**one["cost"])}) for one in given["times"]]
        return times, str(given["conditions"]), str(given["command"])
    except OSError as error:
        raise FileError(
            f"cannot read {path}: {error.strerror or error}; nicprune time --out writes it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{path} is not a file of nicprune time --out: {' '.join(str(error).split())[:160]}"
        ) from error


def times_lines(times: list[Times]) -> str:
    """One line a codec: on either side FLOP reduction, seconds of all modules and of the rest, and
    speed-up.
    """
    rows = []
    for one in times:
        cells = [one.name]
        for side in SIDES:
            spent, whole, first = getattr(one, side), getattr(one, f"{side}_s"), times[0]
            ratios = ["", ""]
            if one is not first:
                ratios = [
                    f"{getattr(first.cost, f'{side}r') / getattr(one.cost, f'{side}r'):.2f}×",
                    f"{getattr(first, f'{side}_s') / whole:.2f}×",
                ]
            cells += [
                ratios[0],
                f"{whole - spent.get(REST, 0.0):.2f} + {spent.get(REST, 0.0):.2f} s",
                ratios[1],
            ]
        rows.append(cells)
    headers = [
        "",
        *(
            text
            for side in SIDES
            for text in (f"{side}: FLOP reduction", f"modules + {REST}", "speed-up")
        ),
    ]
    return tabulate(
        rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", *["right"] * 6)
    )


def plot_times(times: list[Times]) -> bytes:
    """A PNG: seconds of encoding and decoding by part, codec by codec; a mark where they would end
    if they followed the MACs.
    """
    parts = [
        part
        for part in dict.fromkeys(
            part for one in times for side in SIDES for part in getattr(one, side)
        )
        if part != REST
    ] + [REST]
    looks = {
        part: {
            "color": LIGHT.hues[n % len(LIGHT.hues)],
            "hatch": HATCHES[n // len(LIGHT.hues) % len(HATCHES)],
        }
        for n, part in enumerate(parts)
    }
    looks[REST] = {"color": LIGHT.muted, "hatch": ""}
    with themed(LIGHT):
        figure = new_figure(10.4, 1.3 + 0.34 * len(times) + 0.2 * ((len(parts) + 1) // 8))
        places = list(range(len(times)))
        for axes, side in zip(figure.subplots(1, 2, sharey=True), SIDES, strict=True):
            left = [0.0] * len(times)
            for part in parts:
                seconds = [getattr(one, side).get(part, 0.0) for one in times]
                if any(seconds):
                    axes.barh(
                        places,
                        seconds,
                        left=left,
                        height=0.66,
                        edgecolor=LIGHT.background,
                        linewidth=0,
                        label=part,
                        **looks[part],
                    )
                left = [a + b for a, b in zip(left, seconds, strict=True)]
            first = times[0]
            follow = [
                getattr(first, f"{side}_s")
                * getattr(one.cost, f"{side}r")
                / getattr(first.cost, f"{side}r")
                for one in times
            ]
            axes.plot(
                follow,
                places,
                linestyle="",
                marker="|",
                markersize=17,
                markeredgewidth=2,
                color=LIGHT.ink,
                label=FOLLOWING,
            )
            axes.set_title(f"{side}, seconds")
            axes.set_xlim(left=0)
        axes.set_yticks(places, [one.name.replace("$", r"\$") for one in times])
        axes.invert_yaxis()
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        longest = max(getattr(one, f"{side}_s") for one in times for side in SIDES)
        seen = [
            part
            for part in parts
            if max(getattr(one, side).get(part, 0.0) for one in times for side in SIDES)
            > 0.005 * longest
        ] + [FOLLOWING]
        figure.legend(
            [handles[label] for label in seen],
            seen,
            loc="outside lower center",
            ncols=min(len(seen), 8),
        )
        return to_png(figure)
