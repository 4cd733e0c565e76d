"""Sparsity methods, one file each. Importing a file registers its method; nothing else names it.
May use `training` and what is below it.
"""

from __future__ import annotations

import importlib
import pkgutil

from nicprune.methods.composition import Attached, attach
from nicprune.methods.contract import METHODS, Method

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["METHODS", "Attached", "Method", "attach"]
