"""The interface of a form of adaptation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from nicprune.channels.groups import Groups
from nicprune.methods.adaptation.config import AdaptationConfig
from nicprune.pruning.cost import CostModel

Overrides = list[tuple[Any, Mapping[str, Any]]]
"""Attributes that stand in front of modules' own; see `override_attributes`."""


class Form(nn.Module):
    """One way to adapt a codec. What it learns is in parameters of its own, or of the codec.

    Attributes:
        stays: whether the codec stays as it is, and what was learnt beside it.
    """

    stays: ClassVar[bool] = True

    def __init__(self, codec: nn.Module, groups: Groups, cost: CostModel, config: AdaptationConfig):
        super().__init__()
        self.config = config
        # Through a tuple, so that the codec does not become a sub-module of the form.
        self._shared = (codec, groups, cost)
        self.build()

    @property
    def codec(self) -> Any:
        """The source codec."""
        return self._shared[0]

    @property
    def groups(self) -> Groups:
        """Its channel groups."""
        return self._shared[1]

    @property
    def cost(self) -> CostModel:
        """Its cost."""
        return self._shared[2]

    def build(self) -> None:
        """Create the parameters.

        Raises:
            CodecError, RecipeError: the codec cannot be adapted in this way; the codec is left as
                it was.
        """

    def trains(self, name: str) -> bool:
        """Return whether a parameter of the codec, given by name, is trained."""
        return not self.stays

    def overrides(self, codec: Any) -> Overrides:
        """Return what the codec computes with in the target domain, instead of its own."""
        return []

    def prunable(self) -> tuple[nn.Module, Groups, CostModel] | None:
        """Return the new layers that pruners beside it may narrow, their channel groups, and what
        the target domain costs by them; None if there are none.
        """
        return None

    def aux_loss(self) -> Tensor | None:
        """Return the auxiliary loss of entropy bottlenecks of its own."""
        return None

    def update(self, force: bool) -> None:
        """Update CDF tables of its own."""
