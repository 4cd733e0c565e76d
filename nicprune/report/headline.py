"""The result in one sentence for each codec, made from the figures of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nicprune.report.aggregate import Row, why_no_drop
from nicprune.report.file_sizes import file_sizes


def headline(group: Sequence[Row]) -> list[str]:
    """Return one sentence for each arm: MACs, PSNR, rate and decoding time; controls come last.

    Args:
        group: the rows of one setup.
    """
    curves = dict.fromkeys((row.role, row.arm) for row in group if row.role != "original")
    sentences = [
        _sentence(role, arm, group)
        for role, arm in sorted(curves, key=lambda curve: curve[0] == "control")
    ]
    return sentences or ["No pruned codec is among the records."]


def _sentence(role: str, arm: str, group: Sequence[Row]) -> str:
    rows = [row for row in group if (row.role, row.arm) == (role, arm)]
    if role == "modulated":  # compared where the codec of a quality has the same architecture
        rows = [row for row in rows if math.isfinite(row.mean["psnr_drop_db"])] or rows
    qualities = list(dict.fromkeys(row.quality for row in rows if row.quality is not None))
    where = (
        f" at {'quality' if len(qualities) == 1 else 'qualities'} {_listed(qualities)}"
        if qualities
        else ""
    )
    loss = _loss(rows, group)
    if role == "control":
        return f"{arm} (the original fine-tuned without pruning){where}: {loss}."
    macs, speed = _macs(rows), _speed(rows)
    if role != "modulated":
        return f"{arm} needs {macs}{where}: {loss}{speed}."
    whole = "for all rates" if rows[0].members[0].width is None else f"of {len(rows)} widths"
    files = "".join(
        f" It is {sizes.summary()}."
        for sizes in file_sizes(group)
        if (sizes.role, sizes.arm) == (role, arm)
    )
    for unit in (" MB", " kB", " %"):
        files = files.replace(unit, unit.replace(" ", "\u00a0"))
    return f"{arm}, one codec {whole}, needs {macs}{where}: {loss}{speed}.{files}"


def _loss(rows: Sequence[Row], group: Sequence[Row]) -> str:
    drops = [row.mean["psnr_drop_db"] for row in rows]
    if not all(map(math.isfinite, drops)):
        return f"the PSNR drop is not known, because {why_no_drop(rows[0], group)}"
    percent, rate = ([row.mean[n] for row in rows] for n in ("psnr_drop_pct", "bpp_change_pct"))
    verb, form = "drops", "z.2f"
    if max(drops) <= 0 or min(drops) < 0:  # a negative drop reads better as a gain
        drops, percent = [-d for d in drops], [-p for p in percent]
        verb, form = ("rises", "z.2f") if min(drops) >= 0 else ("changes", "+z.2f")
    return (
        f"PSNR {verb} by {_range(drops, form, ' dB')} ({_range(percent, form, ' %')}) while"
        f" bpp changes by {_range(rate, '+z.1f', ' %')}"
    )


def _macs(rows: Sequence[Row]) -> str:
    fewer = _range([row.mean["flop_reduction"] for row in rows], ".2f", "×")
    ranges = [row.reductions() or () for row in rows if row.show_reductions()]
    if gated := [reduction for ends in ranges for reduction in ends]:
        return f"{fewer} fewer MACs in the mean over images ({_range(gated, '.2f', '×')} by image)"
    if fewer == "1.00×":
        return "as many MACs as the original"
    reductions = [row.mean["flop_reduction"] for row in rows]
    if max(reductions) < 1:  # a codec that has grown
        return f"{_range([1 / value for value in reductions], '.2f', '×')} the original's MACs"
    return f"{fewer} fewer MACs"


def _speed(rows: Sequence[Row]) -> str:
    speed = [row.mean["decode_speedup"] for row in rows]
    if not all(map(math.isfinite, speed)):
        return ""
    return f"; decoding is {_range(speed, '.2f', '×')} as fast"


def _range(values: Sequence[float], form: str, unit: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    unit = unit.replace(" ", "\u00a0")  # a unit stays on the line of its number
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _listed(qualities: Sequence[int]) -> str:
    first, last = qualities[0], qualities[-1]
    run = len(qualities) > 2 and list(qualities) == list(range(first, last + 1))
    return f"{first} to {last}" if run else ", ".join(map(str, qualities))
