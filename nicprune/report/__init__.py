"""Turn records of evaluated codecs into tables, BD-rates, plots and one self-contained page.

May use `storage` and what is below it.

records = collect(["runs/quickstart"])
print(text_table(records))
write_report(records, "reports/quickstart")
"""

from __future__ import annotations

from nicprune.report.bd_rate import bd_table
from nicprune.report.data_frame import table
from nicprune.report.folder import write_report
from nicprune.report.record import Record
from nicprune.report.record_files import collect
from nicprune.report.terminal import text_table

__all__ = ["Record", "bd_table", "collect", "table", "text_table", "write_report"]
