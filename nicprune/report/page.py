"""The page of a report: one HTML file that needs no other."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nicprune.report import adaptations, mac_spread, scratch_gap
from nicprune.report.aggregate import Row, by_setup
from nicprune.report.bd_rate import RATES
from nicprune.report.columns import column_of, columns_of
from nicprune.report.compact_table import footnote
from nicprune.report.crops import Crops, media_type
from nicprune.report.experimental_setup import Setup
from nicprune.report.file_sizes import file_sizes, format_bytes
from nicprune.report.headline import headline
from nicprune.report.matching import arms
from nicprune.report.plots.figure import DPI
from nicprune.report.plots.plot import Plot
from nicprune.report.record import Record
from nicprune.report.templates import template
from nicprune.report.transforms import transforms

MAX_CROP_IMAGES = 4
"""Test images whose crops are on the page; the folder crops/ has all of them."""
MAX_PICTURES = 100
"""Crops on a page with several test images: a page of many codecs shows fewer images and stays
small enough to be sent.
"""
FACTS = ("date", "machine", "device", "threads", "counter", "seed", "steps", "lmbda")
"""Circumstances of the records that the page lists."""


@dataclass(frozen=True)
class DrawnPlot:
    """A plot and its pictures.

    Attributes:
        plot: the plot.
        light, dark: PNG files for light and dark pages; None where there is nothing to show.
    """

    plot: Plot
    light: bytes | None
    dark: bytes | None


def render_page(
    title: str,
    records: Sequence[Record],
    rows: Sequence[Row],
    bd: pd.DataFrame,
    plots: Sequence[DrawnPlot],
    crops: Crops,
    cautions: Sequence[str],
) -> str:
    """Return the HTML of a report's page.

    Args:
        title: heading of the page.
        records: records of the report.
        rows: their rows, rates between qualities included.
        bd: BD-rates, from `bd_table`.
        plots: plots in their order on the page.
        crops: crops of the records.
        cautions: sentences above the first table.
    """
    tables = by_setup([row for row in rows if not row.between()])
    return template("template.html.j2").render(
        title=title,
        sections=[_section(setup, group, records, crops) for setup, group in tables.items()],
        cautions=cautions,
        max_crops=MAX_CROP_IMAGES,
        recipes={
            (r.recipe, r.recipe_sha256): r.recipe_text for r in records if r.recipe or r.recipe_text
        },
        packages=_packages(records),
        finite=math.isfinite,
        column=column_of,
        columns=[column_of(name) for name in columns_of(records)],
        bd=bd.astype(object).where(bd.notna(), None).to_dict("records"),
        plots=[_plot(drawn, rows) for drawn in plots if drawn.light and drawn.dark],
        format_bytes=format_bytes,
        gap_headers=scratch_gap.headers(),
        gap_note=scratch_gap.NOTE,
        adaptation_headers=adaptations.headers(),
        adaptation_note=adaptations.NOTE,
        rates=RATES,
        skipping_note=mac_spread.NOTE,
        modulated=any(r.role == "modulated" and r.width is None for r in records),
        slimmable=any(r.width is not None for r in records),
        facts={name: _values(name, records) for name in FACTS},
    )


def _section(
    setup: Setup, group: Sequence[Row], records: Sequence[Record], crops: Crops
) -> dict[str, Any]:
    """Return the tables and crops of one setup."""
    spreads = mac_spread.mac_spreads(group)
    with_crops = zip(records, arms(records), crops.of_records, strict=True)
    return {
        "name": str(setup),
        "headline": headline(group),
        "rows": group,
        "speedups": any(
            row.role != "original" and math.isfinite(row.mean["decode_speedup"]) for row in group
        ),
        "note": footnote(group).replace("+-", "±"),
        "transforms": transforms(group),
        "per_image": spreads,
        "timed": mac_spread.timed_images(spreads),
        "storage": file_sizes(group),
        "gaps": scratch_gap.scratch_gaps(group),
        "adaptations": adaptations.adaptations(group),
        "slimmable": [row for row in group if row.members[0].width is not None],
        "count": len(setup.images),
        "crops": _pictures([item for item in with_crops if item[0].setup() == setup], crops.files),
    }


def _plot(drawn: DrawnPlot, rows: Sequence[Row]) -> dict[str, Any]:
    light, dark = drawn.light or b"", drawn.dark or b""
    return {
        "heading": drawn.plot.heading,
        "alt": drawn.plot.alt,
        "caption": drawn.plot.caption(rows),
        "light": data_uri(light),
        "dark": data_uri(dark),
        "width": css_width(light),
    }


def _values(name: str, records: Sequence[Record]) -> list[str]:
    """Return the different values of a field."""
    found = [v for record in records if (v := getattr(record, name)) is not None]
    return sorted({str(float(f"{v:.4g}") if name == "lmbda" else v) for v in found})


def _packages(records: Sequence[Record]) -> dict[str, set[str]]:
    """Return the versions of each package."""
    packages: dict[str, set[str]] = {}
    for record in records:
        for name, version in record.versions.items():
            packages.setdefault(name, set()).add(version)
    return packages


def css_width(png: bytes) -> int:
    """Return the width of a plot in CSS pixels; plots have one scale, so that texts are alike."""
    return round(int.from_bytes(png[16:20], "big") * 105 / DPI)


def data_uri(content: bytes) -> str:
    """Return a picture as the text of a link."""
    encoded = base64.b64encode(content).decode()
    return f"data:{media_type(content) or 'image/png'};base64,{encoded}"


def _pictures(
    records: Sequence[tuple[Record, str, list[dict[str, Any]]]], files: Mapping[str, bytes]
) -> list[dict[str, Any]]:
    """Return crops by image and quality: the original image, then each arm's first seed."""
    names = list(dict.fromkeys(crop["image"] for _, _, crops in records for crop in crops))
    shown: list[dict[str, Any]] = []
    for number, name in enumerate(names[:MAX_CROP_IMAGES], 1):
        each = sum(len(row["figures"]) for row in shown) // max(1, number - 1)
        if number > 1 and number * each > MAX_PICTURES:
            break
        for quality in dict.fromkeys(record.quality for record, _, _ in records):
            figures: dict[str, dict[str, Any]] = {}
            for record, arm, crops in records:
                for crop in crops:
                    if crop["image"] == name and record.quality == quality:
                        figures.setdefault(
                            "original image",
                            {
                                "uri": data_uri(files[crop["original"]]),
                                "title": "original image",
                                "figures": "uncompressed",
                            },
                        )
                        figures.setdefault(
                            f"{record.role} {arm}",
                            {
                                "uri": data_uri(files[crop["decoded"]]),
                                "title": _crop_title(record, arm),
                                "figures": _crop_figures(crop),
                            },
                        )
            if figures:
                shown.append({"image": name, "quality": quality, "figures": list(figures.values())})
    return shown


def _crop_title(record: Record, arm: str) -> str:
    role = {"original": "original codec", "control": "control"}.get(record.role, "")
    return ": ".join(dict.fromkeys(filter(None, (role, "" if arm == record.role else arm))))


def _crop_figures(crop: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{crop[name]:{form}} {column_of(name).unit}"
        for name, form in (("bpp", ".3f"), ("psnr_db", ".2f"))
        if crop.get(name) is not None
    )
