"""The bench: which parts run, which samples count, what is said. Never how long anything takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from compressai.models import ScaleHyperprior

import nicprune.bench.suite as bench
import nicprune.evaluation.timer as sampling
from nicprune.common.errors import RecipeError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that functions advance themselves."""
    now = [0.0]
    monkeypatch.setattr(sampling.time, "perf_counter", lambda: now[0])
    return now


def test_turns_during_which_others_were_busy_do_not_count(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([0.0, 0.5, 0.0, 0.02, 0.3, 0.1])
    pending: list[float] = []

    def processor() -> tuple[float, float, float]:
        if not pending:  # before a turn
            pending.append(next(readings))
            return 0.0, 0.0, 0.0
        return pending.pop(), 1.0, 0.0

    monkeypatch.setattr(sampling, "processor_time", processor)
    # The first call of each is the warm-up, long enough not to be repeated; busy turns are slow, as
    # they would be.
    durations = {"a": iter([9, 1, 50, 3, 2, 50, 2]), "b": iter([9, 2, 90, 6, 4, 90, 4])}

    def advance(name: str) -> None:
        clock[0] += next(durations[name])

    timer = sampling.QuietTimer(repeats=4, limit=1e9)
    assert timer.medians([lambda: advance("a"), lambda: advance("b")]) == [2, 4]
    assert (timer.kept, timer.rejected, timer.busy) == (4, 2, False)


def test_a_machine_that_is_never_quiet_gives_the_least_disturbed_and_says_so(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.9, 0.4, 0.8, 0.5, 0.9, 0.9])
    monkeypatch.setattr(sampling, "others_share", lambda before, after: next(shares))
    durations = iter([1, 9, 1, 9, 3, 9, 9])

    def advance() -> None:
        clock[0] += next(durations)

    timer = sampling.QuietTimer(repeats=2, limit=35)
    assert timer.medians([advance]) == [2]
    result = timer.measure("figure", 2.0, "x", detail="detail")
    assert (result.kept, result.rejected, result.busy) == (2, 4, True)
    text = bench.format_bench([result])
    assert "2 of 6, busy" in text and "run again on a quiet machine" in text


def test_some_quiet_turns_are_enough_when_time_is_up(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.0, 0.9, 0.1, 0.9, 0.0])
    monkeypatch.setattr(sampling, "others_share", lambda before, after: next(shares))
    durations = iter([1, 2, 50, 3, 50, 4])

    def advance() -> None:
        clock[0] += next(durations)

    timer = sampling.QuietTimer(repeats=7, limit=108, least=3)
    assert timer.medians([advance]) == [3]
    assert (timer.kept, timer.rejected, timer.busy) == (3, 2, False)


def test_short_functions_are_called_until_a_sample_lasts_long_enough(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processor time is counted in ticks: a sample shorter than one would always look quiet."""
    lasts: list[float] = []

    def processor() -> tuple[float, float, float]:
        lasts.append(clock[0])
        return clock[0], clock[0], clock[0]

    monkeypatch.setattr(sampling, "processor_time", processor)
    setting_up = iter([5.0, *[0.0] * 10_000])

    def short() -> None:
        clock[0] += 0.004

    def slow_at_first() -> None:
        clock[0] += 0.002 + next(setting_up) * 0.01

    assert sampling.QuietTimer(repeats=2).medians([short, slow_at_first]) == pytest.approx(
        [0.004, 0.002]
    )
    assert all(
        after - before >= 2 * sampling.SHORTEST - 1e-9
        for before, after in zip(lasts[::2], lasts[1::2], strict=True)
    )


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        ((0, 0, 0), (10, 20, 10), 0.0),
        ((0, 0, 0), (15, 20, 10), 0.25),
        ((5, 10, 5), (5, 10, 5), 0.0),
        (None, (1, 1, 1), None),
        ((0, 0, 0), (1, 2, 3), 0.0),
    ],
)
def test_share_of_others(
    before: tuple[float, float, float] | None,
    after: tuple[float, float, float],
    share: float | None,
) -> None:
    assert sampling.others_share(before, after) == share


def test_parts_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def part(name: str) -> Iterator[sampling.Measure]:
        ran.append(name)
        yield sampling.Measure(name, 1.0, "x", goal=0.9, at_least=True)

    monkeypatch.setattr(bench, "PARTS", {name: lambda n=name: part(n) for name in bench.PARTS})
    assert (
        [r.name for r in bench.run_bench(["budget", "attach"], progress=False)]
        == ["budget", "attach"]
        == ran
    )
    assert len(bench.run_bench(progress=False)) == len(bench.PARTS)
    with pytest.raises(RecipeError, match="no part 'speed'; did you mean 'speedup'"):
        bench.run_bench(["speed"])


def test_goals_are_said_either_way() -> None:
    text = bench.format_bench(
        [
            sampling.Measure("a", 1.2, "x", 1.05),
            sampling.Measure("b", 0.95, "x", 0.9, at_least=True),
            sampling.Measure("c", 2.0, "x"),
        ]
    )
    assert "<= 1.05 x: not met" in text and ">= 0.9 x: met" in text and "run again" not in text


def test_figures_carry_the_threads_they_were_taken_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def part() -> Iterator[sampling.Measure]:
        yield sampling.QuietTimer().measure("figure", 1.0, "x")

    before = torch.get_num_threads()
    monkeypatch.setattr(bench, "PARTS", {"attach": part})
    results = bench.run_bench(threads=before + 1, progress=False)
    assert results[0].threads == before + 1 and torch.get_num_threads() == before
    assert f"cpu, {before + 1} threads, torch" in bench.format_bench(results)


@pytest.mark.parametrize("part", ["attach", "surgery", "speedup", "precision"])
def test_every_part_says_what_it_measured(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(self: sampling.QuietTimer, functions: Sequence[Callable[[], object]]) -> list[float]:
        for function in functions:
            function()
        self.kept = 1
        return [2.0, 1.0][: len(functions)]

    monkeypatch.setattr(sampling.QuietTimer, "medians", once)
    monkeypatch.setattr(bench, "ZOO", ("bmshj2018-hyperprior",))
    monkeypatch.setattr(bench, "SIZE", (64, 64))
    monkeypatch.setattr(
        bench,
        "_ready",
        lambda name, quality: ScaleHyperprior(64, 96).to(memory_format=torch.channels_last),
    )
    results = bench.run_bench([part], progress=False)
    expected = {
        "attach": (0.5, 1.05, True),
        "surgery": (2.0, 1.0, False),
        "precision": (2.0, None, None),
    }
    for result in results:
        assert (
            result.size
            and result.device == "cpu"
            and result.threads == torch.get_num_threads()
            and result.kept == 1
        )
        if part == "speedup":
            assert result.goal == 0.9 and result.at_least and 2 / result.value > 1.9, (
                "fewer MACs by the budget"
            )
        else:
            assert (result.value, result.goal, result.met) == expected[part]
    assert len(results) == (4 if part == "speedup" else 1)
    assert all(result.name in bench.format_bench(results) for result in results)


@pytest.mark.slow
def test_a_real_part_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SHORTEST", 0.0)
    monkeypatch.setattr(sampling, "processor_time", lambda: None)
    results = list(bench.bench_budget())
    assert len(results) == 6 and all(
        r.value > 0 and r.unit == "s" and r.kept == 3 and r.rejected == 0 for r in results
    )
