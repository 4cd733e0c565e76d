"""Rates as positions among trained lambdas, and the header they travel in."""

from __future__ import annotations

import copy
import math
import struct
from typing import Any

import pytest
import torch

from nicprune.common.errors import FileError, RecipeError
from nicprune.methods.levels import Levels

TRAINED = [
    (0.0018, 0.0035),
    (0.0018, 0.0067, 0.18),
    (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483, 0.0932, 0.18),
    (2.4, 8.73, 220.0),
]


@pytest.fixture(params=TRAINED, ids=len)
def levels(request: pytest.FixtureRequest) -> Levels:
    return Levels(request.param)


def test_a_lambda_and_its_level_lead_to_each_other(levels: Levels) -> None:
    for place in torch.linspace(0, levels.top, 6 * levels.top + 1).tolist():
        lmbda = float(levels.lmbda(torch.tensor(place)))
        # float32's exp may leave the range by a rounding; what lies that near is the end.
        assert levels.resolve(
            lmbda=min(max(lmbda, levels.lambdas[0]), levels.lambdas[-1])
        ) == pytest.approx(place, abs=1e-5)
    for number, lmbda in enumerate(levels.lambdas):
        inside = [
            x
            for x in (lmbda, float(torch.tensor(lmbda)), float(f"{lmbda:g}"))
            if levels.lambdas[0] <= x <= levels.lambdas[-1]
        ]
        assert [levels.resolve(lmbda=x) for x in inside] == [number] * len(
            inside
        )  # exactly, so that both write the same header
        assert levels.resolve(number) == number
        assert float(levels.lmbda(torch.tensor(float(number)))) == pytest.approx(lmbda, rel=1e-6)


def test_between_two_trained_rates_lambda_is_geometric(levels: Levels) -> None:
    for number in range(levels.top):
        below, above = levels.lambdas[number : number + 2]
        for share in (0.25, 0.5, 0.9):
            expected = below ** (1 - share) * above**share
            assert float(levels.lmbda(torch.tensor(number + share))) == pytest.approx(
                expected, rel=1e-5
            )
            assert levels.resolve(lmbda=expected) == pytest.approx(number + share, abs=1e-9)


def test_each_of_several_levels_has_its_lambda(levels: Levels) -> None:
    places = torch.linspace(0, levels.top, 11)
    found = levels.lmbda(places)
    assert found.shape == places.shape and bool((found.diff() > 0).all())
    assert found.tolist() == [float(levels.lmbda(place)) for place in places]


def test_without_a_wish_it_is_the_highest(levels: Levels) -> None:
    assert levels.resolve() == levels.top == len(levels) - 1 == float(Levels(levels.lambdas).now)
    levels.assign(0)
    levels.assign(levels.resolve())
    assert float(levels.now) == levels.top


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"level": -0.01}, ["-0.01", "0 (lambda 0.0018) to 2 (0.18)"]),
        ({"level": 2.01}, ["2.01", "0 (lambda 0.0018) to 2 (0.18)"]),
        ({"level": math.nan}, ["nan", "0 (lambda 0.0018) to 2 (0.18)"]),
        ({"lmbda": 0.0017}, ["0.0017", "0.0018 to 0.18"]),
        ({"lmbda": 0.181}, ["0.181", "0.0018 to 0.18"]),
        ({"lmbda": 0.0}, ["lmbda 0 ", "0.0018 to 0.18"]),
        ({"lmbda": -1.0}, ["-1", "0.0018 to 0.18"]),
        ({"lmbda": math.nan}, ["nan", "0.0018 to 0.18"]),
        ({"level": 1, "lmbda": 0.0067}, ["level or lmbda, not both", "1", "0.0067"]),
    ],
)
def test_a_rate_that_it_does_not_have_is_refused(wish: dict[str, float], said: list[str]) -> None:
    levels = Levels(TRAINED[1])
    levels.assign(0.5)
    with pytest.raises(RecipeError) as error:
        levels.resolve(**wish)
    assert all(part in str(error.value) for part in said) and "\n" not in str(error.value)
    assert float(levels.now) == 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_batch_draws_from_all_rates_evenly(levels: Levels, count: int) -> None:
    torch.manual_seed(0)
    drawn = []
    for _ in range(60):
        levels.draw(count)
        assert levels.now.shape == (count,)
        drawn.append(levels.now / levels.top)
    together = torch.stack(drawn)
    assert float(together.min()) >= 0 and float(together.max()) <= 1
    # Each batch has one image in each count-th of the range...
    assert all(
        sorted((batch * count).long().clamp(max=count - 1).tolist()) == list(range(count))
        for batch in drawn
    )
    # ...any image may be it, and all of it is drawn from.
    for image in together.T:
        assert sorted(set((image * count).long().clamp(max=count - 1).tolist())) == list(
            range(count)
        )
    histogram = torch.histc(together, bins=5, min=0, max=1)
    assert float(histogram.min()) >= 0.5 * together.numel() / 5


def test_draws_follow_the_seed(levels: Levels) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        levels.draw(4)
        found.append(levels.now)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_what_is_written_is_read(levels: Levels) -> None:
    other = Levels(levels.lambdas)
    for place in torch.linspace(0, levels.top, 37).tolist():
        header = levels.write(place)
        assert isinstance(header, bytes) and len(header) == 2
        # The encoder codes at the very level that the decoder reads, a 16-bit step from the one
        # asked for at the most.
        assert other.read(header) == pytest.approx(float(other.now), rel=1e-6) and torch.equal(
            other.now, levels.now
        )
        assert abs(float(levels.now) - place) <= 0.51 * levels.top / 65535
    assert other.read(levels.write(levels.top)) == levels.top and other.read(levels.write(0)) == 0
    middle = math.sqrt(levels.lambdas[0] * levels.lambdas[1])
    assert other.read(levels.write(levels.resolve(lmbda=middle))) == pytest.approx(
        0.5, abs=levels.top / 65535
    )


def test_every_header_is_a_level_of_its_own(levels: Levels) -> None:
    for code in [*range(0, 65536, 257), 65535]:
        header = struct.pack(">H", code)
        assert levels.write(levels.read(header)) == header


@pytest.mark.parametrize("header", [b"", b"\x00", b"\x00\x00\x00", "ab", 7, None, [b"\x00\x00"]])
def test_what_is_no_header_is_refused(header: Any) -> None:
    levels = Levels(TRAINED[0])
    levels.assign(0.25)
    with pytest.raises(FileError, match="does not start with a rate") as error:
        levels.read(header)
    assert "\n" not in str(error.value) and float(levels.now) == 0.25


def test_a_copy_is_independent(levels: Levels) -> None:
    twin = copy.deepcopy(levels)
    twin.assign(0)
    assert float(levels.now) == levels.top
