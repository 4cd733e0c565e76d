"""Follow channels through torch's operations: additions tie them, data movements carry them along,
what is not understood pins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nicprune.channels.ops import (
    ADDITIVE,
    BREAKS_ZERO,
    IGNORED,
    KEEPS_ZERO,
    LIKE,
    MOVES,
    MULTIPLICATIVE,
    REDUCES,
    breaks_zero,
    canonical,
    flatten,
    map_leaves,
    reduced_dims,
    writes_in_place,
)


@dataclass
class ChannelIds:
    """Channel numbers of one tensor: `ids` along dimension `dim`; `nonzero` names what makes a zero
    channel not zero.
    """

    dim: int
    ids: np.ndarray
    nonzero: str | None = None


class ChannelPropagator(TorchFunctionMode):
    """Gives out channel numbers, and keeps them attached to tensors while operations run
    under it.
    """

    def __init__(self, root: str):
        super().__init__()
        self.pins: dict[int, str] = {}
        self._parent: list[int] = []
        self._labels: dict[int, tuple[Tensor, ChannelIds]] = {}
        self._misused: dict[str, str] = {}
        self._owner: dict[int, str] = {}
        self._depth = 0
        self._stack: list[str] = [root]

    # -- numbers ----------------------------------------------------------------------------------

    def new(self, count: int) -> np.ndarray:
        """Give out `count` new channel numbers."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, number: int) -> int:
        """The representative of all numbers tied to `number`."""
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def couple(self, first: np.ndarray, second: np.ndarray) -> None:
        """Tie two sequences of channels, one to one."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            a, b = self.root(a), self.root(b)
            if a != b:
                self._parent[max(a, b)] = min(a, b)

    def mark_unprunable(self, ids: np.ndarray, reason: str) -> None:
        """Never remove these channels."""
        for number in ids.tolist():
            self.pins.setdefault(number, reason)

    def labels(self, tensor: Any) -> ChannelIds | None:
        """Channel numbers of a tensor, None for a constant."""
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
        """The module that runs now."""
        return self._stack[-1]

    # -- functions --------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._depth:
            return result
        name = canonical(func)
        tensors = [
            t
            for t in flatten((args, {k: v for k, v in kwargs.items() if k != "out"}))
            if isinstance(t, Tensor)
        ]
        if name not in IGNORED:
            for tensor in tensors:
                if id(tensor) in self._owner:
                    self._misused[self._owner[id(tensor)]] = (
                        f"the weights of {self._owner[id(tensor)]} are used outside it, by {name}"
                        f" in {self.where}"
                    )
        if writes_in_place(func, kwargs):
            self._written(name, result if isinstance(result, Tensor) else args[0])
        if name == "setitem":
            self._setitem(args)
            return result
        if name in IGNORED or not any(self.labels(t) is not None for t in tensors):
            return result
        outputs = [t for t in flatten(result) if isinstance(t, Tensor)]
        if not outputs:  # the values leave torch: what comes of them cannot be followed
            self._unknown(name, tensors)
            return result
        if (
            name in ("max", "min")
            and not (len(args) > 1 and isinstance(args[1], Tensor))
            and "other" not in kwargs
        ):
            name = f"a{name}"
        if name in LIKE:
            labels = self.labels(tensors[0])
            if labels is not None:
                self.label(
                    outputs[0],
                    ChannelIds(labels.dim, labels.ids, None if name == "zeros_like" else name),
                )
        elif name in KEEPS_ZERO or name in BREAKS_ZERO:
            labels = self.labels(tensors[0])
            padded_channels = (
                name == "pad"
                and outputs[0].shape[labels.dim if labels else 0]
                != tensors[0].shape[labels.dim if labels else 0]
            )
            if (
                labels is None
                or len(tensors) > 1
                and any(self.labels(t) for t in tensors[1:])
                or padded_channels
            ):
                self._unknown(name, tensors)
            else:
                broken = breaks_zero(name, args, kwargs)
                if any(t.dim() and t.numel() > 1 for t in tensors[1:]):
                    self.mark_unprunable(
                        labels.ids, f"a constant with a value per channel in {self.where}"
                    )
                self.label(
                    outputs[0],
                    ChannelIds(
                        labels.dim,
                        labels.ids,
                        f"{name} in {self.where}" if broken else labels.nonzero,
                    ),
                )
        elif name in ADDITIVE or name in MULTIPLICATIVE:
            scalars = [
                s
                for s in flatten((args, {k: v for k, v in kwargs.items() if k != "alpha"}))
                if isinstance(s, (int, float)) and not isinstance(s, bool)
            ]
            shifted = name in ("add", "sub", "rsub") and any(s != 0 for s in scalars[:1])
            self._elementwise(tensors, outputs[0], additive=name in ADDITIVE, name=name)
            labels = self.labels(outputs[0])
            if labels is not None and shifted:
                self.label(
                    outputs[0],
                    ChannelIds(labels.dim, labels.ids, labels.nonzero or f"{name} in {self.where}"),
                )
            if labels is not None and "div" in name and len(tensors) > 1:
                numerator = self.labels(
                    tensors[0]
                )  # zero divided is zero, divided by zero it is not
                self.label(
                    outputs[0],
                    ChannelIds(
                        labels.dim,
                        labels.ids,
                        f"{name} in {self.where}" if numerator is None else numerator.nonzero,
                    ),
                )
        elif name in MOVES:
            self._move(func, args, kwargs, name, tensors, outputs)
        elif name in REDUCES:
            self._reduce(name, args, kwargs, tensors, outputs)
        else:
            self._unknown(name, tensors)
        return result

    def _unknown(self, name: str, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            labels = self.labels(tensor)
            if labels is not None:
                self.mark_unprunable(labels.ids, f"{name} in {self.where} is not understood")

    def _elementwise(
        self, tensors: Sequence[Tensor], output: Tensor, *, additive: bool, name: str = ""
    ) -> None:
        """Tie the channels of broadcast operands. A constant with a value per channel pins them: it
        would not shrink.
        """
        merged: ChannelIds | None = None
        nonzero: list[str | None] = []
        for tensor in tensors:
            labels = self.labels(tensor)
            if labels is None:
                continue
            dim = labels.dim + output.dim() - tensor.dim()
            if merged is None:
                merged = ChannelIds(dim, labels.ids)
            elif dim != merged.dim:
                self._unknown(name or "broadcast", tensors)
                return
            elif len(labels.ids) != len(merged.ids):
                if 1 not in (len(labels.ids), len(merged.ids)):
                    self._unknown(name or "broadcast", tensors)
                    return
                wide, narrow = (labels, merged) if len(merged.ids) == 1 else (merged, labels)
                self.mark_unprunable(
                    narrow.ids, f"{name} in {self.where} spreads one channel over many"
                )
                if additive:
                    nonzero.append(f"{name} in {self.where} of one channel to many")
                merged = ChannelIds(dim, wide.ids)
            else:
                self.couple(merged.ids, labels.ids)
            nonzero.append(labels.nonzero)
        if merged is None:
            return
        for tensor in tensors:
            if self.labels(tensor) is None:
                own = merged.dim - (output.dim() - tensor.dim())
                if own >= 0 and tensor.shape[own] not in (0, 1):
                    self.mark_unprunable(
                        merged.ids, f"a constant with a value per channel in {self.where}"
                    )
                if additive:
                    nonzero.append(f"a constant added in {self.where}")
        if additive:
            merged.nonzero = next((n for n in nonzero if n), None)
        else:  # a product is zero as soon as one factor is
            merged.nonzero = nonzero[0] if nonzero and all(nonzero) else None
        if len(merged.ids) == 1 and output.shape[merged.dim] > 1:
            merged.ids = np.repeat(merged.ids, output.shape[merged.dim])
        self.label(output, merged)

    def _written(self, name: str, target: Tensor) -> None:
        """Channels seen through another view of a tensor that is written to: their numbers tell no
        more what they hold.
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
        """A tensor of channel numbers of the same shape, -1 where there are none."""
        if not isinstance(tensor, Tensor):
            return tensor
        labels = self.labels(tensor)
        if labels is None:
            return (
                tensor
                if tensor.dtype in (torch.int64, torch.int32, torch.bool)
                else torch.full(tensor.shape, -1, dtype=torch.int64)
            )
        shape = [1] * tensor.dim()
        shape[labels.dim] = -1
        return torch.from_numpy(labels.ids.copy()).view(shape).expand(tensor.shape)

    def _move(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        name: str,
        tensors: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        """Run a data movement on the channel numbers; read off where they went."""
        try:
            # The index may hold tensors of its own, which are positions and not channels.
            if name == "getitem":
                result = func(self._numbers(args[0]), args[1])
            else:
                result = func(*map_leaves(self._numbers, args), **map_leaves(self._numbers, kwargs))
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
        if name in ("chunk", "tensor_split", "roll"):
            self._check_parts(name, tensors, moved)
        for output, numbers in zip(outputs, moved, strict=True):
            self._read_off(output, numbers, nonzero, tensors, name)

    def _check_parts(self, name: str, tensors: Sequence[Tensor], moved: Sequence[Tensor]) -> None:
        """Parts of a tensor's channels keep their borders only if they stay equally wide; a roll
        has no such border.
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
        numbers: Tensor,
        nonzero: str | None,
        tensors: Sequence[Tensor],
        name: str,
    ) -> None:
        if numbers.numel() == 0 or int(numbers.max()) < 0:
            return
        for dim in [1, *(d for d in range(numbers.dim()) if d != 1)] if numbers.dim() > 1 else [0]:
            rows = numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)
            if bool((rows == rows[:, :1]).all()):
                break
        else:
            # Several channels meet in one (pixel shuffle): they live or die together.
            dim = min(1, numbers.dim() - 1)
            rows = numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)
            if name not in ("pixel_shuffle",):
                constants = bool((rows < 0).any())
                if not constants or name not in ("cat", "stack", "concat"):
                    self._unknown(name, tensors)
                    return
        ids = []
        for row in rows.numpy():
            found = np.unique(row[row >= 0])
            if not len(found):  # channels of a constant, concatenated: they must stay
                found = self.new(1)
                self.mark_unprunable(found, f"a constant concatenated in {self.where}")
            for other in found[1:]:
                self.couple(found[:1], np.array([other]))
            ids.append(int(found[0]))
        self.label(output, ChannelIds(dim, np.array(ids), nonzero))

    def _reduce(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Any,
        tensors: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        labels = self.labels(tensors[0])
        source, output = tensors[0], outputs[0]
        if labels is None:
            return
        dims = reduced_dims(args, kwargs, source.dim(), 2 if name == "norm" else 1)
        if dims is None or labels.dim in dims:
            # A sum does not see channels that are zero; a mean, a maximum or a product does.
            if (
                name not in ("sum", "norm", "any")
                or output.numel() > 1
                and labels.dim in (dims or [])
            ):
                self._unknown(name, tensors)
            elif labels.nonzero:
                self.mark_unprunable(
                    labels.ids,
                    f"{labels.nonzero} before {name} in {self.where}: a zero channel is not a"
                    " removed one",
                )
        else:
            before = 0 if output.dim() == source.dim() else sum(d < labels.dim for d in dims)
            self.label(output, ChannelIds(labels.dim - before, labels.ids, labels.nonzero))

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
