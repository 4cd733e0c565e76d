"""Every figure of each record, against its original, and records joined into the lines of a table
for people.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nicprune.report.records import Record, Setting, arms, as_records, reference_for

AREA = 64 * 64

COLUMNS = (
    "codec",
    "quality",
    "method",
    "label",
    "role",
    "macs",
    "kmac_per_pixel",
    "kmac_per_pixel_encoder",
    "kmac_per_pixel_decoder",
    "flop_reduction",
    "encoder_reduction",
    "decoder_reduction",
    "params",
    "params_reduction",
    "bpp",
    "bpp_estimated",
    "bpp_change_pct",
    "psnr_db",
    "psnr_drop_db",
    "psnr_drop_pct",
    "ms_ssim",
    "encode_s",
    "decode_s",
    "encode_speedup",
    "decode_speedup",
    "steps",
    "seed",
    "lmbda",
    "metric",
    "test",
    "images",
    "counter",
    "device",
    "threads",
    "machine",
    "recipe",
    "recipe_sha256",
    "file",
    "date",
)
FIRST_LATER = ("level", "kmac_per_pixel_min", "kmac_per_pixel_max", "file_bytes")
LATER_COLUMNS = (*FIRST_LATER, "width", "encode_peak_bytes", "decode_peak_bytes", "busy")
"""Columns behind all others, where a record has something for them."""
NUMERIC = COLUMNS[COLUMNS.index("macs") : COLUMNS.index("seed")]


def _ratio(before: float | None, after: float | None) -> float:
    return before / after if before is not None and after else math.nan


def _value(value: Any) -> float:
    return math.nan if value is None else float(value)


def row(record: Record, records: Sequence[Record]) -> dict[str, Any]:
    """Every figure of one record; drops and speed-ups against its original among `records`, NaN
    where there is none.
    """
    cost, before = record["cost"], record["original_cost"]
    original = reference_for(record, records, "original")
    base: Mapping[str, Any] = original if original is not None else dict.fromkeys(record)
    # Seconds of another machine or thread count, or of one that others kept busy, would make a
    # speed-up that nobody measured.
    alike = original is not None and all(
        base[k] == record[k] for k in ("machine", "device", "threads")
    )
    clock = (
        base
        if original is not None and alike and record.quiet() and original.quiet()
        else dict.fromkeys(record)
    )
    drop = _value(base["psnr_db"]) - _value(record["psnr_db"])
    _, least, most = record["dynamic"].get("macs", (None, None, None))
    return {key: record[key] for key in (*COLUMNS, *LATER_COLUMNS) if key in record} | {
        "macs": cost["macs"],
        "params": cost["params"],
        "params_reduction": _ratio(before["params"], cost["params"]),
        "kmac_per_pixel": cost["macs"] / AREA / 1000,
        "kmac_per_pixel_encoder": cost["encoder"] / AREA / 1000,
        "kmac_per_pixel_decoder": cost["decoder"] / AREA / 1000,
        "flop_reduction": _ratio(before["macs"], cost["macs"]),
        "encoder_reduction": _ratio(before["encoder"], cost["encoder"]),
        "decoder_reduction": _ratio(before["decoder"], cost["decoder"]),
        **{
            key: _value(record[key])
            for key in ("bpp", "bpp_estimated", "psnr_db", "ms_ssim", "encode_s", "decode_s")
        },
        "bpp_change_pct": 100 * (_ratio(record["bpp"], base["bpp"]) - 1),
        "psnr_drop_db": drop,
        "psnr_drop_pct": 100 * _ratio(drop, base["psnr_db"]),
        "encode_speedup": _ratio(clock["encode_s"], record["encode_s"]),
        "decode_speedup": _ratio(clock["decode_s"], record["decode_s"]),
        "images": len(record["images"]),
        "test": record.setting().test,
        "kmac_per_pixel_min": _value(least) / AREA / 1000,
        "kmac_per_pixel_max": _value(most) / AREA / 1000,
    }


@dataclass(frozen=True)
class Line:
    """The records of one arm at one quality, or at one rate between two: their figures' mean, and
    spread (sample standard deviation) over seeds.
    """

    setting: Setting
    quality: int | None
    role: str
    arm: str
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]
    members: tuple[Record, ...]

    def show(self, key: str, form: str, plus_minus: str = "±", missing: str = "–") -> str:
        """One figure as text, with its spread where there are several seeds."""
        if not math.isfinite(self.mean[key]):
            return missing
        spread = self.spread.get(key, 0.0)
        return format(self.mean[key], form) + (
            f" {plus_minus}{format(spread, form.lstrip('+'))}" if spread > 0 else ""
        )

    @property
    def label(self) -> str:
        """What a table calls it: the arm, of a slimmable codec with its width."""
        width = self.members[0]["width"]
        return self.arm if width is None else f"{self.arm}, width {width}"

    def between(self) -> bool:
        """Whether this is a rate between those of the qualities: a point of a curve, and no line of
        a table.
        """
        return self.members[0].between()

    def dynamic(self, part: str = "macs") -> tuple[float, float, float] | None:
        """Mean, smallest and largest MACs at 64x64 over the images, of everything or of a
        transform; None where all images cost the same by design.
        """
        found = [record["dynamic"][part] for record in self.members if part in record["dynamic"]]
        return (
            (
                statistics.fmean(f[0] for f in found),
                min(f[1] for f in found),
                max(f[2] for f in found),
            )
            if found
            else None
        )

    def reductions(self) -> tuple[float, float] | None:
        """With gates: smallest and largest FLOP reduction over the images."""
        spread, before = self.dynamic(), self.members[0]["original_cost"]["macs"]
        return (before / spread[2], before / spread[1]) if spread else None

    def show_reductions(self, dash: str = "–") -> str:
        """The range of the FLOP reduction over the images, as in " (2.2–2.7)"; empty where there is
        none to see.
        """
        for form in (".1f", ".2f"):
            low, high = (format(r, form) for r in self.reductions() or (1, 1))
            if low != high:
                return f" ({low}{dash}{high})"
        return ""


def lines(records: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Join records into one line per setting, quality and arm, in the order of a table for
    people.
    """
    ready = as_records(records)
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record, arm in zip(ready, arms(ready), strict=True):
        groups.setdefault((record.setting(), record.rate(), record["role"], arm), []).append(record)
    joined = []
    for (setting, (quality, _, _), role, arm), members in groups.items():
        rows = [row(record, ready) for record in members]
        seeds = len({record["seed"] for record in members})
        values = {key: [_value(r[key]) for r in rows] for key in NUMERIC}
        mean = {k: statistics.fmean(v) for k, v in values.items()}
        spread = (
            {k: statistics.stdev(v) for k, v in values.items() if math.isfinite(mean[k])}
            if seeds > 1
            else {}
        )
        joined.append(Line(setting, quality, role, arm, seeds, mean, spread, tuple(members)))
    return joined


def settings(all_lines: Sequence[Line]) -> dict[Setting, list[Line]]:
    """Lines by setting: each is a table of its own."""
    parts: dict[Setting, list[Line]] = {}
    for line in all_lines:
        parts.setdefault(line.setting, []).append(line)
    return parts


def compact(records: Sequence[Mapping[str, Any]]) -> dict[Setting, list[Line]]:
    """Lines by setting without the rates between qualities: what tables for people show."""
    return settings([line for line in lines(records) if not line.between()])


def blank(line: Line, group: Sequence[Line]) -> str:
    """Why a line has no drop, if so. One codec for all rates is compared only where the codec of a
    quality has the architecture it started from.
    """
    started = line.members[0]["original_cost"]
    there = any(
        other.role == "original"
        and other.quality == line.quality
        and other.members[0]["cost"] != started
        for other in group
    )
    if line.role == "modulated" and there:
        return "the codec of that quality has another architecture"
    return "the original was not evaluated on the same images"
