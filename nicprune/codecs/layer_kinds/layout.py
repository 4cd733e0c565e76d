"""Places of a layer's own channels, and of new ones, where a codec has grown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Layout:
    """Places of own and new channels along one axis of a layer.

    Own channels keep their order, and so do new ones; between each other they stand as what reads
    the axis takes them: scales and means that a codec splits in halves are `old scales, new scales,
    old means, new means`.

    Args:
        runs: (whether they are new, how many) of each run of channels, in order.

    Attributes:
        width: all channels.
        added: new channels.
    """

    def __init__(self, runs: Sequence[tuple[bool, int]]):
        self.runs = tuple((new, count) for new, count in runs if count)
        self.width = sum(count for _, count in self.runs)
        self.added = sum(count for new, count in self.runs if new)

    def old(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return a layer's own channels of a tensor that has all, along a dimension."""
        return self._taken(x, dim, False)

    def new(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return the new channels of a tensor that has all, along a dimension."""
        return self._taken(x, dim, True)

    def _taken(self, x: Tensor, dim: int, wanted: bool) -> Tensor:
        parts, start = [], 0
        for new, count in self.runs:
            if new == wanted:
                parts.append(x.narrow(dim, start, count))
            start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, old: Tensor, new: Tensor, dim: int = 1) -> Tensor:
        """Return own and new channels in the order of the axis."""
        parts, starts = [], {False: 0, True: 0}
        for is_new, count in self.runs:
            source = new if is_new else old
            parts.append(source.narrow(dim, starts[is_new], count))
            starts[is_new] += count
        return torch.cat(parts, dim)
