"""The columns of table.csv, in their order, and the values that a record has in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nicprune.report.column import Column
from nicprune.report.derived import Derived, derive, number_or_nan
from nicprune.report.record import Record
from nicprune.report.record_parts import Cost

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
"""Columns that every table has."""

OPTIONAL_COLUMNS = {
    ("level", "kmac_per_pixel_min", "kmac_per_pixel_max", "file_bytes"): (
        "level",
        "dynamic",
        "skipping",
        "file_bytes",
    ),
    ("width",): ("width",),
    ("encode_peak_bytes", "decode_peak_bytes"): ("encode_peak_bytes", "decode_peak_bytes"),
    ("busy",): ("busy",),
    (
        "cost_change_pct",
        "source_test",
        "source_bpp",
        "source_psnr_db",
        "forgetting_pct",
        "old_files",
        "train_images",
    ): ("source",),
}
"""Columns behind these, if any record has one of the fields on the right."""

NUMERIC = COLUMNS[COLUMNS.index("macs") : COLUMNS.index("seed")]
"""Columns that are averaged over seeds."""

FIGURES = ("bpp", "bpp_estimated", "psnr_db", "ms_ssim", "encode_s", "decode_s")
"""Columns of measured figures: NaN, not None, where one is missing."""


def column_of(name: str) -> Column:
    """Return a column: its title, unit, header and definition."""
    for model in (Derived, Cost):
        if name in model.model_fields:
            return Column.of(model, name)
    return Column.of(Record, name)


def columns_of(records: Sequence[Record]) -> list[str]:
    """Return the columns of the table of these records."""
    held = {name for record in records for name in record.model_fields_set}
    later = [names for names, fields in OPTIONAL_COLUMNS.items() if held & set(fields)]
    return [*COLUMNS, *(name for names in later for name in names)]


def values_of(record: Record, records: Sequence[Record]) -> dict[str, Any]:
    """Return the value of a record in every column, against its original among `records`.

    Missing numbers are NaN.
    """
    values: dict[str, Any] = dict(record) | dict(record.cost) | dict(derive(record, records))
    names = [*COLUMNS, *(name for names in OPTIONAL_COLUMNS for name in names)]
    return {
        name: number_or_nan(values[name]) if name in FIGURES else values[name] for name in names
    }
