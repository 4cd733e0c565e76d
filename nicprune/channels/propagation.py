"""Follow channels through torch's operations: additions couple them, data movements carry them
along, what is not understood makes them unprunable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nicprune.channels.movements import Movements
from nicprune.channels.numbers import ChannelIds
from nicprune.channels.ops import (
    ADDITIVE,
    BREAKS_ZERO,
    CHOICES,
    CONCATENATES,
    CONVERSIONS,
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
    reduced_dims,
    writes_in_place,
)
from nicprune.channels.products import Products
from nicprune.channels.widths import Width


def _varies(constant: Tensor, dim: int) -> bool:
    """Return whether a constant has several values along a dimension, counted from the end."""
    return constant.dim() >= -dim and constant.shape[dim] > 1


class ChannelPropagator(Movements, Products):
    """Keeps channel numbers attached to tensors while operations run under it."""

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
        if name in CONVERSIONS:
            tensors = tensors[:1]
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
        elif name in KEEPS_ZERO or name in BREAKS_ZERO or name in CONVERSIONS:
            self._pointwise(name, args, kwargs, tensors, outputs[0])
        elif name in ADDITIVE or name in MULTIPLICATIVE:
            self._arithmetic(name, args, kwargs, tensors, outputs[0])
        elif name in CHOICES:
            self._choose(func, args, kwargs, outputs[0])
        elif name in CONCATENATES and self._beside_channels(args, kwargs, tensors):
            self._join(name, tensors, outputs[0])
        elif name in MOVES:
            self._move(func, args, kwargs, name, tensors, outputs)
        elif name in REDUCES:
            self._reduce(name, args, kwargs, tensors, outputs)
        elif name in PRODUCTS:
            self._product(name, args, kwargs, outputs[0])
        elif name in MIXES:
            self._mix(name, args, kwargs, tensors, outputs[0])
        elif name.startswith("fft_"):
            self._transform(name, args, kwargs, outputs[0])
        elif name == "glu":
            self._glu(args, kwargs, outputs[0])
        else:
            self._unknown(name, tensors)
        return result

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

    def _choose(self, func: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        """Follow `where` and `masked_fill`: zero stays zero if both values are, whichever it is."""
        name = canonical(func)
        places = (1, 2) if func is torch.where else (0, 2)
        names = ("input", "value" if name == "masked_fill" else "other")
        values = [
            args[place] if len(args) > place else kwargs.get(key)
            for place, key in zip(places, names, strict=True)
        ]
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if any(value is None for value in values):  # with one argument, where returns places
            self._unknown(name, tensors)
            return
        self._elementwise(tensors, output, additive=True, name=name)
        if (merged := self.labels(output)) is None:
            return
        merged.nonzero = None
        for value in values:
            labels = self.labels(value)
            if labels is not None:
                nonzero = labels.nonzero
            else:  # a parameter that is zero need not stay so
                zero = not isinstance(value, nn.Parameter) and not torch.as_tensor(value).any()
                nonzero = None if zero else f"{name} in {self.where}"
            merged.nonzero = merged.nonzero or nonzero

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
        known.sort(key=lambda pair: self._own(pair[1]))
        constants = [t for t in tensors if self.labels(t) is None]
        for tensor, labels in known:
            dim = labels.dim + output.dim() - tensor.dim()
            own = self._own(labels)
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

    def _beside_channels(self, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> bool:
        """Return whether tensors are concatenated along another dimension than their channels'."""
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
        return all(
            labels.dim != dim % tensor.dim()
            for tensor in tensors
            if (labels := self.labels(tensor)) is not None
        )

    def _join(self, name: str, tensors: Sequence[Tensor], output: Tensor) -> None:
        """Follow a concatenation of places, tokens or images: channels are coupled one to one, as
        in a sum.
        """
        # Padding leaves a zero channel zero; a parameter that is zero need not stay so.
        joined = [
            t
            for t in tensors
            if self.labels(t) is not None or isinstance(t, nn.Parameter) or bool(t.any())
        ]
        self._elementwise(joined, output, additive=True, name=name)

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
        if name.endswith("_norm"):
            self.over_channels.setdefault(self.where, name)
        apart = name in ("softmax", "log_softmax", "softmin", "normalize") and dim is not None
        if not apart or dim % output.dim() == labels.dim:
            if apart and not self._own(labels):
                self.mixed.add(self.where)
            for tensor in tensors:
                if (own := self.labels(tensor)) is not None:
                    self.mark_unprunable(own.ids, f"{name} in {self.where} mixes channels")
        nonzero = labels.nonzero if name == "normalize" else f"{name} in {self.where}"
        self.label(output, ChannelIds(labels.dim, labels.ids, nonzero))

    def _transform(self, name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        """Follow a Fourier transform: over places it leaves channels apart, and zero zero."""
        labels, ndim = self.labels(args[0]), args[0].dim()
        if labels is None:
            return
        given = kwargs.get("dim", args[2] if len(args) > 2 else None)
        last = {"2": 2, "n": ndim, "t": 1}.get(name[-1], ndim)
        dims = range(ndim - last, ndim) if given is None else flatten(given)
        if labels.dim in [d % ndim for d in dims]:
            self._unknown(name, args[:1])
        else:
            self.label(output, ChannelIds(labels.dim, labels.ids, labels.nonzero))

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
            if name not in ("sum", "norm", "any"):
                self.over_channels.setdefault(self.where, name)
                self.mark_unprunable(labels.ids, f"{name} over channels in {self.where}")
            elif labels.nonzero:
                self.mark_unprunable(
                    labels.ids,
                    f"{labels.nonzero} before {name} in {self.where}: a zero channel is not a"
                    " removed one",
                )
        else:
            before = 0 if output.dim() == source.dim() else sum(d < labels.dim for d in dims)
            self.label(output, ChannelIds(labels.dim - before, labels.ids, labels.nonzero))
