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
    from nicprune.channels.groups import Group as Group
    from nicprune.channels.groups import Groups as Groups
    from nicprune.codecs.fast_coding import fast_indexes as fast_indexes
    from nicprune.codecs.provenance import provenance as provenance
    from nicprune.common.errors import NicpruneError as NicpruneError
    from nicprune.data.images import calibration_images as calibration_images
    from nicprune.evaluation.evaluate import compare as compare
    from nicprune.evaluation.evaluate import evaluate as evaluate
    from nicprune.experiments.recipe_files import read_recipe as read_recipe
    from nicprune.experiments.run import run_recipe as run_recipe
    from nicprune.methods import METHODS as METHODS
    from nicprune.methods import Attached as Attached
    from nicprune.methods import Method as Method
    from nicprune.methods import attach as attach
    from nicprune.methods.video.coder import video_coder as video_coder
    from nicprune.pruning.budget import Budget as Budget
    from nicprune.pruning.cost import CostModel as CostModel
    from nicprune.pruning.cost import measure as measure
    from nicprune.pruning.surgery import analyse as analyse
    from nicprune.pruning.surgery import prune as prune
    from nicprune.runtime.accelerate import accelerate as accelerate
    from nicprune.runtime.latency import measure_latency as measure_latency
    from nicprune.runtime.latency_refinement import refine_latency as refine_latency
    from nicprune.storage.adaptation import load_adaptation as load_adaptation
    from nicprune.storage.adaptation import save_adaptation as save_adaptation
    from nicprune.storage.checkpoint import check_savable as check_savable
    from nicprune.storage.checkpoint import load as load
    from nicprune.storage.checkpoint import save as save
    from nicprune.storage.container import decode as decode
    from nicprune.storage.container import encode as encode
    from nicprune.storage.named import load_codec as load_codec
    from nicprune.training.loop import fit as fit

__version__ = "0.1.0"

_HOME = {
    "Attached": "methods",
    "Budget": "pruning.budget",
    "CostModel": "pruning.cost",
    "Group": "channels.groups",
    "Groups": "channels.groups",
    "METHODS": "methods",
    "Method": "methods",
    "NicpruneError": "common.errors",
    "accelerate": "runtime.accelerate",
    "analyse": "pruning.surgery",
    "attach": "methods",
    "calibration_images": "data.images",
    "check_savable": "storage.checkpoint",
    "compare": "evaluation.evaluate",
    "decode": "storage.container",
    "encode": "storage.container",
    "evaluate": "evaluation.evaluate",
    "fast_indexes": "codecs.fast_coding",
    "fit": "training.loop",
    "load": "storage.checkpoint",
    "load_adaptation": "storage.adaptation",
    "load_codec": "storage.named",
    "measure": "pruning.cost",
    "measure_latency": "runtime.latency",
    "provenance": "codecs.provenance",
    "prune": "pruning.surgery",
    "read_recipe": "experiments.recipe_files",
    "refine_latency": "runtime.latency_refinement",
    "run_recipe": "experiments.run",
    "save": "storage.checkpoint",
    "video_coder": "methods.video.coder",
    "save_adaptation": "storage.adaptation",
}
"""The module, below this package, of each public name."""

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `nicprune --help` does not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'nicprune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nicprune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
