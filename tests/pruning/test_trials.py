"""Finding by trials what fails."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest

from nicprune.pruning.trials import Failure, find_failing

NAMES = [f"n{i}" for i in range(64)]


class Trial:
    """Fails where some sets of names are tried whole; suspects as given."""

    def __init__(self, bad: Sequence[set[str]], suspects: Collection[str] = ()):
        self.bad, self.suspects, self.count = bad, suspects, 0

    def __call__(self, names: Sequence[str]) -> Failure | None:
        self.count += 1
        failing = [one for one in self.bad if one <= set(names)]
        return Failure(f"{sorted(failing[0])} fail", self.suspects) if failing else None


@pytest.mark.parametrize("suspects", [(), ("n5", "n9"), ("n9",), NAMES])
def test_each_that_fails_is_found_whatever_is_suspected(suspects: Collection[str]) -> None:
    trial = Trial([{"n5"}, {"n40"}, {"n63"}], suspects)
    assert find_failing(NAMES, trial) == {n: f"['{n}'] fail" for n in ("n5", "n40", "n63")}


def test_nothing_is_found_where_all_pass() -> None:
    trial = Trial([])
    assert find_failing(NAMES, trial) == {} and trial.count == 1
    assert find_failing([], trial) == {} and trial.count == 1


def test_suspects_save_trials() -> None:
    by_halves, suspecting = Trial([{"n40"}]), Trial([{"n40"}], ("n40", "n41"))
    find_failing(NAMES, by_halves)
    find_failing(NAMES, suspecting)
    assert suspecting.count <= 5 < by_halves.count


def test_what_fails_only_together_all_counts() -> None:
    assert set(find_failing(NAMES, Trial([{"n1", "n62"}]))) == set(NAMES)
    # Suspects alone are blamed, if there are any: the rest is tried again by who asks.
    assert set(find_failing(NAMES, Trial([{"n1", "n62"}], ("n1", "n2")))) == {"n1", "n2"}
