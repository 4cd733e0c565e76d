"""nicprune: make learned image codecs smaller and faster, for any CompressAI model.

    original = load_codec("bmshj2018-hyperprior", quality=3)
    masked = attach(copy.deepcopy(original), "mask_decay", budget={"macs": 0.5})
    fit(masked, train="photos/", steps=20_000, lmbda=0.0067)
    small = masked.harden()
    print(compare(original, small, images="kodak/"))
    save(small, "hyperprior-q3-2x.safetensors")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nicprune.budget import Budget as Budget
    from nicprune.cdf import fast_indexes as fast_indexes
    from nicprune.channels import Group as Group
    from nicprune.channels import Groups as Groups
    from nicprune.checkpoint import load as load
    from nicprune.checkpoint import load_codec as load_codec
    from nicprune.checkpoint import save as save
    from nicprune.codecs import provenance as provenance
    from nicprune.container import decode as decode
    from nicprune.container import encode as encode
    from nicprune.cost import CostModel as CostModel
    from nicprune.cost import measure as measure
    from nicprune.data import calibration_images as calibration_images
    from nicprune.errors import NicpruneError as NicpruneError
    from nicprune.evaluation import compare as compare
    from nicprune.evaluation import evaluate as evaluate
    from nicprune.methods import METHODS as METHODS
    from nicprune.methods import Attached as Attached
    from nicprune.methods import Method as Method
    from nicprune.methods import attach as attach
    from nicprune.recipe import read_recipe as read_recipe
    from nicprune.run import run_recipe as run_recipe
    from nicprune.surgery import analyse as analyse
    from nicprune.surgery import prune as prune
    from nicprune.training import fit as fit

__version__ = "0.1.0"

_HOME = {
    "Attached": "methods", "Budget": "budget", "CostModel": "cost", "Group": "channels", "Groups": "channels", "METHODS": "methods", "Method": "methods",
    "NicpruneError": "errors", "analyse": "surgery", "attach": "methods", "calibration_images": "data", "compare": "evaluation", "decode": "container",
    "encode": "container", "evaluate": "evaluation", "fast_indexes": "cdf", "fit": "training", "load": "checkpoint", "load_codec": "checkpoint",
    "measure": "cost", "provenance": "codecs", "prune": "surgery", "read_recipe": "recipe", "run_recipe": "run", "save": "checkpoint",
}  # fmt: skip
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `nicprune --help` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'nicprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nicprune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
