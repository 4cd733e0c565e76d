"""No input of any kind crashes, hangs, fills the memory, or is believed though it is damaged."""

from __future__ import annotations

import sys

import pytest

from .faulty import WAYS
from .run import KINDS, Broken, Limits, fault, faults, fuzz, generator, summary
from .trial import FINE, Verdict

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is bounded as Linux does"
)

DAILY = {
    "recipes": 15, "codec_files": 150, "headers": 40, "coded_images": 40, "videos": 30,
    "checkpoints": 40, "images": 400,
}  # fmt: skip
"""Inputs of each kind in the daily run."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_of_each_kind(kind: str) -> None:
    check(kind, DAILY[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_of_each_kind(kind: str) -> None:
    check(kind, 10_000)


def check(kind: str, inputs: int) -> None:
    trials = fuzz(kind, range(inputs))
    print(summary(kind, trials))
    assert [trial.number for trial in trials] == [*range(inputs)]
    assert not (found := faults(trials)), "\n" + "\n".join(map(fault, found))
    told = {trial.verdict for trial in trials}
    assert Verdict.REFUSED in told, "nothing was refused"
    # What a digest covers is never accepted when it is damaged.
    assert Verdict.ACCEPTED in told or kind == "codec_files", "nothing was accepted"


def test_the_fuzzer_sees_every_fault() -> None:
    limits = Limits(seconds=2.0, stuck=5.0, memory=1 << 30)
    numbers = range(2484, 2504)  # the shortest in which every way occurs
    trials = fuzz("faulty", numbers, limits=limits)
    assert [trial.number for trial in trials] == [*numbers]
    for trial in trials:
        assert trial.verdict is WAYS[trial.what][0], fault(trial)
        assert trial.message or trial.verdict is Verdict.ACCEPTED
    assert {trial.what for trial in trials} == {*WAYS}
    assert len(faults(trials)) == sum(WAYS[trial.what][0] not in FINE for trial in trials)
    assert len(summary("faulty", trials).splitlines()) == 1 + len(faults(trials))


def test_a_kind_that_cannot_be_made_is_no_fault_of_nicprune() -> None:
    with pytest.raises(Broken, match="before any input"):
        fuzz("nowhere", range(1))


def test_an_input_is_a_function_of_its_number() -> None:
    draws = [generator("images", 0, number).random() for number in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
