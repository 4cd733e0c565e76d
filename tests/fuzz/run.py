"""Trying inputs in processes of their own, under a limit of memory and of time.

A fork server imports torch once; the processes that it forks start in no time, so that each crash
costs one input alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import psutil

from .trial import FINE, Believed, Kind, Trial, Verdict

KINDS = ("recipes", "codec_files", "headers", "coded_images", "videos", "checkpoints", "images")
"""Each is a file of this folder with a class `Inputs`."""


@dataclass(frozen=True)
class Limits:
    """What one input may take.

    Attributes:
        seconds: of processor time. The machine may be busy: other time says nothing.
        stuck: seconds that the process may sleep, waiting for something.
        memory: bytes that the process may hold.
    """

    seconds: float = 10.0
    stuck: float = 60.0
    memory: int = 2 << 30


DEFAULT = Limits()
LONGEST = 1000
"""Characters of a line that a person still reads."""

Say = Callable[[Trial], object]


class Broken(Exception):
    """The fuzzer itself does not work."""


def generator(kind: str, seed: int, number: int) -> random.Random:
    """Return the source of an input's randomness."""
    return random.Random(f"{kind}/{seed}/{number}")


def fuzz(
    kind: str,
    numbers: range,
    seed: int = 0,
    say: Say = lambda trial: None,
    limits: Limits = DEFAULT,
) -> list[Trial]:
    """Try the inputs of these numbers; return what came of each.

    Args:
        kind: one of `KINDS`.
        numbers: of the inputs.
        seed: of all inputs.
        say: called with each trial.
        limits: of each input.
    """
    trials: list[Trial] = []
    while len(trials) < len(numbers):
        for trial in _batch(kind, numbers[len(trials) :], seed, limits):
            trials.append(trial)
            say(trial)
    return trials


def summary(kind: str, trials: list[Trial]) -> str:
    """Return the counts in a line, and a line for each fault."""
    counts = Counter(trial.verdict for trial in trials)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
    return "\n".join([f"{kind}: {len(trials)} inputs: {told}", *map(fault, faults(trials))])


def fault(trial: Trial) -> str:
    """Return a trial as a line of text."""
    message = trial.message.replace("\n", "\\n")
    return f"  {trial.number} {trial.verdict}: {trial.what}: {message}"


def faults(trials: list[Trial]) -> list[Trial]:
    """Return the trials that show a fault of nicprune's."""
    return [trial for trial in trials if trial.verdict not in FINE]


def _batch(kind: str, numbers: range, seed: int, limits: Limits) -> Iterator[Trial]:
    """Try inputs in one process, until it is done or has to be ended."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nicprune.experiments.run", "nicprune.storage.container"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, kind, numbers, seed, limits), daemon=True)
    process.start()
    sender.close()
    tried = False
    try:
        for trial in _told(receiver, process, limits):
            tried = True
            yield trial
    finally:
        process.kill()
        process.join()
    if not tried:
        raise Broken(f"{kind}: the process ended with status {process.exitcode} before any input")


def _told(receiver: Connection, process: Any, limits: Limits) -> Iterator[Trial]:
    """Yield what the process tells, and what it cannot tell of itself."""
    begun: tuple[int, str] | None = None
    used = since = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        watched = psutil.Process(process.pid)
    while True:
        if not receiver.poll(0.5):
            if begun is None:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                spent = _processor_time(watched) - used
                if watched.status() != psutil.STATUS_SLEEPING:  # others may have the processor
                    since = time.monotonic()
                if spent > limits.seconds or time.monotonic() - since > limits.stuck:
                    yield Trial(*begun, Verdict.SLOW, f"ended after {spent:.0f} s")
                    return
            continue
        try:
            told = receiver.recv()
        except (EOFError, ConnectionError):
            process.join()
            if begun is not None:
                ended = f"the process ended with status {process.exitcode}"
                yield Trial(*begun, Verdict.CRASHED, ended)
            return
        if isinstance(told, Trial):
            begun = None
            yield told
            if told.verdict is Verdict.LARGE:  # its peak would count for the inputs that follow
                return
        else:
            begun, since = told, time.monotonic()
            with contextlib.suppress(psutil.NoSuchProcess):
                used = _processor_time(watched)


def _processor_time(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _work(sender: Connection, kind: str, numbers: range, seed: int, limits: Limits) -> None:
    """Try inputs, and tell of each that it begins and what came of it."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Twice as much as it may hold: what is not touched does not count, but must not grow either.
    size = psutil.Process().memory_info().vms + 2 * limits.memory
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(os.devnull, "w") as nowhere, tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/inner")  # what else lies beside it, as "..", is no part of an input
        os.chdir(f"{folder}/inner")
        os.dup2(nowhere.fileno(), 1)  # libtiff and libpng write to these
        os.dup2(nowhere.fileno(), 2)
        inputs: Kind = import_module(f".{kind}", __package__).Inputs()
        for number in numbers:
            what, given = inputs.make(generator(kind, seed, number))
            sender.send((number, what))
            trial = _try(inputs, number, what, given, limits)
            sender.send(trial)
            if trial.verdict is Verdict.LARGE:
                break
        os.chdir("/")


def _try(inputs: Kind, number: int, what: str, given: Any, limits: Limits) -> Trial:
    from nicprune.common.errors import NicpruneError

    verdict, message, started = Verdict.ACCEPTED, "", time.process_time()
    try:
        inputs.use(given)
    except Believed as error:
        verdict, message = Verdict.BELIEVED, str(error)
    except NicpruneError as error:
        message = str(error)
        verdict = Verdict.REFUSED if _is_clear(message, inputs.lines) else Verdict.UNCLEAR
    except BaseException as error:
        verdict = Verdict.CRASHED
        place = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/nicprune/" in f.filename]
        message = f"{type(error).__name__}: {str(error)[:200]} ({_name(own[-1:])}{_name([place])})"
    spent, held = time.process_time() - started, _peak()
    if held > limits.memory or "more memory than there is" in message or "MemoryError" in message:
        verdict, message = Verdict.LARGE, f"{held >> 20} MiB at the most; {message}"
    elif spent > limits.seconds:
        verdict, message = Verdict.SLOW, f"{spent:.0f} s; {message}"
    return Trial(number, what, verdict, message[:2000])


def _name(frames: list[Any]) -> str:
    return "".join(f"{os.path.basename(f.filename)}:{f.lineno} " for f in frames)


def _is_clear(message: str, lines: int) -> bool:
    told = message.split("\n")
    return (
        len(told) <= lines
        and all(0 < len(line) <= LONGEST for line in told)
        and "Traceback" not in message
        and "weights_only" not in message
    )


def _peak() -> int:
    """Return the largest number of bytes that this process has held."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
