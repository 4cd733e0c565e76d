"""Numbers for channels: which tensors carry them, and which of them belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.overrides import TorchFunctionMode


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


class ChannelNumbers(TorchFunctionMode):
    """Gives out channel numbers and keeps them attached to tensors."""

    def __init__(self, root: str):
        super().__init__()
        self.unprunable: dict[int, str] = {}
        self.products: list[Product] = []
        self._parent: list[int] = []
        self._labels: dict[int, tuple[Tensor, ChannelIds]] = {}
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

    def _unknown(self, name: str, tensors: Sequence[Any]) -> None:
        for tensor in tensors:
            labels = self.labels(tensor)
            if labels is not None:
                self.mark_unprunable(labels.ids, f"{name} in {self.where} is not understood")
