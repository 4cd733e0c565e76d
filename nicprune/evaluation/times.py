"""Seconds of coding by transform, and their table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tabulate import tabulate

from nicprune.common.machine import BUSY, machine_line
from nicprune.pruning.totals import AREA, Totals

REST = "coding"
"""Name of the time outside every module: entropy coding, and context models that CompressAI runs
pixel by pixel on one thread.
"""


@dataclass(frozen=True)
class Times:
    """Seconds for one image, medians over turns.

    Attributes:
        encode, decode: seconds by transform (or layer) in the order in which they run; `REST` for
            the time outside them; a method's own layers under the method's name.
        encode_s, decode_s: seconds in total, the sums of these.
        kept: number of turns that counted.
        busy: other programs kept the processor busy throughout.
        known: whether this system reports the load of other programs.
    """

    name: str
    cost: Totals
    encode: dict[str, float]
    decode: dict[str, float]
    encode_s: float
    decode_s: float
    kept: int
    busy: bool
    known: bool = True


def times_table(times: list[Times], conditions: str) -> str:
    """Return two tables, for encoding and decoding, and the conditions below them.

    They show seconds by part, and the speed-up beside the FLOP reduction, relative to the first
    codec.
    """
    blocks = []
    for side, sides in (
        ("encode", [t.encode for t in times]),
        ("decode", [t.decode for t in times]),
    ):
        parts = [
            part
            for part in dict.fromkeys(part for spent in sides for part in spent)
            if part != REST
        ]
        rows = []
        for one, spent in zip(times, sides, strict=True):
            macs, before = (getattr(t.cost, f"{side}r") for t in (one, times[0]))
            total, reduction = getattr(one, f"{side}_s"), before / macs if macs else float("nan")
            speed = getattr(times[0], f"{side}_s") / total
            ratio = (
                [f"{speed:.2f}×", f"{speed / reduction:.2f}"] if one is not times[0] else ["", ""]
            )
            seconds = [f"{spent[part]:.3f}" if part in spent else "" for part in (*parts, REST)]
            rows.append(
                [
                    one.name,
                    f"{macs / AREA / 1000:.2f}",
                    f"{reduction:.2f}×",
                    *seconds,
                    f"{total:.3f}",
                    *ratio,
                ]
            )
        headers = [
            f"{side}, s",
            "kMAC/pixel",
            "FLOP reduction",
            *parts,
            REST,
            "all",
            "speed-up",
            "/ FLOP reduction",
        ]
        blocks.append(
            tabulate(
                rows,
                headers,
                tablefmt="pipe",
                disable_numparse=True,
                colalign=("left", *["right"] * (len(headers) - 1)),
            )
        )
    return "\n\n".join([*blocks, conditions])


def taken_under(times: list[Times], image: str, fast: bool = False) -> str:
    """Return a sentence on the image, the timing and the machine.

    Args:
        fast: whether entropy parameters were in float32.
    """
    parameters = "float32" if fast else "float64"
    taken = f"during which other programs used at most {BUSY:.0%} of the processor"
    busy = any(found.busy for found in times)
    if busy or not all(found.known for found in times):
        taken = (
            "while other programs kept the processor busy (run again on a quiet machine)"
            if busy
            else "(the load of other programs is not known here)"
        )
    kept = min(found.kept for found in times)
    return (
        f"Seconds for {image}, medians of {kept} turns {taken}; {torch.get_num_threads()}"
        f" thread(s), {machine_line()}, torch {torch.__version__}. {REST}: entropy coding, and"
        f" context models, which CompressAI runs on one thread; entropy parameters in {parameters}."
    )
