"""Records of evaluated codecs to tables, BD-rates, plots and one self-contained page. May use
`storage` and what is below it.

records = collect(["runs/quickstart"])
print(text_table(records))
write_report(records, "reports/quickstart")
"""

from __future__ import annotations

from nicprune.report.bd_rate import bd_table
from nicprune.report.page import write_report
from nicprune.report.records import Record, collect
from nicprune.report.table import table, text_table

__all__ = ["Record", "bd_table", "collect", "table", "text_table", "write_report"]
