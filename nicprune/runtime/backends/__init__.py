"""Backends that run a transform: one file each. Importing a file registers its backend; nothing
else names it. May use `storage` and what is below it.
"""

from __future__ import annotations

import importlib
import pkgutil

from nicprune.runtime.backends.backend import BACKENDS, PRECISIONS, Backend, Function

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["BACKENDS", "PRECISIONS", "Backend", "Function"]
