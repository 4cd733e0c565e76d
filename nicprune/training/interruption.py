"""Ctrl-C and SIGTERM during training: the step is finished first, so that a checkpoint can be
written.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruption:
    """The first signal that asked training to stop; None so far."""

    def __init__(self) -> None:
        self.signal: int | None = None


@contextmanager
def deferred_signals(*, enabled: bool = True) -> Iterator[Interruption]:
    """Record SIGINT and SIGTERM inside the block instead of ending the process.

    A second signal ends the process as it would have without this block. Signals that the program
    handles itself are left to it, and so are all signals outside the main thread, where Python
    cannot handle them.
    """
    asked = Interruption()
    default: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    replaced: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in replaced.items():
            signal.signal(number, handler)

    def record(number: int, frame: FrameType | None) -> None:
        asked.signal = number
        restore()

    if enabled and threading.current_thread() is threading.main_thread():
        replaced = {n: h for n, h in default.items() if signal.getsignal(n) == h}
        for number in replaced:
            signal.signal(number, record)
    try:
        yield asked
    finally:
        restore()
