"""The full table: one row for each record, every column; the content of table.csv."""

from __future__ import annotations

import pandas as pd

from nicprune.report.columns import columns_of, values_of
from nicprune.report.matching import Records, as_records, none_first
from nicprune.report.record import ROLES

WHOLE = ("quality", "file_bytes", "width", "encode_peak_bytes", "decode_peak_bytes")
"""Columns of whole numbers that may have blanks, which pandas would turn into floats."""


def table(records: Records) -> pd.DataFrame:
    """Return one row for each record, sorted by codec, quality, role and label.

    Rates between qualities come last. `nicprune.report.columns` defines the columns; figures
    against the original are NaN where there is none.
    """
    ready = as_records(records)
    ordered = sorted(
        ready,
        key=lambda r: (
            r.codec,
            r.between(),
            none_first(r.quality),
            ROLES.index(r.role),
            r.label,
        ),
    )
    columns = columns_of(ready)
    frame = pd.DataFrame([values_of(record, ready) for record in ordered], columns=columns)
    return frame.astype({name: "Int64" for name in WHOLE if name in columns})
