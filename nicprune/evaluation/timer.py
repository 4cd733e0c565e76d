"""Reliable times: functions run alternately in one process, and only while no other program keeps
the processor busy.
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
"""Shortest duration of a sample in seconds, reached by repetition: the system counts processor time
in ticks of 10 ms.
"""


@dataclass(frozen=True)
class Measure:
    """One measured value: its unit ("x" for a ratio), goal, input, device and threads.

    Attributes:
        kept, rejected: number of samples that counted, and that were discarded.
        busy: other programs kept the processor busy throughout; the least disturbed samples were
            used.
        known: whether this system reports the load of other programs; if not, every sample counts.
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
        """True if the goal is met; None without a goal."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


class QuietTimer:
    """Timer that keeps the samples during which no other program was busy. One timer makes one
    value.

    A turn is one sample of each function that is compared.

    Args:
        repeats: number of quiet turns to take.
        limit: seconds after which the least disturbed of at least `least` turns are used.
    """

    def __init__(self, repeats: int = 7, limit: float = 15.0, least: int = 3):
        self.repeats, self.limit, self.least = repeats, limit, least
        self.kept = self.rejected = 0
        self.busy, self.known = False, True

    def medians(self, functions: Sequence[Callable[[], Any]]) -> list[float]:
        """Return the median seconds of each function, timed A B A B ...

        A turn during which other programs were busy is discarded as a whole. If there are too few
        quiet turns within the time limit, the least disturbed are used; `busy` is True if any of
        them was not quiet.
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
        """Call `turn` repeatedly; return its results of quiet turns, or of the least disturbed ones
        if there are too few.
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
        """Return a value with this timer's counts."""
        counts: dict[str, Any] = {
            "kept": self.kept,
            "rejected": self.rejected,
            "busy": self.busy,
            "known": self.known,
        }
        return Measure(name, value, unit, threads=torch.get_num_threads(), **counts, **more)


def seconds_of(function: Callable[[], Any], count: int) -> float:
    """Return the seconds that `count` calls take."""
    started = time.perf_counter()
    for _ in range(count):
        function()
    return time.perf_counter() - started


def _calls(function: Callable[[], Any]) -> int:
    """Warm a function up; return the number of calls in one sample."""
    seconds = seconds_of(function, 1)
    if seconds < SHORTEST:  # without the set-up of the first call
        seconds = seconds_of(function, 1)
    return max(1, min(1000, math.ceil(SHORTEST / max(seconds, 1e-6))))
