"""Errors that a user sees: what was found, what was expected, what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NicpruneError(Exception):
    """Base of every error this package raises on purpose; the command line prints it as one
    line.
    """


class CodecError(NicpruneError):
    """A codec is unknown, cannot be had, or cannot be analysed."""


class SurgeryError(NicpruneError):
    """Keep-lists do not fit the codec, or the smaller codec is not the same function."""


class BudgetError(NicpruneError):
    """A budget cannot be met, or makes no sense."""


class FileError(NicpruneError):
    """A file cannot be read or written, or is not what its name says."""


class DataError(NicpruneError):
    """A folder of photographs is missing, empty or unusable."""


class RecipeError(NicpruneError):
    """A recipe or an argument has an unknown key or a value out of range."""


class TrainingError(NicpruneError):
    """Training cannot go on."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names what comes nearest to `name` among `known`, or all of them
    if few.
    """
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    shown = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
    return f"known: {shown}" if options else "none is known"
