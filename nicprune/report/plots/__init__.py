"""Plots of a report, one file each.

May use `report.aggregate`, `report.columns` and what is below them.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
