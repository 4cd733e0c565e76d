"""Follow channels through torch's operations: additions couple them, data movements carry them
along, what is not understood makes them unprunable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nicprune.channels.contractions import letters_of_einsum, letters_of_matmul, macs_of
from nicprune.channels.ops import (
    ADDITIVE,
    BREAKS_ZERO,
    IGNORED,
    KEEPS_ZERO,
    LIKE,
    MIXES,
    MOVES,
    MULTIPLICATIVE,
    PRODUCTS,
    REDUCES,
    breaks_zero,
    canonical,
    flatten,
    map_leaves,
    reduced_dims,
    writes_in_place,
)
from nicprune.channels.widths import Width

SPLITS = ("view", "reshape", "unflatten", "stack", "view_as", "flatten")
"""Movements that may spread channels over several dimensions."""


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


def _spread(values: np.ndarray, dim: int, like: Tensor) -> Tensor:
    """Return values along one dimension, the same along all others, in the shape of a tensor."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return torch.from_numpy(values.copy()).view(shape).expand(like.shape).contiguous()


def _varies(constant: Tensor, dim: int) -> bool:
    """Return whether a constant has several values along a dimension, counted from the end."""
    return constant.dim() >= -dim and constant.shape[dim] > 1


def _shuffled(x: Tensor, groups: int) -> Tensor:
    """Shuffle numbers as `F.channel_shuffle` shuffles channels."""
    parts = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    return parts.transpose(1, 2).reshape(x.shape)


def _derived_dims(name: str, args: Any, kwargs: Any, output: Tensor) -> list[int]:
    """Return the dimensions of a reshaped tensor whose size is computed from a width, or left to
    torch.
    """
    sizes = flatten(args[1:]) or flatten(kwargs.get("shape", kwargs.get("size", ())))
    first = 0
    if name == "unflatten":
        sizes = flatten(kwargs.get("sizes", args[2] if len(args) > 2 else ()))
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        first = dim % (output.dim() - len(sizes) + 1)
    elif name not in ("view", "reshape") or len(sizes) != output.dim():
        return []
    return [
        first + d
        for d, n in enumerate(sizes)
        if isinstance(n, Width) or isinstance(n, int) and n == -1
    ]


class ChannelPropagator(TorchFunctionMode):
    """Gives out channel numbers, and keeps them attached to tensors while operations run
    under it.
    """

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

    # -- numbers ----------------------------------------------------------------------------------

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

    # -- functions --------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = canonical(func)
        if name == "__iter__" and not self._depth:
            return iter(self.__torch_function__(torch.Tensor.unbind, types, args))
        result = func(*args, **kwargs)
        if self._depth:
            return result
        tensors = [
            t
            for t in flatten((args, {k: v for k, v in kwargs.items() if k != "out"}))
            if isinstance(t, Tensor)
        ]
        if name in ("shape", "size"):
            return self._sizes(tensors[0], result, args[1:], kwargs)
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
            self._pointwise(name, args, kwargs, tensors, outputs[0])
        elif name in ADDITIVE or name in MULTIPLICATIVE:
            self._arithmetic(name, args, kwargs, tensors, outputs[0])
        elif name in MOVES:
            self._move(func, args, kwargs, name, tensors, outputs)
        elif name in REDUCES:
            self._reduce(name, args, kwargs, tensors, outputs)
        elif name in PRODUCTS:
            self._product(name, args, kwargs, outputs[0])
        elif name in MIXES:
            self._mix(name, args, kwargs, tensors, outputs[0])
        elif name == "glu":
            self._glu(args, kwargs, outputs[0])
        else:
            self._unknown(name, tensors)
        return result

    def _unknown(self, name: str, tensors: Sequence[Any]) -> None:
        for tensor in tensors:
            labels = self.labels(tensor)
            if labels is not None:
                self.mark_unprunable(labels.ids, f"{name} in {self.where} is not understood")

    def _sizes(self, tensor: Tensor, result: Any, args: Any, kwargs: Any) -> Any:
        """Let sizes of channel dimensions say what they count."""
        labels = self.labels(tensor)
        if labels is None:
            return result
        if isinstance(result, torch.Size):
            return torch.Size(
                Width(n, labels.ids) if d == labels.dim else n for d, n in enumerate(result)
            )
        dim = kwargs.get("dim", args[0] if args else None)
        found = isinstance(dim, int) and dim % tensor.dim() == labels.dim
        return Width(result, labels.ids) if found else result

    def _pointwise(
        self, name: str, args: Any, kwargs: Any, tensors: Sequence[Tensor], output: Tensor
    ) -> None:
        """Follow an operation that changes each value of one tensor by itself."""
        labels = self.labels(tensors[0])
        dim = labels.dim if labels else 0
        padded_channels = name == "pad" and output.shape[dim] != tensors[0].shape[dim]
        others = any(self.labels(t) for t in tensors[1:])
        if labels is None or others or padded_channels:
            self._unknown(name, tensors)
            return
        broken = breaks_zero(name, args, kwargs)
        if any(_varies(t, labels.dim - output.dim()) for t in tensors[1:]):
            self.mark_unprunable(labels.ids, f"a constant with a value per channel in {self.where}")
        nonzero = f"{name} in {self.where}" if broken else labels.nonzero
        self.label(output, ChannelIds(labels.dim, labels.ids, nonzero))

    def _arithmetic(
        self, name: str, args: Any, kwargs: Any, tensors: Sequence[Tensor], output: Tensor
    ) -> None:
        """Follow a sum, a product or a quotient of tensors and numbers."""
        given = flatten((args, {k: v for k, v in kwargs.items() if k != "alpha"}))
        for width in given:
            if isinstance(width, Width):
                self.mark_unprunable(
                    width.ids, f"{name} in {self.where} computes with their number"
                )
        scalars = [s for s in given if isinstance(s, (int, float)) and not isinstance(s, bool)]
        shifted = name in ("add", "sub", "rsub") and any(s != 0 for s in scalars[:1])
        if "div" in name and len(tensors) > 1:
            divisor = self.labels(tensors[1])
            if divisor is not None and divisor.nonzero is None:  # zero divided by zero
                self._unknown(name, tensors)
                return
        self._elementwise(tensors, output, additive=name in ADDITIVE, name=name)
        labels = self.labels(output)
        if labels is not None and shifted:
            reason = labels.nonzero or f"{name} in {self.where}"
            self.label(output, ChannelIds(labels.dim, labels.ids, reason))
        if labels is not None and "div" in name and len(tensors) > 1:
            # Zero divided is zero, divided by zero it is not.
            numerator = self.labels(tensors[0])
            nonzero = f"{name} in {self.where}" if numerator is None else numerator.nonzero
            self.label(output, ChannelIds(labels.dim, labels.ids, nonzero))

    def _own(self, tensor: Tensor, labels: ChannelIds) -> bool:
        """Return whether a tensor holds parameters of a module alone: per channel or not."""
        return all(number in self._parameters for number in labels.ids.tolist())

    def _elementwise(
        self, tensors: Sequence[Tensor], output: Tensor, *, additive: bool, name: str = ""
    ) -> None:
        """Couple the channels of broadcast operands. A constant with a value per channel makes them
        unprunable: it would not shrink.
        """
        merged: ChannelIds | None = None
        nonzero: list[str | None] = []
        known = [(t, labels) for t in tensors if (labels := self.labels(t)) is not None]
        # Parameters last: the others say which dimension holds channels.
        known.sort(key=lambda pair: self._own(*pair))
        constants = [t for t in tensors if self.labels(t) is None]
        for tensor, labels in known:
            dim = labels.dim + output.dim() - tensor.dim()
            own = self._own(tensor, labels)
            if merged is None:
                merged = ChannelIds(dim, labels.ids)
            elif own and (dim != merged.dim or len(labels.ids) != len(merged.ids)):
                self.mark_unprunable(labels.ids, f"another dimension than channels in {self.where}")
                constants.append(tensor)
                continue
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
                if own and self._parameters[int(labels.ids[0])] not in self._stack:
                    self.mark_unprunable(
                        merged.ids, f"a parameter of another module per channel in {self.where}"
                    )
                self.couple(merged.ids, labels.ids)
            nonzero.append(labels.nonzero)
        if merged is None:
            return
        for tensor in constants:
            own_dim = merged.dim - (output.dim() - tensor.dim())
            if own_dim >= 0 and tensor.shape[own_dim] not in (0, 1):
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

    def _mix(
        self, name: str, args: Any, kwargs: Any, tensors: Sequence[Tensor], output: Tensor
    ) -> None:
        """Follow an operation over several values of one tensor: over places it leaves channels
        apart, over channels it does not.
        """
        labels = self.labels(tensors[0])
        if labels is None or output.shape != tensors[0].shape:
            self._unknown(name, tensors)
            return
        place = 2 if name == "normalize" else 1
        dim = kwargs.get("dim", args[place] if len(args) > place else None)
        if dim is None and name == "normalize":
            dim = 1
        apart = name in ("softmax", "log_softmax", "softmin", "normalize") and dim is not None
        if not apart or dim % output.dim() == labels.dim:
            for tensor in tensors:
                if (own := self.labels(tensor)) is not None:
                    self.mark_unprunable(own.ids, f"{name} in {self.where} mixes channels")
        nonzero = labels.nonzero if name == "normalize" else f"{name} in {self.where}"
        self.label(output, ChannelIds(labels.dim, labels.ids, nonzero))

    def _glu(self, args: Any, kwargs: Any, output: Tensor) -> None:
        """Follow `F.glu`: the first half times the sigmoid of the second."""
        labels = self.labels(args[0])
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        if labels is None:
            return
        if dim % output.dim() != labels.dim:
            self.label(output, ChannelIds(labels.dim, labels.ids, labels.nonzero))
            return
        first, second = np.split(labels.ids, 2)
        self.couple(first, second)
        self.label(output, ChannelIds(labels.dim, first, labels.nonzero))

    # -- matrix products --------------------------------------------------------------------------

    def _product(self, name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        """Follow a product of two tensors of which some dimensions meet."""
        if name == "scaled_dot_product_attention":
            self._attend(args, kwargs, output)
            return
        operands = [a for a in flatten(args) if isinstance(a, Tensor)]
        operands += [v for v in kwargs.values() if isinstance(v, Tensor)]
        if len(operands) != 2:
            self._unknown(name, operands)
            return
        letters = letters_of_einsum(args) if name == "einsum" else letters_of_matmul(*operands)
        if letters is None:
            self._unknown(name, operands)
            return
        self._contract(name, letters, operands[0], operands[1], output)

    def _contract(
        self,
        name: str,
        letters: tuple[str, str, str],
        first: Tensor,
        second: Tensor,
        output: Tensor,
    ) -> None:
        sides: list[tuple[Tensor, str, ChannelIds | None, str | None]] = []
        for operand, part in ((first, letters[0]), (second, letters[1])):
            labels = self.labels(operand)
            sides.append((operand, part, labels, part[labels.dim] if labels else None))
        (_, _, one, at), (_, _, two, of) = sides
        left: list[tuple[str, ChannelIds]] = []
        if one is not None and two is not None and at == of:
            if len(one.ids) != len(two.ids):
                self._unknown(name, (first, second))
                return
            self.couple(one.ids, two.ids)
            reason = one.nonzero if two.nonzero else None  # one zero makes the product zero
            assert at is not None
            if at in letters[2]:
                left.append((at, ChannelIds(0, one.ids, reason)))
            elif reason:  # summed over
                self.mark_unprunable(one.ids, f"{reason} before {name} in {self.where}")
        else:
            for own, other in (sides, sides[::-1]):
                labels, letter = own[2], own[3]
                if labels is None or letter is None:
                    continue
                if letter in other[1]:
                    if other[0].shape[other[1].index(letter)] != 1:
                        self.mark_unprunable(
                            labels.ids, f"a constant with a value per channel in {self.where}"
                        )
                elif letter not in letters[2] and labels.nonzero:
                    self.mark_unprunable(labels.ids, f"{labels.nonzero} before {name}")
                if letter in letters[2]:
                    left.append((letter, labels))
        if len(left) > 1:
            self._unknown(name, (first, second))
        elif left:
            letter, labels = left[0]
            dim = letters[2].index(letter)
            self.label(output, ChannelIds(dim, labels.ids, labels.nonzero))
        self._count(macs_of(letters, first, second), [s[2] for s in sides], at == of)

    def _attend(self, args: Any, kwargs: Any, output: Tensor) -> None:
        """Follow softmax(q k^T) v. Channels of v may be removed; the scale depends on the number of
        those of q and k, if none is given.
        """
        names = ("query", "key", "value", "attn_mask")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = (given[name] for name in names[:3])
        labels = [self.labels(t) for t in (query, key, value)]
        mask = given.get("attn_mask")
        heads = [x for x in labels if x is not None and x.dim < query.dim() - 2]
        if any(x is None for x in labels) or self.labels(mask) is not None:
            self._unknown("scaled_dot_product_attention", (query, key, value, mask))
            return
        q, k, v = (x for x in labels if x is not None)
        batch = query.numel() // (query.shape[-1] * query.shape[-2])
        pairs = batch * int(query.shape[-2]) * int(key.shape[-2])
        if len(heads) == 3 and q.dim == k.dim == v.dim:
            if given.get("enable_gqa") or not len(q.ids) == len(k.ids) == len(v.ids):
                self._unknown("scaled_dot_product_attention", (query, key, value))
                return
            self.couple(q.ids, k.ids)
            self.couple(q.ids, v.ids)
            if isinstance(mask, Tensor) and mask.dim() > query.dim() - 1 - q.dim:
                at = q.dim - (query.dim() - mask.dim())
                if at >= 0 and mask.shape[at] != 1:
                    self.mark_unprunable(q.ids, f"a constant with a value per head in {self.where}")
            self.label(output, ChannelIds(v.dim, v.ids, v.nonzero))
            self._count(pairs * int(query.shape[-1] + value.shape[-1]), [q, q], True)
        elif not heads and q.dim == k.dim == v.dim == query.dim() - 1:
            self.couple(q.ids, k.ids)
            if given.get("scale") is None:
                self.mark_unprunable(q.ids, f"the scale in {self.where} depends on their number")
            elif q.nonzero and k.nonzero:
                self.mark_unprunable(q.ids, f"{q.nonzero} before attention in {self.where}")
            self.label(output, ChannelIds(v.dim, v.ids, v.nonzero))
            self._count(pairs * int(query.shape[-1]), [q, q], True)
            self._count(pairs * int(value.shape[-1]), [v, v], True)
        else:
            self._unknown("scaled_dot_product_attention", (query, key, value))

    def _count(self, macs: int, labels: Sequence[ChannelIds | None], same: bool) -> None:
        """Record a matrix product whose multiply-adds follow the number of some channels."""
        ids = [x.ids for x in labels if x is not None]
        if ids:
            self.products.append(Product(self.where, macs, tuple(ids[:1] if same else ids)))

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

    # -- movements --------------------------------------------------------------------------------

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
                constants = bool((rows < 0).any())
                if not constants or name not in ("cat", "concat"):
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
            return asked[0]
        roots = np.array([self.root(i) if i >= 0 else -1 for i in table.tolist()])
        numbers = roots[where.numpy()]
        differing = [d for d in varying if (numbers != numbers.take([0], axis=d)).any()]
        if len(differing) == 1:
            return differing[0]
        return max(asked or varying, key=lambda d: (where.shape[d], d))

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
