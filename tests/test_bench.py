"""The bench: which parts run, which samples count, what is said. Never how long anything takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import nicprune.bench as bench
from nicprune.errors import RecipeError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that functions advance themselves."""
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    return now


def test_turns_during_which_others_were_busy_do_not_count(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0.0, 0.5, 0.0, 0.02, 0.3, 0.1])
    pending: list[float] = []

    def processor() -> tuple[float, float, float]:
        if not pending:  # before a turn
            pending.append(next(readings))
            return 0.0, 0.0, 0.0
        return pending.pop(), 1.0, 0.0

    monkeypatch.setattr(bench, "_processor_time", processor)
    # The first call of each is the warm-up; busy turns are slow, as they would be.
    durations = {"a": iter([9, 1, 50, 3, 2, 50, 2]), "b": iter([9, 2, 90, 6, 4, 90, 4])}

    def advance(name: str) -> None:
        clock[0] += next(durations[name])

    sampler = bench.Sampler(repeats=4)
    assert sampler.medians([lambda: advance("a"), lambda: advance("b")]) == [2, 4]
    assert (sampler.kept, sampler.rejected, sampler.busy) == (4, 2, False)


def test_a_machine_that_is_never_quiet_gives_the_least_disturbed_and_says_so(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.9, 0.4, 0.8, 0.5, 0.9, 0.9])
    monkeypatch.setattr(bench, "others_share", lambda before, after: next(shares))
    durations = iter([0, 9, 1, 9, 3, 9, 9])

    def advance() -> None:
        clock[0] += next(durations)

    sampler = bench.Sampler(repeats=2, patience=3)
    assert sampler.medians([advance]) == [2]
    result = sampler.measure("figure", 2.0, "x", detail="detail")
    assert sampler.busy and (result.kept, result.rejected) == (2, 4) and "machine busy" in result.detail


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [((0, 0, 0), (10, 20, 10), 0.0), ((0, 0, 0), (15, 20, 10), 0.25), ((5, 10, 5), (5, 10, 5), 0.0), (None, (1, 1, 1), 0.0), ((0, 0, 0), (1, 2, 3), 0.0)],
)
def test_share_of_others(before: tuple[float, float, float] | None, after: tuple[float, float, float], share: float) -> None:
    assert bench.others_share(before, after) == share


def test_parts_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def part(name: str) -> Iterator[bench.Measure]:
        ran.append(name)
        yield bench.Measure(name, 1.0, "x", goal=0.9, at_least=True)

    monkeypatch.setattr(bench, "PARTS", {name: (lambda n=name: part(n)) for name in bench.PARTS})
    assert [r.name for r in bench.run_bench(["budget", "attach"], progress=False)] == ["budget", "attach"] == ran
    assert len(bench.run_bench(progress=False)) == 5
    with pytest.raises(RecipeError, match="no part 'speed'; did you mean 'speedup'"):
        bench.run_bench(["speed"])


def test_goals_are_said_either_way() -> None:
    text = bench.format_bench([bench.Measure("a", 1.2, "x", 1.05), bench.Measure("b", 0.95, "x", 0.9, at_least=True), bench.Measure("c", 2.0, "x")])
    assert "<= 1.05 x: not met" in text and ">= 0.9 x: met" in text and "threads" in text


def test_a_real_part_runs() -> None:
    results = list(bench.bench_budget())
    assert len(results) == 6 and all(r.value > 0 and r.unit == "s" for r in results)
