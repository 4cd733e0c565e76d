"""Movements of channels: views, slices, concatenations, shuffles and assignments run on tensors of
numbers, which show where channels went.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nicprune.channels.numbers import ChannelIds, ChannelNumbers, WidthTie
from nicprune.channels.ops import KEEPS_ZERO, breaks_zero, flatten, map_leaves
from nicprune.channels.widths import Width

SPLITS = ("view", "reshape", "unflatten", "stack", "view_as", "reshape_as", "flatten")
"""Movements that may spread channels over several dimensions."""


def _spread(values: np.ndarray, dim: int, like: Tensor) -> Tensor:
    """Return values along one dimension, the same along all others, in the shape of a tensor."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return torch.from_numpy(values.copy()).view(shape).expand(like.shape).contiguous()


def _shuffled(x: Tensor, groups: int) -> Tensor:
    """Shuffle numbers as `F.channel_shuffle` shuffles channels."""
    parts = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    return parts.transpose(1, 2).reshape(x.shape)


def _asked_sizes(name: str, args: Any, kwargs: Any, output: Tensor) -> dict[int, Any]:
    """Return the sizes that a tensor is reshaped to, by dimension, as the code gives them."""
    sizes = flatten(args[1:]) or flatten(kwargs.get("shape", kwargs.get("size", ())))
    first = 0
    if name == "unflatten":
        sizes = flatten(kwargs.get("sizes", args[2] if len(args) > 2 else ()))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        first = dim % (output.dim() - len(sizes) + 1)
    elif name not in ("view", "reshape") or len(sizes) != output.dim():
        return {}
    return {first + d: n for d, n in enumerate(sizes)}


def _derived_dims(name: str, args: Any, kwargs: Any, output: Tensor) -> list[int]:
    """Return the dimensions of a reshaped tensor whose size is computed from a width, or left to
    torch.
    """
    return [
        d
        for d, n in _asked_sizes(name, args, kwargs, output).items()
        if isinstance(n, Width) or isinstance(n, int) and n == -1
    ]


class Movements(ChannelNumbers):
    """Follows channels through movements of data."""

    def _written(self, name: str, target: Tensor) -> None:
        """Mark channels unprunable that another view of a written tensor shows: their numbers no
        longer say what they hold.
        """
        if name in KEEPS_ZERO and not breaks_zero(name, (target,), {}):
            return
        storage = target.untyped_storage().data_ptr()
        for tensor, labels in list(self._labels.values()):
            if (
                tensor is not target
                and tensor.numel()
                and tensor.untyped_storage().data_ptr() == storage
            ):
                self.mark_unprunable(labels.ids, f"{name} in {self.where} writes to a part of them")

    def _numbers(self, tensor: Any) -> Any:
        """Return a tensor of channel numbers of the same shape, -1 where there are none."""
        if not isinstance(tensor, Tensor):
            return tensor
        labels = self.labels(tensor)
        if labels is None:
            return (
                tensor
                if tensor.dtype in (torch.int64, torch.int32, torch.bool)
                else torch.full(tensor.shape, -1, dtype=torch.int64)
            )
        return _spread(labels.ids, labels.dim, tensor)

    def _move(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        name: str,
        tensors: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        """Run a data movement on the places of channels; read off where they went."""
        table: list[int] = []

        def places(value: Any) -> Any:
            labels = self.labels(value) if isinstance(value, Tensor) else None
            if labels is None:
                return self._numbers(value)
            table.extend(labels.ids.tolist())
            first = len(table) - len(labels.ids)
            return _spread(np.arange(first, len(table)), labels.dim, value)

        try:
            if name == "getitem":
                # The index may hold tensors of its own, which are positions and not channels.
                if not self._couple_slices(args[0], args[1]):
                    self._unknown(name, tensors)
                    return
                result = func(places(args[0]), args[1])
            elif name.endswith("channel_shuffle"):
                count = kwargs.get("groups", args[1] if len(args) > 1 else 1)
                result = _shuffled(places(args[0]), int(count))
                self._couple_parts(tensors[0], int(count))
            else:
                result = func(*map_leaves(places, args), **map_leaves(places, kwargs))
            moved = [t for t in flatten(result) if isinstance(t, Tensor)]
        except (RuntimeError, TypeError):
            self._unknown(name, tensors)
            return
        nonzero = next(
            (
                labels.nonzero
                for labels in map(self.labels, tensors)
                if labels is not None and labels.nonzero
            ),
            None,
        )
        ids = np.array([*table, -1])  # a place of -1 reads the last
        by_width = any(isinstance(v, Width) for v in flatten(args[1:]) + flatten(kwargs))
        if name in ("chunk", "tensor_split", "roll", "hsplit") or name == "split" and by_width:
            self._check_parts(name, tensors, [torch.from_numpy(ids[m.numpy()]) for m in moved])
        derived = _derived_dims(name, args, kwargs, outputs[0])
        for output, where in zip(outputs, moved, strict=True):
            self._read_off(output, where, ids, nonzero, tensors, name, derived)
        if name in SPLITS:
            self._tie_sizes(name, args, kwargs, outputs[0], moved[0])

    def _tie_sizes(self, name: str, args: Any, kwargs: Any, output: Tensor, where: Tensor) -> None:
        """Note where a reshaped tensor has as many channels as others, by a size computed from
        their width.
        """
        labels = self.labels(output)
        if labels is None:
            return
        size: Any = None
        if name in ("view_as", "reshape_as"):
            other = self.labels(args[1] if len(args) > 1 else kwargs.get("other"))
            if other is not None and other.dim == labels.dim:
                size = Width(len(other.ids), other.ids)
        else:
            size = _asked_sizes(name, args, kwargs, output).get(labels.dim)
        if isinstance(size, Width):
            later = range(labels.dim + 1, where.dim())
            outer = any(bool((where != where.narrow(d, 0, 1)).any()) for d in later)
            self.ties.append(WidthTie(labels.ids, size, outer, self.where))

    def _couple_slices(self, tensor: Tensor, index: Any) -> bool:
        """Couple what has to stay equally wide, so that a slice by half the width, or of every
        n-th channel, takes the same channels after pruning. Return False for other slices that
        follow the width.
        """
        labels = self.labels(tensor)
        if labels is None:
            return True
        entries = list(index) if isinstance(index, tuple) else [index]
        spelled = sum(
            e.dim() if isinstance(e, Tensor) and e.dtype == torch.bool else 1
            for e in entries
            if e is not None and e is not Ellipsis
        )
        dim, entry = 0, None
        for candidate in entries:
            if candidate is None:
                continue
            if candidate is Ellipsis:
                dim += tensor.dim() - spelled
                continue
            if dim == labels.dim:
                entry = candidate
                break
            dim += 1
        if not isinstance(entry, slice):
            return True
        for bound in (entry.start, entry.stop):
            if isinstance(bound, Width):
                same = len(bound.ids) == len(labels.ids) and all(
                    self.root(a) == self.root(b)
                    for a, b in zip(bound.ids.tolist(), labels.ids.tolist(), strict=True)
                )
                if not same or not self._couple_parts(tensor, bound.scale.denominator):
                    return False
        step = entry.step or 1
        if step > 1:
            if len(labels.ids) % step or (entry.start or 0) >= step:
                return False
            blocks = labels.ids.reshape(-1, step)
            for column in blocks.T[1:]:
                self.couple(blocks[:, 0], column)
        return True

    def _couple_parts(self, tensor: Tensor, count: int) -> bool:
        """Couple the channels at the same place of each of `count` equal parts."""
        labels = self.labels(tensor)
        if labels is None or len(labels.ids) % count:
            return False
        parts = labels.ids.reshape(count, -1)
        for part in parts[1:]:
            self.couple(parts[0], part)
        return True

    def _check_parts(self, name: str, tensors: Sequence[Tensor], moved: Sequence[Tensor]) -> None:
        """Couple the parts of a tensor's channels: they keep their borders only if they stay
        equally wide. A roll has no such border.
        """
        labels = self.labels(tensors[0])
        if (
            labels is None
            or len(moved) != 1
            and all(part.shape[labels.dim] == len(labels.ids) for part in moved)
        ):
            return
        rows = [
            part.movedim(labels.dim, 0).reshape(part.shape[labels.dim], -1)[:, 0].numpy()
            for part in moved
        ]
        if len(moved) == 1 and np.array_equal(rows[0], labels.ids):
            return
        if len(moved) == 1 or len({len(row) for row in rows}) > 1:
            self._unknown(name, tensors)
        else:
            for row in rows[1:]:
                self.couple(rows[0], row)

    def _read_off(
        self,
        output: Tensor,
        where: Tensor,
        table: np.ndarray,
        nonzero: str | None,
        tensors: Sequence[Tensor],
        name: str,
        derived: Sequence[int],
    ) -> None:
        """Label an output by the places that its channels came from, -1 for those of constants."""
        if where.numel() == 0 or int(where.max()) < 0:
            return
        if where.dim() == 0:
            self.mark_unprunable(
                table[where.reshape(1).numpy()], f"one of them is taken in {self.where}"
            )
            return
        for dim in [1, *(d for d in range(where.dim()) if d != 1)] if where.dim() > 1 else [0]:
            rows = where.movedim(dim, 0).reshape(where.shape[dim], -1)
            if bool((rows == rows[:, :1]).all()):
                break
        else:
            # Several channels meet in one: they live or die together.
            dim = min(1, where.dim() - 1)
            if name in SPLITS:
                dim = self._unit_dim(where, table, derived)
            rows = where.movedim(dim, 0).reshape(where.shape[dim], -1)
            if name not in SPLITS and name != "pixel_shuffle":
                self._unknown(name, tensors)
                return
        ids = []
        for row in rows.numpy():
            found = np.unique(table[row[row >= 0]])
            if not len(found):  # channels of a constant, concatenated: they must stay
                found = self.new(1)
                self.mark_unprunable(found, f"a constant concatenated in {self.where}")
            for other in found[1:]:
                self.couple(found[:1], np.array([other]))
            ids.append(int(found[0]))
        self.label(output, ChannelIds(dim, np.array(ids), nonzero))

    def _unit_dim(self, where: Tensor, table: np.ndarray, derived: Sequence[int]) -> int:
        """Return the dimension that shrinks where channels have been spread over several: the one
        whose size follows the width, or else the one along which channels differ still, or else the
        longest. Whatever is wrong here, trial prunings of the codec show.
        """
        varying = [d for d in range(where.dim()) if bool((where != where.narrow(d, 0, 1)).any())]
        asked = [d for d in varying if d in derived]
        if len(asked) == 1:
            # The dimension before it counts heads, where channels within a head cannot go.
            before = [d for d in varying if d < asked[0]]
            return before[-1] if self.where in self.whole_heads and before else asked[0]
        roots = np.array([self.root(i) if i >= 0 else -1 for i in table.tolist()])
        numbers = roots[where.numpy()]
        differing = [d for d in varying if (numbers != numbers.take([0], axis=d)).any()]
        if len(differing) == 1:
            return differing[0]
        return max(asked or varying, key=lambda d: (where.shape[d], d))

    def _setitem(self, args: Sequence[Any]) -> None:
        target, index, value = args[0], args[1], args[2]
        labels, given = self.labels(target), self.labels(value)
        if labels is None and given is None:
            return
        numbers = self._numbers(target).clone()
        try:
            # A number written in place of channels leaves them as they are: zero stays zero, other
            # values do not.
            if given is not None:
                numbers[index] = self._numbers(value)
        except (RuntimeError, IndexError, TypeError):
            self._unknown("setitem", [target, value])
            return
        nonzero = (labels.nonzero if labels else None) or (given.nonzero if given else None)
        if given is None and not (isinstance(value, (int, float)) and value == 0):
            nonzero = nonzero or f"assignment in {self.where}"
        dim = labels.dim if labels is not None else min(1, target.dim() - 1)
        rows = numbers.movedim(dim, 0).reshape(target.shape[dim], -1)
        ids = []
        for row in rows.numpy():
            found = np.unique(row[row >= 0])
            if not len(found):
                self._unknown("setitem", [value] if given is not None else [target])
                return
            for other in found[1:]:
                self.couple(found[:1], np.array([other]))
            ids.append(int(found[0]))
        if labels is not None:  # whatever was there before has given the tensor its width
            self.couple(labels.ids, np.array(ids))
        self.label(target, ChannelIds(dim, np.array(ids), nonzero))
