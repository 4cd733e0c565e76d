"""Remove channels from a codec that has methods attached: once and for all, or as a plain copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from nicprune.channels.groups import removed_inputs
from nicprune.channels.known import remember
from nicprune.codecs.cdf import note_tables, tables_are_current
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.provenance import provenance, set_provenance
from nicprune.common.config import cut
from nicprune.common.errors import RecipeError
from nicprune.methods.compatibility import norms_of, parsed_methods
from nicprune.methods.contract import Pruner
from nicprune.methods.trained_part import side_of
from nicprune.pruning.cost import CostModel
from nicprune.pruning.surgery import analyse, prune


class Hardening(nn.Module):
    """The part of `Attached` that makes plain codecs of it; `self` is an `Attached`."""

    def keep(self: Any) -> dict[str, list[int]]:
        """Return the keep-lists that `harden` would use now, of the codec itself: those of layers
        that a method has added are its own affair.
        """
        merged: dict[str, set[int]] = {}
        for method in self.roles.pruners:
            if method.codec is not self.codec:
                continue
            for name, kept in _selected(method).items():
                # Where methods agree on no channel, one stays.
                merged[name] = (
                    (merged[name] & set(kept) or {min(kept)}) if name in merged else set(kept)
                )
        return {name: sorted(kept) for name, kept in merged.items()}

    def plain(self: Any, *, level: float | None = None, lmbda: float | None = None) -> nn.Module:
        """Return a plain copy of the codec at full width, what was learnt folded into its weights
        (a modulator's rate too). Gates are left out: the copy computes all channels.
        """
        self.set_point(self._rate_point(level, lmbda))
        codec: nn.Module = self._folded(self.roles.pruners)[0]
        return codec

    def _folded(self: Any, which: Sequence[Pruner]) -> tuple[nn.Module, Any]:
        """Return a copy of the codec without hooks, these methods folded into its weights, and the
        copy's methods, detached.
        """
        chosen = sorted(
            (self._each.index(method) for method in which),
            key=lambda number: self._each[number].fold_order,
        )
        twin = copy_codec(self)
        codec = twin.detach()
        for number in chosen:
            method = cast("Pruner", twin._each[number])
            if method.codec is codec:
                for (layer, side), factor in method.weight_factors(codec).items():
                    for other in twin.roles.parts:
                        if other is not method:
                            other.on_rescale(layer, side, factor)
            method.fold(method.codec)
        set_provenance(codec, provenance(self.codec).copy())
        remember(codec, self.groups)
        return codec, twin

    def extract(self: Any, width: int, *, verify: bool = True) -> nn.Module:
        """Return one width of a slimmable codec as a plain codec of its own, by surgery. The
        slimmable codec stays as it is.

        Raises:
            RecipeError: it has no such width, or only one.
        """
        method = self.roles.multi_width
        if method is None or self.widths is None or self.widths.field != "width":
            raise RecipeError("extract needs a slimmable codec: attach slimmable")
        with self.at_width(width):
            method.extracting = width
            try:
                small: nn.Module = self.harden(verify=verify)
                if tables_are_current(self):  # the width's own came along, as files have them
                    note_tables(small)
                return small
            finally:
                method.extracting = None

    def harden(
        self: Any, *, verify: bool = True, level: float | None = None, lmbda: float | None = None
    ) -> Any:
        """Return a smaller codec: the decision made, masks folded in, channels removed, the result
        verified.

        It is plain, unless gates or a modulator stay on it: then it is attached again, on smaller
        layers. With `level` or `lmbda` a modulator is folded into the weights, at this rate. The
        attached codec itself stays as it is.

        Raises:
            TrainingError: a method has not decided yet.
            SurgeryError: the result is not the same function as the masked codec.
        """
        for method in self.roles.pruners:
            method.check_ready()
        fixed = level is not None or lmbda is not None
        self.set_point(self._rate_point(level, lmbda))
        staying = [
            part
            for part in self.roles.parts
            if part.stays and not (fixed and part is self.roles.modulator)
        ]
        keep = self.keep()
        wide, twin = self._folded(
            [m for m in self.roles.pruners if m not in staying or m.folds_where_it_stays]
        )
        record = provenance(wide)
        if not record.original:
            record.original = self.cost.original.as_dict()
        small = prune(wide, keep, self.groups, verify=verify)
        totals = self.cost.totals(keep)
        entry = {
            "methods": [{"name": m.name, **m.config.model_dump(mode="json")} for m in self._each],
            "widths": {name: [self.groups[name].width, len(kept)] for name, kept in keep.items()},
            "removed_inputs": removed_inputs(self.groups, keep),
            "macs_before": self.cost.totals().macs,
            "macs_after": totals.macs,
            "params_after": totals.params,
            "verified": provenance(small).verified if verify else "",
            **self.cost.history(keep),
        }
        if staying:
            entry["stays"] = [m.name for m in staying]
        sides = {side for method in self._lasting if (side := side_of(method))}
        if before := self._side_of_before:
            sides.add(before)
        if len(sides) == 1:  # fine-tuning freezes the other side, too
            entry["side"] = sides.pop()
        provenance(small).history.append(entry)
        if twin.roles.multi_width is not None:
            twin.roles.multi_width.finalize(small)
        frozen, training = set(map(id, self._statistics_frozen)), self.codec.training
        modes = {
            name: module.training or (training and id(module) in frozen)
            for name, module in self.codec.named_modules()
        }
        for name, module in small.named_modules():
            module.training = modes.get(name, training)
        if not staying:
            return small
        parsed = parsed_methods([(m.name, m.config_after_pruning()) for m in staying])
        groups = analyse(small, norms_of(parsed))
        with torch.random.fork_rng(devices=[]):  # what is drawn is replaced by what was trained
            again = type(self).of(small, parsed, groups, CostModel(small, groups))
        for part, other in zip(staying, again._each, strict=True):
            twin.roles.parts[self.roles.parts.index(part)].transfer_to(other, keep)
        return again.in_mode(self.codec.training)


def _selected(method: Pruner) -> Mapping[str, Sequence[int]]:
    """Return what a method keeps.

    Raises:
        RecipeError: it returned something else than keep-lists.
    """
    found: Any = method.select()
    try:
        method.groups.check(found)
    except (AttributeError, TypeError, ValueError, RecipeError) as error:
        reason = cut(str(error), 200) if isinstance(error, RecipeError) else "no keep-lists"
        raise RecipeError(
            f"{method.name}: select() returns lists of channels by group, not"
            f" {cut(repr(found), 60)}: {reason}"
        ) from None
    return cast("Mapping[str, Sequence[int]]", found)
