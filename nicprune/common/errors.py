"""Errors for the user. A message says what was found, what was expected and what to do next."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class NicpruneError(Exception):
    """Base class of the errors that this package raises deliberately; the command line prints them
    as one line.
    """


class CodecError(NicpruneError):
    """A codec is unknown, unavailable, or cannot be analysed."""


class SurgeryError(NicpruneError):
    """Keep-lists do not fit the codec, or the smaller codec is not the same function."""


class BudgetError(NicpruneError):
    """A budget cannot be met, or is invalid."""


class FileError(NicpruneError):
    """A file cannot be read or written, or has other contents than expected."""


class DataError(NicpruneError):
    """An image or a folder of images is missing, empty or unusable."""


class RecipeError(NicpruneError):
    """A recipe or an argument has an unknown key or a value out of range."""


class TrainingError(NicpruneError):
    """Training cannot continue."""


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Within it, running out of memory, of the machine or a GPU, is a `DataError` that says what
    was done.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error).lower()
        if not isinstance(error, MemoryError) and not any(sign in told for sign in OUT_OF_MEMORY):
            raise
        raise DataError(
            f"{what} needs more memory than there is; make it smaller, or take a part of it"
        ) from error


OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""Words of torch's errors when the machine's or a GPU's memory is exhausted."""


class InterruptedRun(TrainingError):
    """Training was stopped by a signal, after its checkpoint was written.

    Args:
        message: for the user.
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal

    @property
    def exit_status(self) -> int:
        """Return the usual exit status of a process that a signal ended: 130 after Ctrl-C, 143
        after SIGTERM.
        """
        return 128 + self.signal


def first_line(error: BaseException, *, named: bool = True) -> str:
    """Return the first line of what an error says, the second too where the first only announces
    it, without the codes of coloured terminals.

    Args:
        named: put the class of the error in front.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])[:300]
    if not told:
        return type(error).__name__
    return f"{type(error).__name__}: {told}" if named else told


def closest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the most similar of the `known` names, or the first 20."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    shown = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
    return f"known: {shown}" if options else "none is known"
