"""The pace towards a budget: the planned line, the rate that follows it, rates of channels."""

from __future__ import annotations

import pytest
import torch

from nicprune.pruning.budget_controller import (
    FASTEST,
    SPREAD,
    STEER,
    deviations,
    relative_rates,
    steer,
)
from nicprune.pruning.totals import Totals

WHOLE = Totals(macs=1000, encoder=600, decoder=400, params=50)


@pytest.mark.parametrize("planned", [0.0, 0.3, 1.0])
def test_on_the_line_nothing_deviates(planned: float) -> None:
    limits = {"macs": 400.0, "encoder": 300.0}
    on_line = {"macs": 1000 - planned * 600, "encoder": 600 - planned * 300}
    assert deviations(on_line.__getitem__, WHOLE, limits, planned) == pytest.approx([0, 0])
    above = deviations(lambda name: on_line[name] + 60, WHOLE, limits, planned)
    assert above == pytest.approx([0.1, 0.2])


def test_a_way_of_nothing_is_not_divided_by() -> None:
    (found,) = deviations(lambda name: 1010.0, WHOLE, {"macs": 1000.0}, 0.5, least_way=0.01)
    assert found == pytest.approx((1010 - (1000 - 0.5 * 10)) / 10)


def test_the_rate_rises_where_the_cost_is_too_high_and_stays_in_bounds() -> None:
    rate = torch.tensor(0.1)
    steer(rate, 0.0, slowest=1e-4)
    assert rate.item() == pytest.approx(0.1)
    steer(rate, 5.0, slowest=1e-4)
    assert rate.item() == pytest.approx(0.1 * torch.tensor(STEER).exp().item())
    for _ in range(200):
        steer(rate, 1.0, slowest=1e-4)
    assert rate.item() == pytest.approx(FASTEST)
    for _ in range(1000):
        steer(rate, -1.0, slowest=1e-3)
    assert rate.item() == pytest.approx(1e-3)


def test_several_rates_are_steered_apart() -> None:
    rates = torch.tensor([0.1, 0.1, 0.1])
    steer(rates, torch.tensor([-1.0, 0.0, 1.0]).numpy(), slowest=1e-4)
    assert rates[0] < 0.1 < rates[2] and rates[1].item() == pytest.approx(0.1)


def test_rates_follow_macs_over_importance_around_their_median() -> None:
    price, importance = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 1.0])
    assert relative_rates(price, importance).tolist() == pytest.approx([0.5, 1.0, 2.0])
    assert relative_rates(importance, price).tolist() == pytest.approx([2.0, 1.0, 0.5])
    extreme = relative_rates(torch.tensor([1.0, 1.0, 1e9]), torch.tensor([1e9, 1.0, 0.0]))
    assert extreme.tolist() == pytest.approx([1 / SPREAD, 1.0, SPREAD])
