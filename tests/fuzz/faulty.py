"""Inputs that show each fault: the fuzzer itself is tested by them."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from nicprune.common.errors import FileError

from .trial import Believed, Verdict


def _raise(error: Exception) -> None:
    raise error


def _spin() -> None:
    while True:
        pass


WAYS: dict[str, tuple[Verdict, Callable[[], object]]] = {
    "nothing": (Verdict.ACCEPTED, lambda: None),
    "a line": (Verdict.REFUSED, lambda: _raise(FileError("a line"))),
    "two lines": (Verdict.UNCLEAR, lambda: _raise(FileError("two\nlines"))),
    "a long line": (Verdict.UNCLEAR, lambda: _raise(FileError("x" * 5000))),
    "advice": (Verdict.UNCLEAR, lambda: _raise(FileError("set weights_only=False"))),
    "believed": (Verdict.BELIEVED, lambda: _raise(Believed("damaged"))),
    "a bug": (Verdict.CRASHED, lambda: _raise(KeyError("a bug"))),
    "the end": (Verdict.CRASHED, lambda: sys.exit(0)),
    "a sudden end": (Verdict.CRASHED, lambda: os._exit(0)),
    "a signal": (Verdict.CRASHED, lambda: os.kill(os.getpid(), signal.SIGSEGV)),
    "no end": (Verdict.SLOW, _spin),
    "a wait": (Verdict.SLOW, lambda: time.sleep(3600)),
    "memory": (Verdict.LARGE, lambda: bytearray(b"a") * (1 << 30)),
    "more than there is": (Verdict.LARGE, lambda: bytearray(1 << 40)),
}
"""What is done, and what the fuzzer must say of it."""


class Inputs:
    """Some of each."""

    lines = 1

    def make(self, draw: random.Random) -> tuple[str, Any]:
        way = draw.choice([*WAYS])
        return way, way

    def use(self, given: Any) -> None:
        WAYS[given][1]()
