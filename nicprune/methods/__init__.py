"""Sparsity methods, one file each. Importing a file registers its method; nothing else names it."""

from __future__ import annotations

import importlib
import pkgutil

from nicprune.methods.attached import Attached, attach
from nicprune.methods.base import METHODS, Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Attached", "Method", "attach"]
