"""Matrix products of two tensors that both depend on the input, as in attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nicprune.channels.contractions import letters_of_einsum, letters_of_matmul, macs_of
from nicprune.channels.numbers import ChannelIds, ChannelNumbers, Product
from nicprune.channels.ops import flatten


class Products(ChannelNumbers):
    """Follows channels through matrix products, and records what they cost."""

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
        if len(left) > 1:  # of a bias for each head, say, where channels lie within heads
            for _, labels in left:
                if self._own(labels):
                    self.mark_unprunable(
                        labels.ids, f"another dimension than channels in {self.where}"
                    )
            left = [pair for pair in left if not self._own(pair[1])]
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
