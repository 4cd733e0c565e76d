"""The report of `nicprune time`: a table, the times as JSON, and a plot.

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
from nicprune.evaluation.times import REST, Times, times_table
from nicprune.pruning.totals import Totals
from nicprune.report.plots.transform_times import SIDES, transform_times

FILE = "times.json"
FILES = (FILE, "times.md", "times.png")
"""Files that `write_times` writes."""


def write_times(times: list[Times], folder: str | Path, *, conditions: str, command: str) -> Path:
    """Write times.md, times.json and times.png into a folder; return the folder.

    Args:
        times: the first is the reference of the others.
        conditions: images, procedure and machine of the timing.
        command: command that makes these files again.

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
    picture = transform_times(times)
    write_atomically(folder / "times.png", lambda temporary: temporary.write_bytes(picture))
    return folder


def read_times(folder: str | Path) -> tuple[list[Times], str, str]:
    """Return the times, conditions and command that `write_times` wrote.

    Raises:
        FileError: the folder has no such file, or `write_times` did not write it.
    """
    found, conditions, command = read_timing(Path(folder) / FILE, "--out")
    return [times for times, _ in found], conditions, command


def read_timing(path: Path, option: str) -> tuple[list[tuple[Times, dict[str, Any]]], str, str]:
    """Return what `nicprune time` wrote into a JSON file: times, each with its further entries,
    conditions and command.

    Args:
        option: of `nicprune time`, that writes such a file.

    Raises:
        FileError: there is no such file, or `nicprune time` did not write it.
    """
    try:
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for one in given["times"]:
            own = {key: one[key] for key in Times.__dataclass_fields__ if key in one}
            more = {key: value for key, value in one.items() if key not in own}
            found.append((Times(**own | {"cost": Totals(**own["cost"])}), more))
        return found, str(given["conditions"]), str(given["command"])
    except OSError as error:
        raise FileError(
            f"cannot read {path}: {error.strerror or error}; nicprune time {option} writes it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{path} is not a file of nicprune time {option}: {' '.join(str(error).split())[:160]}"
        ) from error


def times_lines(times: list[Times]) -> str:
    """Return a Markdown table with a row for each codec.

    For encoding and for decoding it has the FLOP reduction, the seconds of the modules and of the
    rest, and the speed-up.
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
