"""The report's folder: table.csv, table.md, table.tex, bd.csv, records.json, plots, crops and one
self-contained page.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from nicprune.common.errors import FileError
from nicprune.common.files import write_atomically, write_text
from nicprune.report.aggregate import AREA, Line, blank, lines, settings
from nicprune.report.bd_rate import RATES, bd_table
from nicprune.report.mac_spread import SPEEDS, megabytes, per_image, storage, timed
from nicprune.report.plots.plot import plots_in_order
from nicprune.report.plots.style import DARK, DPI
from nicprune.report.records import COSTS, LATER, Record, arms, as_records, reference_for
from nicprune.report.scratch_gap import HEADERS as GAP_HEADERS
from nicprune.report.scratch_gap import NOTE as GAP_NOTE
from nicprune.report.scratch_gap import gaps
from nicprune.report.table import footnote, latex, markdown, table

MAX_CROP_IMAGES = 4
"""Photographs whose crops go into the page of each codec; all of them are in the folder crops/."""
MAX_PICTURES = 100
"""Crops in a page, if they are of several photographs: a page of many codecs shows fewer
photographs, and stays small enough to be sent.
"""
PICTURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


def write_report(
    records: Sequence[Mapping[str, Any]],
    folder: str | Path,
    title: str | None = None,
    *,
    crops: bool = True,
) -> Path:
    """Write tables, plots, crops and the page into `folder`, the page last; return the path of its
    index.html.

    Args:
        records: what `collect` found. Plain mappings do too, without crops.
        folder: made if it does not exist; files of an earlier report are replaced one by one, each
            whole.
        title: the page's heading; by default the recipe's and codecs' names.
        crops: False leaves pieces of photographs out; those of an earlier report stay where they
            are.

    Raises:
        FileError: no records, or the folder cannot be written to.
    """
    folder, ready = Path(folder), as_records(records)
    if not ready:
        raise FileError("no records to report on; `nicprune run RECIPE` writes them")
    joined = lines(ready)
    shown, copies, lost = _crops(ready) if crops else ([[] for _ in ready], {}, [])
    bd = bd_table(ready)
    drawn = {plot.file: (plot.draw(joined), plot.draw(joined, DARK)) for plot in plots_in_order()}
    heading = title or _title(ready)
    at_qualities = [line for line in joined if not line.between()]
    page = _page(
        heading, ready, at_qualities, bd, drawn, shown, copies, notes(ready, at_qualities) + lost
    )
    write_text(folder / "table.csv", table(ready).to_csv(index=False, lineterminator="\n"))
    write_text(folder / "table.md", markdown(ready))
    write_text(folder / "table.tex", latex(ready))
    write_text(folder / "bd.csv", bd.to_csv(index=False, lineterminator="\n"))
    for name, content in copies.items():
        _write_bytes(folder / name, content)
    kept = [_portable(record, folder, crop) for record, crop in zip(ready, shown, strict=True)]
    write_text(folder / "records.json", json.dumps(kept, indent=1) + "\n")
    for name, (light, _) in drawn.items():
        if light is not None:
            _write_bytes(folder / name, light)
        else:  # a plot of an earlier report would be mistaken for this one's
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)
    return write_text(folder / "index.html", page)


def _write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def _title(records: Sequence[Record]) -> str:
    recipes = sorted({str(r["recipe"]) for r in records if r["recipe"]})
    codecs = sorted({r["codec"] for r in records})
    made = [role for role in ("pruned", "modulated") if any(r["role"] == role for r in records)]
    return (
        f"{', '.join(recipes) or 'Report'}: {', '.join(codecs)}, {' and '.join(made) or 'pruned'}"
    )


def _portable(record: Record, folder: Path, crops: list[dict[str, Any]]) -> dict[str, Any]:
    """The record as it goes into records.json: valid JSON, crops relative to the report, and no
    absolute paths.
    """

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    content: dict[str, Any] = finite(dict(record)) | {"test": record.setting().test, "crops": crops}
    content = {
        key: value
        for key, value in content.items()
        if key not in LATER or value not in (None, {}, [])
    }
    content["images"] = [image | {"name": Path(image["name"]).name} for image in content["images"]]
    if record["file"]:
        file = Path(record["file"])
        # A codec inside the report's folder keeps its place there.
        with contextlib.suppress(ValueError, OSError):
            file = ((record.folder or folder) / file).resolve().relative_to(folder.resolve())
        content["file"] = file.name if file.is_absolute() or ".." in file.parts else file.as_posix()
    return content


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "x"


def _crops(
    records: Sequence[Record],
) -> tuple[list[list[dict[str, Any]]], dict[str, bytes], list[str]]:
    """Read the crops of all records.

    Returns: per record its crops with names inside the report's folder; the files to write there by
    name (equal pictures once); and a note for each record some of whose crops are missing. A crop
    is taken only from below its record's folder, and only if it is a PNG or JPEG.
    """
    copies: dict[str, bytes] = {}
    by_content: dict[str, str] = {}

    def take(record: Record, path: str, name: str) -> str | None:
        root = record.folder.resolve() if record.folder is not None else None
        try:
            file = root / path if root is not None else None
            if file is None or root is None or not file.resolve().is_relative_to(root):
                return None
            content = file.read_bytes()
        except (OSError, ValueError):
            return None
        kind = next((mime for magic, mime in PICTURES.items() if content.startswith(magic)), None)
        if kind is None:
            return None
        digest = hashlib.sha256(content).hexdigest()
        if digest not in by_content:
            suffix = ".png" if kind == "image/png" else ".jpg"
            chosen, n = f"crops/{name}{suffix}", 1
            while chosen in copies:
                n += 1
                chosen = f"crops/{name}-{n}{suffix}"
            copies[chosen], by_content[digest] = content, chosen
        return by_content[digest]

    kept, lost = [], []
    for record, arm in zip(records, arms(records), strict=True):
        mine, missing = [], 0
        for crop in record["crops"]:
            stem = _slug(Path(crop["image"]).stem)
            who = _slug(
                "-".join(
                    str(p)
                    for p in (record["codec"], f"q{record['quality']}", arm, f"s{record['seed']}")
                    if p is not None
                )
            )
            original, decoded = (
                take(record, crop["original"], f"{stem}-original"),
                take(record, crop["decoded"], f"{stem}-{who}"),
            )
            if original is None or decoded is None:
                missing += 1
                continue
            mine.append(
                crop | {"image": Path(crop["image"]).name, "original": original, "decoded": decoded}
            )
        kept.append(mine)
        if missing:
            lost.append(
                f"{_name(record, arm)}: {missing} of {len(record['crops'])} crops were not found"
                " beside the record and are left out."
            )
    return kept, copies, lost


def _name(record: Record, arm: str) -> str:
    return (
        f"{record['codec']}{'' if record['quality'] is None else ' q' + str(record['quality'])}"
        f" {arm}"
    )


def notes(records: Sequence[Record], joined: Sequence[Line]) -> list[str]:
    """What a reader must know before trusting the table: missing originals and controls, unequal
    training, mixed machines or counters.
    """
    said = []
    for line in joined:
        name = _name(line.members[0], line.arm)
        if line.role != "original" and any(
            reference_for(r, records, "original") is None for r in line.members
        ):
            said.append(
                f"{name}: {blank(line, joined)}, so drop, change of bpp and speed-up are blank."
            )
        if line.role not in ("pruned", "modulated"):
            continue
        control = reference_for(line.members[0], records, "control")
        if (
            control is None
            and line.role == "modulated"
            and any(other.role == "control" and other.quality == line.quality for other in joined)
        ):
            continue  # of another architecture, which has been said
        if control is None:
            said.append(
                f"{name}: there is no control (the original trained on for the same steps), so what"
                " extra training alone gives is not known."
            )
        elif control["steps"] != line.members[0]["steps"]:
            said.append(
                f"{name}: trained for {line.members[0]['steps']} steps, its control for"
                f" {control['steps']}."
            )
    for key, what in (
        ("counter", "MAC counters"),
        ("machine", "machines"),
        ("device", "devices"),
        ("threads", "thread counts"),
    ):
        found = sorted({str(r[key]) for r in records if r[key] is not None})
        if len(found) > 1:
            said.append(
                f"The records come from several {what}: {', '.join(found)}. Compare"
                f" {'MACs' if key == 'counter' else 'times'} within one only."
            )
    return said


def _range(values: Sequence[float], form: str, unit: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    unit = unit.replace(" ", "\u00a0")  # a unit stays on the line of its number
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _levels(levels: Sequence[int]) -> str:
    run = len(levels) > 2 and list(levels) == list(range(levels[0], levels[-1] + 1))
    return f"{levels[0]} to {levels[-1]}" if run else ", ".join(map(str, levels))


def headline(group: Sequence[Line]) -> list[str]:
    """One sentence per pruned arm of a setting, made from its numbers, and one on the control."""
    said = []
    curves = dict.fromkeys((line.role, line.arm) for line in group if line.role != "original")
    for role, arm in sorted(curves, key=lambda curve: curve[0] == "control"):
        members = [line for line in group if (line.role, line.arm) == (role, arm)]
        one = role == "modulated"
        if one:  # compared where the codec of a quality has the same architecture
            members = [
                line for line in members if math.isfinite(line.mean["psnr_drop_db"])
            ] or members
        levels = list(dict.fromkeys(line.quality for line in members if line.quality is not None))
        where = (
            f" at {'quality' if len(levels) == 1 else 'qualities'} {_levels(levels)}"
            if levels
            else ""
        )
        drops = [line.mean["psnr_drop_db"] for line in members]
        if all(map(math.isfinite, drops)):
            percent, rate = (
                [line.mean[key] for line in members] for key in ("psnr_drop_pct", "bpp_change_pct")
            )
            verb, form = "drops", "z.2f"
            if max(drops) <= 0 or min(drops) < 0:  # a negative drop is a gain, and better said so
                drops, percent = [-d for d in drops], [-p for p in percent]
                verb, form = ("rises", "z.2f") if min(drops) >= 0 else ("changes", "+z.2f")
            lost = (
                f"PSNR {verb} by {_range(drops, form, ' dB')} ({_range(percent, form, ' %')}) while"
                f" bpp changes by {_range(rate, '+z.1f', ' %')}"
            )
        else:
            lost = f"the PSNR drop is not known, because {blank(members[0], group)}"
        if role == "control":
            said.append(f"{arm} (the original trained on){where}: {lost}.")
            continue
        speed = [line.mean["decode_speedup"] for line in members]
        fast = (
            f"; decoding is {_range(speed, '.2f', '×')} as fast"
            if all(map(math.isfinite, speed))
            else ""
        )
        fewer = (
            f"{_range([line.mean['flop_reduction'] for line in members], '.2f', '×')} fewer MACs"
        )
        if gated := [
            reach for line in members if line.show_reductions() for reach in line.reductions() or ()
        ]:
            fewer += f" in the mean over images ({_range(gated, '.2f', '×')} by image)"
        if one:
            fewer = "as many MACs as the original" if fewer.startswith("1.00× fewer") else fewer
            files = "".join(
                f" It is {stored.swap()}."
                for stored in storage(group)
                if (stored.role, stored.arm) == (role, arm)
            )
            files = (
                files.replace(" MB", "\u00a0MB").replace(" kB", "\u00a0kB").replace(" %", "\u00a0%")
            )
            whole = (
                "for all rates"
                if members[0].members[0]["width"] is None
                else f"of {len(members)} widths"
            )
            said.append(f"{arm}, one codec {whole}, needs {fewer}{where}: {lost}{fast}.{files}")
            continue
        said.append(f"{arm} needs {fewer}{where}: {lost}{fast}.")
    return said or ["No pruned codec is among the records."]


def _as_before(line: Line) -> bool:
    """Whether a modulator is all that an arm adds: its transforms are the original's."""
    return (
        line.role == "modulated"
        and line.members[0]["cost"]["macs"] == line.members[0]["original_cost"]["macs"]
    )


def transforms(group: Sequence[Line]) -> dict[str, Any]:
    """kMAC/pixel and params of each transform, for the original and every arm of a setting, by
    quality.
    """
    having = [
        line
        for line in group
        if line.members[0]["by_transform"] and line.role != "control" and not _as_before(line)
    ]
    columns = list(dict.fromkeys(line.label for line in having))
    rows = []
    for quality in dict.fromkeys(line.quality for line in having):
        here = {line.label: line for line in having if line.quality == quality}
        base: Mapping[str, Any] = next(
            (line.members[0]["by_transform"] for line in here.values() if line.role == "original"),
            {},
        )
        for index, name in enumerate(
            dict.fromkeys(n for line in here.values() for n in line.members[0]["by_transform"])
        ):
            cells = []
            for arm in columns:
                macs, params = (
                    here[arm].members[0]["by_transform"].get(name, (None, None))
                    if arm in here
                    else (None, None)
                )
                before = base.get(name, (None, None))[0]
                ratio = (
                    f"{before / macs:.2f}×"
                    if macs and before and here[arm].role != "original"
                    else ""
                )
                cells.append(
                    ("–", "", "–")
                    if macs is None
                    else (f"{macs / AREA / 1000:.2f}", ratio, f"{params:,}")
                )
            rows.append({"quality": quality, "first": index == 0, "name": name, "cells": cells})
    return {
        "columns": [
            (arm, next(line.role for line in having if line.label == arm)) for arm in columns
        ],
        "rows": rows,
    }


def _shown_width(png: bytes) -> int:
    """Width of a plot on the page in CSS pixels: the same scale for every plot, so that their
    letters are of one size.
    """
    return round(int.from_bytes(png[16:20], "big") * 105 / DPI)


def _uri(content: bytes) -> str:
    kind = next(
        (mime for magic, mime in PICTURES.items() if content.startswith(magic)), "image/png"
    )
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _pictures(
    setting_records: Sequence[tuple[Record, str, list[dict[str, Any]]]], copies: Mapping[str, bytes]
) -> list[dict[str, Any]]:
    """Crops by photograph and quality: the photograph, then each codec's decoding; the first seed
    of each arm.
    """
    names = list(dict.fromkeys(crop["image"] for _, _, crops in setting_records for crop in crops))
    shown: list[dict[str, Any]] = []
    for number, name in enumerate(names[:MAX_CROP_IMAGES], 1):
        each = sum(len(row["figures"]) for row in shown) // max(
            1, number - 1
        )  # pictures of a photograph
        if number > 1 and number * each > MAX_PICTURES:
            break
        for quality in dict.fromkeys(record["quality"] for record, _, _ in setting_records):
            figures: dict[str, dict[str, Any]] = {}
            for record, arm, crops in setting_records:
                for crop in crops:
                    if crop["image"] != name or record["quality"] != quality:
                        continue
                    figures.setdefault(
                        "photograph",
                        {
                            "uri": _uri(copies[crop["original"]]),
                            "title": "photograph",
                            "figures": "uncompressed",
                        },
                    )
                    units = (("bpp", ".3f", "bpp"), ("psnr_db", ".2f", "dB"))
                    told = ", ".join(
                        f"{crop[key]:{form}} {unit}"
                        for key, form, unit in units
                        if isinstance(crop.get(key), int | float)
                    )
                    when = {"original": "before", "control": "control"}.get(record["role"], "after")
                    title = when if when == arm else f"{when}: {arm}"
                    figures.setdefault(
                        f"{record['role']} {arm}",
                        {"uri": _uri(copies[crop["decoded"]]), "title": title, "figures": told},
                    )
            if figures:
                shown.append({"image": name, "quality": quality, "figures": list(figures.values())})
    return shown


def _page(
    title: str,
    records: Sequence[Record],
    joined: Sequence[Line],
    bd: pd.DataFrame,
    drawn: Mapping[str, tuple[bytes | None, bytes | None]],
    crops: Sequence[list[dict[str, Any]]],
    copies: Mapping[str, bytes],
    said: Sequence[str],
) -> str:
    """Fill the template."""
    with_crops = list(zip(records, arms(records), crops, strict=True))
    sections = [
        {
            "name": str(setting),
            "headline": headline(group),
            "lines": group,
            "note": footnote(group).replace("+-", "±"),
            "transforms": transforms(group),
            "per_image": (spreads := per_image(group)),
            "timed": timed(spreads),
            "storage": storage(group),
            "gaps": gaps(group),
            "slim": [line for line in group if line.members[0]["width"] is not None],
            "count": len(setting.images),
            "crops": _pictures(
                [item for item in with_crops if item[0].setting() == setting], copies
            ),
        }
        for setting, group in settings(joined).items()
    ]
    recipes = {
        (r["recipe"], r["recipe_sha256"]): r["recipe_text"]
        for r in records
        if r["recipe"] or r["recipe_text"]
    }

    def facts(key: str) -> list[str]:
        return sorted(
            {
                str(float(f"{r[key]:.4g}") if key == "lmbda" else r[key])
                for r in records
                if r[key] is not None
            }
        )

    packages: dict[str, set[str]] = {}
    for record in records:
        for name, version in record["versions"].items():
            packages.setdefault(str(name), set()).add(str(version))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html.j2").render(
        title=title,
        sections=sections,
        notes=said,
        max_crops=MAX_CROP_IMAGES,
        recipes=recipes,
        packages=packages,
        finite=math.isfinite,
        bd=bd.astype(object).where(bd.notna(), None).to_dict("records"),
        costs=COSTS,
        plots=[
            {
                "heading": plot.heading,
                "alt": plot.alt,
                "caption": plot.caption(joined),
                "light": _uri(light),
                "dark": _uri(dark),
                "width": _shown_width(light),
            }
            for plot in plots_in_order()
            for light, dark in (drawn[plot.file],)
            if light is not None and dark is not None
        ],
        megabytes=megabytes,
        gap_headers=GAP_HEADERS,
        gap_note=GAP_NOTE,
        rates=RATES,
        speeds=SPEEDS,
        barred=any(line.show_reductions() for line in joined),
        modulated=any(r["role"] == "modulated" and r["width"] is None for r in records),
        slimmable=any(r["width"] is not None for r in records),
        facts={
            key: facts(key)
            for key in ("machine", "device", "threads", "counter", "seed", "steps", "lmbda", "date")
        },
    )
