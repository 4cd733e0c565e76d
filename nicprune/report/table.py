"""The table: one row per record with every figure, and its compact forms for people (terminal, Markdown, LaTeX)."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tabulate import tabulate

from nicprune.report.records import ROLES, Record, Setting, arms, as_records, counterpart, number

AREA = 64 * 64
WIDTH = 120
MS_SSIM = 7
"""The column of the terminal's table that goes first where there is no room."""

COLUMNS = (
    "codec", "quality", "method", "label", "role", "macs", "kmac_per_pixel", "kmac_per_pixel_encoder", "kmac_per_pixel_decoder",
    "flop_reduction", "encoder_reduction", "decoder_reduction", "params", "params_reduction", "bpp", "bpp_estimated", "bpp_change_pct",
    "psnr_db", "psnr_drop_db", "psnr_drop_pct", "ms_ssim",
    "encode_s", "decode_s", "encode_speedup", "decode_speedup", "steps", "seed", "lmbda", "metric", "test", "images", "counter", "device", "threads",
    "machine", "recipe", "recipe_sha256", "file", "date",
)  # fmt: skip
NUMERIC = COLUMNS[COLUMNS.index("macs") : COLUMNS.index("seed")]


def _ratio(before: float | None, after: float | None) -> float:
    return before / after if before is not None and after else math.nan


def _value(value: Any) -> float:
    return math.nan if value is None else float(value)


def row(record: Record, records: Sequence[Record]) -> dict[str, Any]:
    """Every figure of one record; drops and speed-ups against its original among `records`, NaN where there is none."""
    cost, before = record["cost"], record["original_cost"]
    original = counterpart(record, records, "original")
    base: Mapping[str, Any] = original if original is not None else dict.fromkeys(record)
    # Seconds of another machine or thread count would make a speed-up that nobody measured.
    clock = base if original is not None and all(base[k] == record[k] for k in ("machine", "device", "threads")) else dict.fromkeys(record)
    drop = _value(base["psnr_db"]) - _value(record["psnr_db"])
    return {key: record[key] for key in COLUMNS if key in record} | {
        "macs": cost["macs"], "params": cost["params"], "params_reduction": _ratio(before["params"], cost["params"]),
        "kmac_per_pixel": cost["macs"] / AREA / 1000, "kmac_per_pixel_encoder": cost["encoder"] / AREA / 1000,
        "kmac_per_pixel_decoder": cost["decoder"] / AREA / 1000, "flop_reduction": _ratio(before["macs"], cost["macs"]),
        "encoder_reduction": _ratio(before["encoder"], cost["encoder"]), "decoder_reduction": _ratio(before["decoder"], cost["decoder"]),
        **{key: _value(record[key]) for key in ("bpp", "bpp_estimated", "psnr_db", "ms_ssim", "encode_s", "decode_s")},
        "bpp_change_pct": 100 * (_ratio(record["bpp"], base["bpp"]) - 1), "psnr_drop_db": drop, "psnr_drop_pct": 100 * _ratio(drop, base["psnr_db"]),
        "encode_speedup": _ratio(clock["encode_s"], record["encode_s"]), "decode_speedup": _ratio(clock["decode_s"], record["decode_s"]),
        "images": len(record["images"]), "test": record.setting().test,
    }  # fmt: skip


def table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per record, sorted by codec, quality, role (original, control, pruned) and label; blank (NaN) where there is no original to compare to.

    kmac_per_pixel is 1,000 MACs per pixel; reductions and speed-ups are before / after; bpp_change_pct, psnr_drop_db and psnr_drop_pct are
    relative to the original of the same codec, quality and test images; times are seconds per image.
    """
    ready = as_records(records)
    rows = [row(record, ready) for record in ready]
    rows.sort(key=lambda r: (r["codec"], number(r["quality"]), ROLES.index(r["role"]), r["label"]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


@dataclass(frozen=True)
class Line:
    """The records of one arm at one quality: their figures' mean, and spread (sample standard deviation) over seeds."""

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
        return format(self.mean[key], form) + (f" {plus_minus}{format(spread, form.lstrip('+'))}" if spread > 0 else "")


def lines(records: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Join records into one line per setting, quality and arm, in the order of a table for people."""
    ready = as_records(records)
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record, arm in zip(ready, arms(ready), strict=True):
        groups.setdefault((record.setting(), record["quality"], record["role"], arm), []).append(record)
    joined = []
    for (setting, quality, role, arm), members in groups.items():
        rows = [row(record, ready) for record in members]
        seeds = len({record["seed"] for record in members})
        values = {key: [_value(r[key]) for r in rows] for key in NUMERIC}
        mean = {k: statistics.fmean(v) for k, v in values.items()}
        spread = {k: statistics.stdev(v) for k, v in values.items() if math.isfinite(mean[k])} if seeds > 1 else {}
        joined.append(Line(setting, quality, role, arm, seeds, mean, spread, tuple(members)))
    return joined


def settings(all_lines: Sequence[Line]) -> dict[Setting, list[Line]]:
    """Lines by setting: each is a table of its own."""
    parts: dict[Setting, list[Line]] = {}
    for line in all_lines:
        parts.setdefault(line.setting, []).append(line)
    return parts


HEADERS = ("q", "codec", "kMAC/pixel", "FLOP reduction", "bpp", "PSNR dB", "PSNR drop dB (%)", "MS-SSIM", "encode s", "decode s")


def cells(line: Line, times: str = "×", plus_minus: str = "±", missing: str = "–") -> list[str]:
    """One line of the compact table."""
    def show(key: str, form: str) -> str:
        return line.show(key, form, plus_minus, missing)

    drop = missing
    if line.role != "original" and math.isfinite(line.mean["psnr_drop_db"]):
        drop = f"{show('psnr_drop_db', 'z.2f')} ({line.mean['psnr_drop_pct']:z.2f} %)"
    reduction = missing if line.role == "original" and line.mean["flop_reduction"] == 1 else f"{line.mean['flop_reduction']:.2f}{times}"
    return [
        missing if line.quality is None else str(line.quality), line.arm, f"{line.mean['kmac_per_pixel']:.2f}", reduction, show("bpp", ".4f"),
        show("psnr_db", "z.2f"), drop, show("ms_ssim", ".4f").split(f" {plus_minus}")[0], show("encode_s", ".3f").split(f" {plus_minus}")[0],
        show("decode_s", ".3f").split(f" {plus_minus}")[0],
    ]  # fmt: skip


ALIGN = ("right", "left", *["right"] * 8)


def footnote(group: Sequence[Line]) -> str:
    """What the figures of a table mean and where they were measured, in one sentence each."""
    members = [record for line in group for record in line.members]

    def said(key: str) -> str:
        return ", ".join(sorted({str(record[key]) for record in members if record[key] is not None})) or "unknown"

    note = (
        f"MACs counted by {said('counter')} at 64x64. bpp of the real bitstreams. PSNR: RGB, 8-bit rounded, mean over images; drop relative to the original. "
        f"Times: seconds per image, {said('device')}, {said('threads')} thread(s)."
    )
    seeds = sorted({line.seeds for line in group if line.seeds > 1})
    if seeds:
        note += f" Rows with +- are means over {' or '.join(map(str, seeds))} seeds with the sample standard deviation."
    if any(line.role != "original" and not math.isfinite(line.mean["psnr_drop_db"]) for line in group):
        note += " No drop where the original was not evaluated on the same images."
    return note


def text_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A compact plain-text table for the terminal, at most 120 columns wide, one per codec and test folder; ASCII but for names."""
    headers = ["q", "codec", "kMAC\n/pixel", "FLOP\nreduction", "bpp", "PSNR\ndB", "PSNR drop\ndB (%)", "MS-SSIM", "encode\ns", "decode\ns"]
    blocks = []
    for setting, group in settings(lines(records)).items():
        rows = [cells(line, "x", "+-", "-") for line in group]
        columns, widest = list(range(len(headers))), max(len(r[1]) for r in rows)
        while True:
            # Long labels are wrapped, not cut: what tells two arms apart may stand at their end.
            shown = [[r[0], "\n".join(textwrap.wrap(r[1], widest)), *r[2:]] for r in rows]
            text = tabulate(
                [[row[c] for c in columns] for row in shown], [headers[c] for c in columns],
                tablefmt="simple", disable_numparse=True, colalign=[ALIGN[c] for c in columns],
            )  # fmt: skip
            over = max(map(len, text.splitlines())) - WIDTH
            if over <= 0 or (widest <= 8 and MS_SSIM not in columns):
                break
            if MS_SSIM in columns:  # the files have it
                columns.remove(MS_SSIM)
            else:
                widest = max(8, widest - over)
        blocks.append(f"{textwrap.shorten(str(setting), WIDTH)}\n{text}\n{textwrap.fill(footnote(group), WIDTH)}")
    return "\n\n".join(blocks)


def _formatted(records: Sequence[Mapping[str, Any]], fmt: str, escape: Callable[[str], str], title: str, note: str, times: str, plus_minus: str) -> str:
    blocks = []
    for setting, group in settings(lines(records)).items():
        # Escape before the signs go in, which are markup in LaTeX.
        rows = [[escape(c).replace("\0", times).replace("\1", plus_minus) for c in cells(line, "\0", "\1", "–")] for line in group]
        body = tabulate(rows, [escape(h) for h in HEADERS], tablefmt=fmt, disable_numparse=True, colalign=ALIGN)
        blocks.append(f"{title.format(escape(str(setting)))}{body}\n{note.format(escape(footnote(group).replace('+-', chr(1))).replace(chr(1), plus_minus))}")
    return "\n".join(blocks)


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The compact table as Markdown."""
    def escape(text: str) -> str:
        for sign in "\\`*_|<>[]":
            text = text.replace(sign, "\\" + sign)
        return text

    return _formatted(records, "pipe", escape, "**{}**\n\n", "\n{}\n", "×", "±")


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--",
}  # fmt: skip


def latex(records: Sequence[Mapping[str, Any]]) -> str:
    """The compact table as LaTeX tabulars that need no package."""
    def escape(text: str) -> str:
        return "".join(LATEX.get(sign, sign) for sign in text)

    return _formatted(records, "latex_raw", escape, "% {}\n", "\n\\par\\smallskip\\noindent{{\\footnotesize {}}}\n", r"$\times$", r"$\pm$")
