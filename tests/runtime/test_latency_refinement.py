"""A refined table holds what was measured near the budget. Nothing here looks at how long anything
takes.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import built, same_state, state_of
from helpers_latency import table_of
from torch import nn

import nicprune as nip
from nicprune.methods import attach
from nicprune.pruning.latency import TimedCost
from nicprune.pruning.latency_table import LatencyTable
from nicprune.runtime import latency, latency_refinement

BUDGET = {"decode_s": 0.6}


def work(codec: nn.Module, part: str) -> float:
    return float(sum(p.numel() for p in codec.get_submodule(part).parameters()))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Parts take as long as they have parameters, by a machine that is 7 times slower today; the
    pruned codecs that were timed.
    """
    found: list[nn.Module] = []

    def seconds_of_parts(codecs: list[nn.Module], table: LatencyTable) -> list[dict[str, float]]:
        found.append(codecs[1])
        return [{part: 7 * work(codec, part) for part in table.parts} for codec in codecs]

    monkeypatch.setattr(latency_refinement, "seconds_of_parts", seconds_of_parts)
    return found


def test_the_budget_is_met_by_measured_times(timed: list[nn.Module]) -> None:
    codec, groups = built("bmshj2018-hyperprior")
    before, first = state_of(codec), table_of(codec)
    chosen: list[Any] = []

    def choose(table: LatencyTable) -> Any:
        assert torch.is_grad_enabled(), "importance may be a gradient's"
        again = copy.deepcopy(codec)
        attached = attach(again, "magnitude", budget=BUDGET, latency=table, round_to=1)
        chosen.append(attached.keep())
        return chosen[-1]

    table = nip.refine_latency(codec, first, choose)
    assert 1 < len(timed) <= latency_refinement.ROUNDS
    cost = TimedCost(codec, groups, table)
    for keep, small in zip(chosen, timed, strict=True):
        totals: Any = cost.totals(keep)
        real = first.rest["decode_s"] + sum(
            times.seconds[0] * work(small, part) / work(codec, part)
            for part, times in first.parts.items()
            if "decode_s" in times.sides
        )
        assert totals.decode_s == pytest.approx(real, rel=1e-9)
        assert abs(TimedCost(codec, groups, first).totals(keep).decode_s / real - 1) > 0.03  # type: ignore[attr-defined]
    limit = BUDGET["decode_s"] * cost.original.decode_s  # type: ignore[attr-defined]
    last: Any = cost.totals(choose(table))
    assert 0.9 * limit < last.decode_s <= limit
    assert same_state(before, state_of(codec))


@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_what_contradicts_other_measurements_does_not_stop_a_budget(
    noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pruned codec that seems faster than a narrower one, or slower than the whole."""
    codec, groups = built("bmshj2018-hyperprior")

    def seconds_of_parts(codecs: list[nn.Module], table: LatencyTable) -> list[dict[str, float]]:
        whole, small = ({part: work(c, part) for part in table.parts} for c in codecs)
        return [whole, {part: noise * seconds for part, seconds in small.items()}]

    monkeypatch.setattr(latency_refinement, "seconds_of_parts", seconds_of_parts)

    def attached(table: LatencyTable) -> Any:
        again = copy.deepcopy(codec)
        return attach(again, "magnitude", budget=BUDGET, latency=table, round_to=1)

    table = nip.refine_latency(codec, table_of(codec), lambda table: attached(table).keep())
    cost: Any = TimedCost(codec, groups, table)
    least: Any = cost.totals(attached(table).keep())
    assert least.decode_s <= BUDGET["decode_s"] * cost.original.decode_s
    for group in groups.prunable():
        times = [cost.totals({group.name: width}).decode_s for width in range(1, group.width + 1)]
        assert times == sorted(times)


def test_widths_that_stay_are_timed_once(timed: list[nn.Module]) -> None:
    codec, groups = built("bmshj2018-hyperprior")
    keep = {g.name: list(range(g.width)) for g in groups.prunable()} | {"g_s.0": [0, 1, 2]}
    first = table_of(codec)
    table = nip.refine_latency(codec, first, lambda table: keep)
    assert len(timed) == 1
    for part, times in table.parts.items():
        narrowed = part == "g_s"
        assert len(times.seconds) == len(first.parts[part].seconds) + narrowed
        assert not narrowed or times.widths[-1]["g_s.0"][0] == 3


def test_codecs_are_really_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TURNS", "LIMIT"):
        monkeypatch.setattr(latency, name, 1)
    codec = built("bmshj2018-hyperprior")[0]
    table = table_of(codec)
    table = table.model_copy(
        update={"runtime": table.runtime.model_copy(update={"size": (64, 64), "threads": 1})}
    )
    keep = {g.name: [0] for g in nip.analyse(codec).prunable()}
    refined = nip.refine_latency(codec, table, lambda table: keep)
    for part, times in refined.parts.items():
        assert len(times.seconds) == len(table.parts[part].seconds) + 1
        assert times.seconds[-1] > 0 and times.widths[-1] not in table.parts[part].widths
