"""Times that can be trusted: taken in turns in one process, while nothing else kept the processor
busy.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from nicprune.common.machine import BUSY, others_share, processor_time

T = TypeVar("T")

SHORTEST = 0.1
"""Seconds that a sample lasts at least, by repetition: the system counts processor time in ticks of
10 ms.
"""


@dataclass(frozen=True)
class Measure:
    """One figure: its value, its unit ("x" for a ratio), its goal, on what input, device and
    threads it was taken.

    Attributes:
        kept, rejected: how many samples counted, and how many were thrown away.
        busy: others kept the processor busy throughout; the least disturbed samples were taken.
        known: whether this system says what others use; where it does not, every sample counts.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None
    at_least: bool = False
    detail: str = ""
    size: str = ""
    device: str = "cpu"
    threads: int = 0
    kept: int = 0
    rejected: int = 0
    busy: bool = False
    known: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


class QuietTimer:
    """Times functions in turns; keeps the samples during which the machine was ours. One sampler
    makes one figure.

    Args:
        repeats: how many quiet turns are wanted.
        limit: seconds after which the least disturbed of at least `least` turns have to do.
    """

    def __init__(self, repeats: int = 7, limit: float = 15.0, least: int = 3):
        self.repeats, self.limit, self.least = repeats, limit, least
        self.kept = self.rejected = 0
        self.busy, self.known = False, True

    def medians(self, functions: Sequence[Callable[[], Any]]) -> list[float]:
        """Median seconds of each function, timed A B A B ...; all of a turn is thrown away if
        others were busy during it.

        Where quiet turns do not come within the time limit, the least disturbed are taken, and
        `busy` says so if any of them was not.
        """
        calls = [_calls(function) for function in functions]
        taken = self.quiet(
            lambda: [
                seconds_of(function, count) / count
                for function, count in zip(functions, calls, strict=True)
            ]
        )
        return [statistics.median(seconds[i] for seconds in taken) for i in range(len(functions))]

    def quiet(self, turn: Callable[[], T]) -> list[T]:
        """What `turn` returned each time that nobody else was busy; where that is too seldom, the
        least disturbed times.
        """
        started = time.perf_counter()
        turns: list[tuple[float, T]] = []
        while sum(share <= BUSY for share, _ in turns) < self.repeats:
            if len(turns) >= self.least and time.perf_counter() - started > self.limit:
                break
            before = processor_time()
            result = turn()
            share = others_share(before, processor_time())
            self.known &= share is not None
            turns.append((share or 0.0, result))
        quiet = sum(share <= BUSY for share, _ in turns)
        taken = sorted(turns, key=lambda one: one[0])[
            : quiet if quiet >= min(self.least, self.repeats) else self.repeats
        ]
        self.busy = quiet < len(taken)
        self.kept, self.rejected = len(taken), len(turns) - len(taken)
        return [result for _, result in taken]

    def measure(self, name: str, value: float, unit: str, **more: Any) -> Measure:
        """A result with this sampler's counts."""
        counts: dict[str, Any] = {
            "kept": self.kept,
            "rejected": self.rejected,
            "busy": self.busy,
            "known": self.known,
        }
        return Measure(name, value, unit, threads=torch.get_num_threads(), **counts, **more)


def seconds_of(function: Callable[[], Any], count: int) -> float:
    """Seconds that so many calls take."""
    started = time.perf_counter()
    for _ in range(count):
        function()
    return time.perf_counter() - started


def _calls(function: Callable[[], Any]) -> int:
    """Warm a function up, and say how often a sample has to call it."""
    seconds = seconds_of(function, 1)
    if seconds < SHORTEST:  # what the first call set up does not count
        seconds = seconds_of(function, 1)
    return max(1, min(1000, math.ceil(SHORTEST / max(seconds, 1e-6))))
