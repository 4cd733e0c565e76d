"""Sparsity methods, one file each. Importing a file registers its method; nothing else names it.
May use `training` and what is below it.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from importlib import metadata

from nicprune.methods.attaching import attach
from nicprune.methods.composition import Attached
from nicprune.methods.contract import (
    METHODS,
    CodecPart,
    Distiller,
    Gating,
    Method,
    MultiWidth,
    Pruner,
    RateModulator,
)

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

PLUGINS = "nicprune.methods"
"""Group of entry points by which other packages bring methods of their own."""


def load_plugins() -> None:
    """Import the methods of other packages. One that cannot be imported is warned of by name."""
    for entry in metadata.entry_points(group=PLUGINS):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(
                f"the method {entry.name!r} of {entry.value} is left out: {type(error).__name__}:"
                f" {error}",
                stacklevel=2,
            )


load_plugins()

__all__ = [
    "METHODS",
    "Attached",
    "CodecPart",
    "Distiller",
    "Gating",
    "Method",
    "MultiWidth",
    "Pruner",
    "RateModulator",
    "attach",
]
