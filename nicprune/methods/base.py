"""What a method is.

To add one: a file in this folder with a class decorated by `@METHODS.register("name")`, and a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from nicprune.channels import Groups
from nicprune.cost import CostModel
from nicprune.levels import Levels
from nicprune.registry import Registry
from nicprune.settings import Settings


class Method(nn.Module):
    """One sparsity technique. Every hook does nothing by default, so methods compose in a list.

    Learnt state is parameters and buffers of this module, so `state_dict`, `.to(device)` and DDP know it.

    Attributes:
        name: what recipes call it (set by registration's name).
        summary: one line for listings.
        Config: its settings; unknown keys are refused.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    Config: ClassVar[type[Settings]] = Settings
    narrows: ClassVar[bool] = False
    """Whether its hooks hand layers fewer channels; they come last then."""
    modulates: ClassVar[bool] = False
    """Whether it makes one codec code at many rates; it has `levels` then."""
    levels: Levels | None = None

    def __init__(self, codec: nn.Module, groups: Groups, cost: CostModel, config: Settings):
        super().__init__()
        self.config = config
        # Through a tuple, so that the codec does not become a sub-module of its own method.
        self._shared = (codec, groups, cost)
        self.validate()

    @property
    def groups(self) -> Groups:
        """The codec's channel groups."""
        return self._shared[1]

    @property
    def cost(self) -> CostModel:
        """The codec's cost."""
        return self._shared[2]

    def validate(self) -> None:
        """Refuse a configuration that this codec cannot follow, before anything is changed."""

    def attach(self, codec: nn.Module) -> None:
        """Put hooks on the codec. The forward pass must stay the same, exactly."""

    def detach(self, codec: nn.Module) -> None:
        """Take every hook of this method off the codec again."""

    def loss(self, out: Mapping[str, Any], x: Tensor) -> Tensor:
        """Extra terms of the loss, a scalar."""
        return x.new_zeros(())

    def after_step(self) -> None:
        """Called behind every `optimizer.step()`."""

    @property
    def done(self) -> bool:
        """Whether the method has nothing left to learn."""
        return True

    @property
    def steps_left(self) -> int:
        """How many more steps it needs until it is done."""
        return 0

    def figures(self) -> dict[str, float]:
        """Numbers for the progress line and metrics.jsonl."""
        return {}

    def self_updated(self) -> list[nn.Parameter]:
        """Parameters that `after_step` moves by itself; the optimiser leaves them alone."""
        return []

    def keep(self) -> dict[str, list[int]]:
        """The keep-lists decided so far, by group; groups not named keep everything."""
        return {}

    def fold(self, codec: nn.Module) -> None:
        """Write what was learnt into the weights of `codec` (a copy without hooks), in place."""

    def check_hardenable(self) -> None:
        """Raise if the decision is not made yet."""

    # Methods that are part of the codec when it codes: gates, modulators.

    @property
    def stays(self) -> bool:
        """Whether it remains on the codec behind `harden`, and is saved with it."""
        return False

    def carry(self, other: Method, keep: Mapping[str, Sequence[int]]) -> None:
        """Hand what was learnt to `other`, the same method on the codec pruned to these keep-lists."""

    def factors_folded(self, codec: nn.Module) -> dict[tuple[str, str], Tensor]:
        """What `fold` moves into weights: factors of shape (C,) by module name and side, "in" or "out"."""
        return {}

    def absorb(self, layer: str, side: str, factor: Tensor) -> None:
        """Learn that another method's factor at a layer's input or output is in the weights from now on."""

    def calibrate(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        """Settle on whole images, (1, 3, H, W) each, what was learnt on patches."""

    def image_cost(self) -> tuple[dict[str, float], dict[str, float]] | None:
        """What the last image cost: "macs", "encoder", "decoder" at 64x64, and MACs by transform; None if it costs what all do."""
        return None

    def objective(self, out: Mapping[str, Any], x: Tensor, metric: str) -> dict[str, Tensor] | None:
        """The rate-distortion loss in place of the loop's own, with its parts, as CompressAI names them; None to leave it."""
        return None


METHODS: Registry[type[Method]] = Registry("method")


def kept_channels(groups: Groups, keep: Mapping[str, Sequence[int]], module: str, axis: str, width: int) -> np.ndarray:
    """Which of a layer's channels along an axis ("out", "in", "both") stay under keep-lists, increasing."""
    gone = np.zeros(width, bool)
    for name, kept in keep.items():
        for member in groups[name].members:
            if member.module == module and member.axis == axis:
                gone[member.index[np.setdiff1d(np.arange(groups[name].width), kept)].ravel()] = True
    return np.flatnonzero(~gone)
