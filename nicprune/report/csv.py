"""CSV files of a report, which people open in spreadsheets."""

from __future__ import annotations

from typing import Any

import pandas as pd

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of a text that spreadsheets run as a formula (OWASP, "CSV injection")."""


def csv(frame: pd.DataFrame) -> str:
    """Return a table as CSV.

    An apostrophe stands before a text that a spreadsheet would run as a formula, such as a label
    `=1+1`; numbers, and all that records.json holds, stay as they are.
    """
    texts = frame.select_dtypes(exclude="number")
    return frame.assign(**texts.map(_as_text)).to_csv(index=False, lineterminator="\n")


def _as_text(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
