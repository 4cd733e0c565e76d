"""Attach methods to a codec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nicprune.codecs.anatomy import check_codec
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.replaced_forward import check_not_replaced
from nicprune.common.errors import CodecError, RecipeError
from nicprune.methods.compatibility import check_combination, norms_of, parsed_methods
from nicprune.methods.composition import Attached, attach_hooks
from nicprune.methods.contract import Method, Temporal
from nicprune.pruning.cost import CostModel
from nicprune.pruning.latency import TimedCost
from nicprune.pruning.latency_table import LatencyTable
from nicprune.pruning.surgery import analyse


def attach(
    codec: nn.Module,
    method: str | Sequence[tuple[str, Mapping[str, Any]]],
    *,
    teacher: nn.Module | None = None,
    latency: LatencyTable | None = None,
    **config: Any,
) -> Attached:
    """Attach one method, or a list of (name, settings), to a codec. Its forward pass does not
    change.

    Args:
        codec: any `CompressionModel`, own classes included. It is not copied. Or what `attach` with
            `slimmable` returned, perhaps trained since: a temporal entropy model then goes beside
            its widths.
        method: a name from `nicprune list`, with its settings as keywords; or a list of (name,
            settings).
        teacher: for distillation: the codec that `codec` was pruned from. A copy of it is kept; of
            `codec` itself, if not given.
        latency: the codec's times, for budgets of `encode_s` and `decode_s`; see
            `nicprune.measure_latency`.

    Raises:
        CodecError: the codec cannot be analysed.
        RecipeError: a method or a setting is unknown, or a value out of range.
        BudgetError: the budget cannot be met.
    """
    wanted = (
        [(method, config)]
        if isinstance(method, str)
        else [(name, dict(settings)) for name, settings in method]
    )
    if not wanted or (config and not isinstance(method, str)):
        raise RecipeError(
            "attach(codec, name, **settings) or attach(codec, [(name, settings), ...])"
        )
    parsed = parsed_methods(wanted)
    if isinstance(codec, Attached):
        if teacher is not None or latency is not None:
            raise RecipeError("teacher and latency go with the methods that are attached first")
        return _beside_widths(codec, parsed)
    check_codec(codec)
    if teacher is not None:
        check_codec(teacher)
    check_not_replaced(codec)
    if has_hooks(codec):
        raise RecipeError(
            "the codec has a method attached already; harden() or detach() it first, or attach a"
            " list"
        )
    groups = analyse(codec, norms_of(parsed))
    cost = CostModel(codec, groups) if latency is None else TimedCost(codec, groups, latency)
    return Attached.of(codec, parsed, groups, cost, teacher)


def _beside_widths(attached: Attached, parsed: Sequence[tuple[type[Method], Any]]) -> Attached:
    """Attach a temporal model beside widths that are attached, and trained, already.

    Raises:
        CodecError: other methods are attached, or are to be.
    """
    there = attached._each
    beside = all(issubclass(cls, Temporal) for cls, _ in parsed)
    if not beside or there != [attached.roles.multi_width]:
        raise CodecError(
            "methods are attached to a codec already; harden() or detach() it first, or attach a"
            " list"
        )
    check_combination([*map(type, there), *(cls for cls, _ in parsed)])
    codec = attached.codec
    place = next(codec.parameters())
    created = [
        cls(codec, attached.groups, attached.cost, settings).to(place.device)
        for cls, settings in parsed
    ]
    methods = [*there, *created]
    for one in methods:
        one.set_beside(methods)
    found = Attached(codec, methods, attached.groups, attached.cost)
    attach_hooks(created)
    return found.in_mode(attached.training)
