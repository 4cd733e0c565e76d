"""Budgets of time, by tables that are made up here: what is predicted, met, refused and kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import built
from helpers_latency import table_of
from torch import nn

from nicprune import save
from nicprune.channels.groups import Groups
from nicprune.codecs.provenance import provenance
from nicprune.common.errors import BudgetError, FileError, NicpruneError, RecipeError
from nicprune.methods import attach
from nicprune.pruning.budget import Budget
from nicprune.pruning.cost import CostModel
from nicprune.pruning.latency import TimedCost, _Times
from nicprune.pruning.latency_table import LatencyTable, LayerTimes, PartTimes, Runtime
from nicprune.pruning.surgery import prune
from nicprune.runtime.equal_time import macs_of_equal_time
from nicprune.storage.checkpoint import load


@pytest.fixture
def tiny() -> tuple[nn.Module, Groups, LatencyTable]:
    codec, groups = built("bmshj2018-hyperprior")
    codec = copy.deepcopy(codec)
    return codec, groups, table_of(codec)


def test_parts_take_what_was_measured_and_the_rest_is_constant(tiny: Any) -> None:
    codec, groups, table = tiny
    cost = TimedCost(codec, groups, table)
    whole: Any = cost.totals()
    assert whole.encode_s == pytest.approx(4 + 3 * 30) and whole.decode_s == pytest.approx(5 + 60)
    halves = {g.name: g.width // 2 for g in groups.prunable(latents=True)}
    half: Any = cost.totals(halves)
    assert half.encode_s == pytest.approx(4 + 3 * 9) and half.decode_s == pytest.approx(5 + 18)
    assert half.as_dict() == CostModel(codec, groups).totals(halves).as_dict()
    assert cost.soft(cost.widths(halves).astype(float), "decode_s") == half.decode_s
    assert cost.soft(cost.widths().astype(float), "macs") == whole.macs


def test_layers_are_bilinear_between_the_widths_that_were_measured() -> None:
    times = LayerTimes(outputs=[2, 4], inputs=[1, 3, 5], seconds=[[1, 2, 4], [2, 3, 8]])
    part = PartTimes(sides=["decode_s"], widths=[{"a": (4, 5)}], seconds=[8])
    table = LatencyTable(
        runtime=Runtime(), machine="", layers={"a": times}, parts={"a": part},
        rest={"encode_s": 0, "decode_s": 0},
    )  # fmt: skip
    found = _Times(table)

    def at(out: float, inn: float) -> float:
        return found.seconds(np.array([out]), np.array([inn]))[1]

    assert [at(2, 1), at(4, 5), at(2, 2), at(3, 1)] == [1, 8, 1.5, 1.5]
    assert at(3, 4) == pytest.approx((2 + 4 + 3 + 8) / 4)
    assert at(1, 0) == 1, "as long as at the least width"


@pytest.mark.parametrize("round_to", [1, 5])
def test_a_decrease_is_the_difference_of_times(tiny: Any, round_to: int) -> None:
    codec, groups, table = tiny
    cost, rng = TimedCost(codec, groups, table), np.random.default_rng(round_to)
    for _ in range(20):
        widths = np.array([rng.integers(2, g.width + 1) for g in groups])
        deltas = np.minimum(rng.integers(0, round_to + 1, len(groups)), widths - 1)
        for what in ("encode_s", "decode_s"):
            found = cost.decreases(widths, deltas, what)
            for i in range(len(groups)):
                less = widths.copy()
                less[i] -= deltas[i]
                expected = getattr(cost.totals(widths), what) - getattr(cost.totals(less), what)
                assert found[i] == pytest.approx(expected, abs=1e-9)
                assert found[i] >= 0
    assert (
        cost.decreases(widths, deltas, "macs")
        == CostModel(codec, groups).decreases(widths, deltas, "macs")
    ).all()


def test_more_channels_are_never_faster(tiny: Any) -> None:
    codec, groups, table = tiny
    noisy = {
        name: times.model_copy(update={"seconds": times.seconds[::-1]})
        for name, times in table.layers.items()
    }
    cost = TimedCost(codec, groups, table.model_copy(update={"layers": noisy}))
    rng = np.random.default_rng(0)
    for _ in range(20):
        widths = np.array([rng.integers(2, g.width + 1) for g in groups])
        assert (cost.decreases(widths, np.ones_like(widths), "decode_s") >= 0).all()


BUDGETS = [
    {"decode_s": 0.6},
    {"encode_s": 0.7},
    {"encode_s": 0.8, "decode_s": 0.5},
    {"decode_s": 0.7, "macs": 0.5},
]


@pytest.mark.parametrize("method", ["magnitude", "random", "fisher", "netadapt"])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_one_shot_methods_meet_budgets_of_time_from_below(
    tiny: Any, method: str, budget: dict[str, float]
) -> None:
    codec, groups, table = tiny
    attached = attach(codec, method, budget=budget, round_to=2, latency=table)
    attached.prepare([torch.rand(1, 3, 64, 64)])
    keep, cost = attached.keep(), attached.cost
    totals, original = cost.totals(keep), cost.original
    limits = Budget(**budget).limits(original)
    assert all(getattr(totals, name) <= limit for name, limit in limits.items())
    for group in groups.prunable():
        if len(keep.get(group.name, range(group.width))) < group.width:
            more = cost.totals({**keep, group.name: len(keep[group.name]) + 2})
            assert any(getattr(more, name) > limit for name, limit in limits.items())


def test_mask_decay_is_steered_to_a_budget_of_time(tiny: Any, tmp_path: Path) -> None:
    codec, _, table = tiny
    masked = attach(
        codec, "mask_decay", budget={"decode_s": 0.6}, round_to=2, decay_steps=8, latency=table
    )
    optimizer = torch.optim.Adam(masked.parameters(), 1e-4)
    for _ in range(8):
        out = masked(torch.rand(1, 3, 64, 64))
        out["x_hat"].square().mean().backward()
        optimizer.step()
        masked.after_step()
    small = masked.harden()
    asked = 0.6 * masked.cost.original.decode_s  # type: ignore[attr-defined]
    history = provenance(small).history[-1]
    assert 0.75 * asked < history["latency"]["decode_s"][1] <= asked
    assert history["latency"]["backend"] == "torch"
    again = load(save(small, tmp_path / "small.safetensors"))
    assert provenance(again).history[-1]["latency"] == history["latency"]


def test_a_resumed_run_goes_on_with_the_times_that_it_began_with(tiny: Any) -> None:
    codec, _, table = tiny
    settings: dict[str, Any] = {"budget": {"decode_s": 0.6}, "round_to": 2, "decay_steps": 8}
    first = attach(codec, "mask_decay", latency=table, **settings)
    state = first.state_dict()
    first.detach()
    other = table.model_copy(update={"rest": {"encode_s": 1.0, "decode_s": 2.0}})
    second = attach(codec, "mask_decay", latency=other, **settings)
    assert second.cost.original != first.cost.original
    second.load_state_dict(state)
    assert second.cost.original == first.cost.original
    assert torch.equal(second.state_dict()["methods.0.latency"], state["methods.0.latency"])


def test_without_a_budget_of_time_nothing_is_kept(tiny: Any) -> None:
    codec, _, _ = tiny
    masked = attach(codec, "mask_decay", budget={"macs": 0.5}, round_to=2)
    assert not any("latency" in name for name in masked.state_dict())
    assert "decode_s" not in masked.methods[0].config.model_dump_json()  # type: ignore[union-attr,operator]


REFUSED: dict[str, tuple[Any, str]] = {
    "no table": (
        lambda codec, table: attach(codec, "magnitude", budget={"decode_s": 0.5}),
        r"latency=nip\.measure_latency\(codec\)",
    ),
    "gates": (
        lambda codec, table: attach(
            codec, "channel_gating", budget={"decode_s": 0.5}, latency=table
        ),
        "gates choose channels image by image",
    ),
    "too little": (
        lambda codec, table: attach(
            codec, "magnitude", budget={"decode_s": 0.05}, round_to=2, latency=table
        ),
        "cannot be met",
    ),
    "another codec": (
        lambda codec, table: attach(
            copy.deepcopy(built("mbt2018")[0]), "magnitude", budget={"decode_s": 0.5},
            latency=table,
        ),
        "times are of another codec",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_one_line(tiny: Any, name: str) -> None:
    codec, _, table = tiny
    call, message = REFUSED[name]
    with pytest.raises(NicpruneError, match=message) as error:
        call(codec, table)
    assert "\n" not in str(error.value)


def test_a_narrower_codec_has_its_own_times(tiny: Any) -> None:
    codec, groups, table = tiny
    small = prune(codec, {"g_a.0": list(range(8))}, groups)
    with pytest.raises(RecipeError, match=r"g_a\.0 was measured with 16 to 3 channels.* has 8"):
        attach(small, "magnitude", budget={"decode_s": 0.5}, latency=table)


def test_at_a_second_pruning_times_are_shares_of_the_original(tiny: Any) -> None:
    codec, _, table = tiny
    small = attach(codec, "magnitude", budget={"macs": 0.8}, round_to=2).harden()
    own = table_of(small).model_copy(update={"original": {"encode_s": 94.0, "decode_s": 200.0}})
    attached = attach(small, "magnitude", budget={"decode_s": 0.3}, round_to=2, latency=own)
    assert attached.cost.totals(attached.keep()).decode_s <= 60  # type: ignore[attr-defined]
    attached.detach()
    with pytest.raises(BudgetError, match="is met already"):
        attach(small, "magnitude", budget={"decode_s": 0.5}, latency=own)


def test_a_table_is_read_as_it_was_written(tiny: Any, tmp_path: Path) -> None:
    table = tiny[2]
    path = table.write(tmp_path / "times.json")
    assert LatencyTable.read(path) == table == LatencyTable.from_bytes(table.as_bytes())


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"a": 1}', '{"runtime": {}}', "NaN"])
def test_a_damaged_table_is_one_line(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "times.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FileError) as error:
        LatencyTable.read(path)
    assert "\n" not in str(error.value)


def test_senseless_tables_are_refused(tiny: Any) -> None:
    content = tiny[2].model_dump()
    senseless: list[dict[str, Any]] = [
        {"rest": {"encode_s": 1.0}},
        {"layers": {}},
        {"rest": {"encode_s": -1.0, "decode_s": 1.0}},
        {"parts": {"g_a": {"sides": [], "widths": [], "seconds": []}}},
    ]
    for change in senseless:
        with pytest.raises(ValueError):
            LatencyTable.model_validate(content | change)
    with pytest.raises(RecipeError, match="LayerTimes: .*increase"):
        LayerTimes(outputs=[4, 2], inputs=[1], seconds=[[1], [2]])
    with pytest.raises(RecipeError, match="LayerTimes: .*rows of 1"):
        LayerTimes(outputs=[2, 4], inputs=[1], seconds=[[1]])


def test_the_macs_of_equal_time_leave_a_codec_as_fast(tiny: Any) -> None:
    codec, _, table = tiny
    attached = attach(codec, "magnitude", budget={"decode_s": 0.6}, round_to=1, latency=table)
    keep, config = attached.keep(), attached.methods[0].config
    found = macs_of_equal_time(attached)
    assert found is not None
    budget, totals = found
    limit: float = 0.6 * attached.cost.original.decode_s  # type: ignore[attr-defined]
    assert list(budget.parts()) == ["decoder"]
    assert 0.85 * limit < totals.decode_s <= limit  # type: ignore[attr-defined]
    assert attached.methods[0].config is config and attached.keep() == keep
    attached.detach()
    by_macs = attach(codec, "magnitude", budget=budget.parts(), round_to=1, latency=table)
    assert by_macs.cost.totals(by_macs.keep()) == totals
    assert macs_of_equal_time(by_macs) is None
