"""Numbers for channels: which tensors carry them, and which of them belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nicprune.channels.widths import Width


@dataclass
class ChannelIds:
    """Channel numbers of one tensor: `ids` along dimension `dim`; `nonzero` names what makes a zero
    channel not zero.
    """

    dim: int
    ids: np.ndarray
    nonzero: str | None = None


@dataclass
class Product:
    """A matrix product without parameters, as in attention.

    Attributes:
        module: where it runs.
        macs: its multiply-adds.
        ids: the channel numbers along each of its dimensions that shrinks.
    """

    module: str
    macs: int
    ids: tuple[np.ndarray, ...]


@dataclass
class WidthTie:
    """Channels along a dimension whose size code computes from the width of other channels.

    Attributes:
        ids: the channel numbers along the dimension.
        width: the size that was asked for.
        outer: whether parts of the same channels lie in later dimensions, as (c // 8, 8) has.
        where: the module that asked for it.
    """

    ids: np.ndarray
    width: Width
    outer: bool
    where: str


class ChannelNumbers(TorchFunctionMode):
    """Gives out channel numbers and keeps them attached to tensors."""

    def __init__(self, root: str):
        super().__init__()
        self.unprunable: dict[int, str] = {}
        self.products: list[Product] = []
        self._parent: list[int] = []
        self._labels: dict[int, tuple[Tensor, ChannelIds]] = {}
        self.ties: list[WidthTie] = []
        self.mixed: set[str] = set()
        self.whole_heads: set[str] = set()
        self.over_channels: dict[str, str] = {}
        self.computed: dict[str, str] = {}
        self._misused: dict[str, str] = {}
        self._owner: dict[int, str] = {}
        self._parameters: dict[int, str] = {}
        self._depth = 0
        self._stack: list[str] = [root]

    def new(self, count: int) -> np.ndarray:
        """Give out `count` new channel numbers."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, number: int) -> int:
        """Return the representative of all numbers coupled to `number`."""
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def couple(self, first: np.ndarray, second: np.ndarray) -> None:
        """Couple two sequences of channels, one to one."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            a, b = self.root(a), self.root(b)
            if a != b:
                self._parent[max(a, b)] = min(a, b)

    def resolve_ties(self) -> None:
        """Couple channels that have to stay as many as others, or a part or multiple of them, so
        that the sizes that code computes fit: all heads narrow with the width that they are cut
        from.
        """
        for tie in sorted(self.ties, key=lambda tie: tie.width.scale != 1):
            few, many, scale = tie.ids, tie.width.ids, tie.width.scale
            if scale > 1:
                few, many, scale = many, few, 1 / scale
            times = scale.denominator
            if scale.numerator != 1 or len(many) != times * len(few):
                self.mark_unprunable(tie.ids, f"a size in {tie.where} is computed from their width")
                self.mark_unprunable(tie.width.ids, f"{tie.where} computes a size from their width")
                continue
            units, members = (
                [self.root(i) for i in few.tolist()],
                [self.root(i) for i in many.tolist()],
            )
            if len(set(units)) == len(units) and all(members.count(u) == times for u in units):
                continue
            parts = many.reshape(len(few), times).T if tie.outer else many.reshape(times, -1)
            for part in parts:
                self.couple(few, part)

    def mark_unprunable(self, ids: np.ndarray, reason: str) -> None:
        """Never remove these channels."""
        for number in ids.tolist():
            self.unprunable.setdefault(number, reason)

    def labels(self, tensor: Any) -> ChannelIds | None:
        """Return the channel numbers of a tensor, None for a constant."""
        entry = self._labels.get(id(tensor))
        return entry[1] if entry is not None else None

    def label(self, tensor: Tensor, labels: ChannelIds) -> None:
        """Attach channel numbers; the tensor is kept alive so that its id stays its own."""
        if labels.dim >= tensor.dim() or tensor.shape[labels.dim] != len(labels.ids):
            self.mark_unprunable(labels.ids, f"channels are lost track of in {self.where}")
            self._labels.pop(id(tensor), None)
            return
        self._labels[id(tensor)] = (tensor, labels)

    @property
    def where(self) -> str:
        """Name of the module that runs now."""
        return self._stack[-1]

    def _own(self, labels: ChannelIds) -> bool:
        """Return whether these are numbers of a module's parameters alone: per channel or not."""
        return all(number in self._parameters for number in labels.ids.tolist())

    def _unknown(self, name: str, tensors: Sequence[Any]) -> None:
        for tensor in tensors:
            labels = self.labels(tensor)
            if labels is not None:
                why = f"{name} in {self.where} is not understood"
                if self.where in self.computed:
                    why += f": {self.computed[self.where]}"
                self.mark_unprunable(labels.ids, why)
