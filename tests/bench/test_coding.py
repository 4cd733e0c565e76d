"""The bench of entropy coding: what is measured, and that both ways code the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import built

from nicprune.bench import coding
from nicprune.bench.suite import PARTS
from nicprune.codecs import kernels, rans
from nicprune.evaluation.timer import QuietTimer

PARTS_OF_A_HYPERPRIOR = 5


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """What the functions that are compared return, each timed as its place and a half."""
    found: list[list[Any]] = []

    def timed(works: Sequence[Callable[[], Any]], repeats: int = 7) -> tuple[QuietTimer, Any]:
        found.append([work() for work in works])
        return QuietTimer(1), [len(works) - i + 0.5 for i in range(len(works))]

    monkeypatch.setattr(coding, "_timed", timed)
    monkeypatch.setattr(coding, "_codec", lambda name: tiny(name))
    return found


def tiny(name: str) -> Any:
    codec: Any = built(name)[0]
    codec.update(force=True)
    return codec


def test_every_part_and_every_codec_is_measured(results: list[list[Any]]) -> None:
    measures = list(coding.bench_coding((64, 128)))
    assert PARTS["coding"] is coding.bench_coding
    names = [m.name for m in measures]
    assert len(set(names)) == len(names) == PARTS_OF_A_HYPERPRIOR + 1 + 2 * 3 + 3
    for name in (*coding.HYPERPRIORS, *coding.CONTEXT_MODELS):
        assert sum(n.startswith(name) for n in names) >= 4
    for measure in measures:
        whole = "transforms" in measure.name
        assert measure.value == pytest.approx(2.5 / 1.5 if whole else 3.5 / 1.5)
        assert measure.size == "128x64" and measure.unit == "x"
        assert ("not installed" in measure.detail) != kernels.COMPILED
    for one in results[:PARTS_OF_A_HYPERPRIOR]:
        for other in one[1:]:
            same = (
                torch.equal(one[0], other) if isinstance(other, torch.Tensor) else one[0] == other
            )
            assert same, "the same tables, strings and latents"
    written = results[PARTS_OF_A_HYPERPRIOR]
    assert isinstance(written[0], bytes) and written[0] == written[1] == written[2]


def test_the_three_ways_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bmshj2018-hyperprior").gaussian_conditional
    own = type(model).build_indexes

    def look() -> tuple[bool, bool]:
        return type(model).build_indexes is own, rans.compiled() is None

    assert coding._own(look)()[0]
    assert coding._without(look)() == (False, True)
    assert coding._quick(look)() == (False, not kernels.COMPILED)
