"""The report of `nicprune time --report`: seconds of codecs by backends and precisions, and their
speed-up beside the FLOP reduction.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tabulate import tabulate

from nicprune.common.errors import FileError
from nicprune.common.files import write_text
from nicprune.evaluation.times import REST, Times
from nicprune.report.times import read_timing
from nicprune.runtime.variants import EAGER, Variant

SIDES = ("encode", "decode")
FILE = "runtime.json"
FILES = (FILE, "runtime.csv", "runtime.md")
"""Files that `write_runtime` writes."""

NOTE = (
    "Speed-up: over the first codec of the table by the same backend and precision, entropy coding"
    " included."
)


@dataclass(frozen=True)
class Row:
    """Encoding or decoding by one codec, backend and precision.

    Attributes:
        kmac_per_pixel: of this side.
        flop_reduction: of this side, relative to the first codec of the family.
        seconds: in total.
        coding: of these, what is outside of all modules: entropy coding.
        speed_up: relative to the first codec of the family, by the same backend and precision.
        efficiency: `speed_up` over `flop_reduction`.
        speed_up_over_eager: relative to the first codec of the family by PyTorch as it is; None
            where that was not timed.
    """

    family: str
    codec: str
    backend: str
    precision: str
    side: str
    kmac_per_pixel: float
    flop_reduction: float
    seconds: float
    coding: float
    speed_up: float | None
    efficiency: float | None
    speed_up_over_eager: float | None


def runtime_rows(times: Mapping[Variant, Times]) -> list[Row]:
    """Return a row for each side of each variant, by family, side, backend and precision."""
    firsts: dict[str, str] = {}
    for variant in times:
        firsts.setdefault(variant.family, variant.label)
    rows = []
    for side in SIDES:
        for variant, found in times.items():
            label = firsts[variant.family]
            first = times.get(Variant(label, variant.backend, variant.precision))
            # MACs are the same by every backend.
            before = next((t for v, t in times.items() if v.label == label), found)
            eager = times.get(Variant(label, EAGER, "float32"))
            seconds, macs = getattr(found, f"{side}_s"), getattr(found.cost, f"{side}r")
            reduction = getattr(before.cost, f"{side}r") / macs if macs else float("nan")
            speed_up = getattr(first, f"{side}_s") / seconds if first is not None else None
            rows.append(
                Row(
                    variant.family,
                    variant.label.removeprefix(f"{variant.family}/"),
                    variant.backend,
                    variant.precision,
                    side,
                    found.cost.kmac_per_pixel(f"{side}r"),
                    reduction,
                    seconds,
                    getattr(found, side).get(REST, 0.0),
                    speed_up,
                    speed_up / reduction if speed_up is not None else None,
                    getattr(eager, f"{side}_s") / seconds if eager is not None else None,
                )
            )
    families = list(firsts)
    return sorted(rows, key=lambda row: (families.index(row.family), SIDES.index(row.side)))


def runtime_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table for each family and side."""
    blocks = []
    for family, side in dict.fromkeys((row.family, row.side) for row in rows):
        lines = [
            [
                row.codec,
                f"{row.backend}{'' if row.precision == 'float32' else f' {row.precision}'}",
                f"{row.kmac_per_pixel:.2f}",
                f"{row.flop_reduction:.2f}×",
                f"{1000 * row.seconds:.1f}",
                f"{1000 * row.coding:.1f}",
                f"{row.speed_up:.2f}×" if row.speed_up is not None else "",
                f"{row.efficiency:.2f}" if row.efficiency is not None else "",
                f"{row.speed_up_over_eager:.2f}×" if row.speed_up_over_eager is not None else "",
            ]
            for row in rows
            if (row.family, row.side) == (family, side)
        ]
        heads = [
            ", ".join(filter(None, (family, side))), "backend", "kMAC/pixel", "FLOP reduction",
            "ms", f"of these {REST}", "speed-up", "/ FLOP reduction", "over the first, eager",
        ]  # fmt: skip
        align = ("left", "left", *["right"] * (len(heads) - 2))
        blocks.append(tabulate(lines, heads, "pipe", disable_numparse=True, colalign=align))
    return "\n\n".join(blocks)


def write_runtime(
    times: Mapping[Variant, Times], folder: str | Path, *, conditions: str, command: str
) -> Path:
    """Write runtime.md, runtime.csv and runtime.json into a folder; return the folder.

    Args:
        times: of each variant; the first codec of each family is its reference.
        conditions: images, procedure and machine of the timing.
        command: command that makes these files again.

    Raises:
        FileError: the folder cannot be written to.
    """
    folder, rows = Path(folder), runtime_rows(times)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(folder / "runtime.csv", text.getvalue())
    content = {
        "command": command,
        "conditions": conditions,
        "times": [asdict(variant) | asdict(found) for variant, found in times.items()],
    }
    write_text(folder / FILE, json.dumps(content, indent=1) + "\n")
    write_text(
        folder / "runtime.md",
        f"{runtime_table(rows)}\n\n{NOTE} {conditions}\n\nMade by `{command}`.\n",
    )
    return folder


def read_runtime(folder: str | Path) -> tuple[list[Row], str, str]:
    """Return the rows, conditions and command that `write_runtime` wrote.

    Raises:
        FileError: the folder has no such file, or `write_runtime` did not write it.
    """
    path = Path(folder) / FILE
    found, conditions, command = read_timing(path, "--report")
    try:
        times = {Variant(**more): one for one, more in found}
    except TypeError as error:
        raise FileError(f"{path} is not a file of nicprune time --report: {error}") from error
    return runtime_rows(times), conditions, command
