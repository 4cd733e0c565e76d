"""Codecs by several backends and precisions, to be timed beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nicprune.common.errors import RecipeError, closest
from nicprune.data.images import calibration_images
from nicprune.runtime.accelerate import accelerate
from nicprune.runtime.backends import BACKENDS, PRECISIONS

EAGER = "eager"
"""PyTorch as it is, without `accelerate`."""


@dataclass(frozen=True)
class Variant:
    """One codec by one backend.

    Attributes:
        label: of the codec.
        backend, precision: as for `accelerate`; `EAGER` for the codec itself.
    """

    label: str
    backend: str
    precision: str

    @property
    def family(self) -> str:
        """The label up to a slash: codecs that are compared with the first of them."""
        return self.label.rpartition("/")[0]

    def __str__(self) -> str:
        shown = "" if self.precision == "float32" else f" {self.precision}"
        return f"{self.label}, {self.backend}{shown}"


def engines(backends: Sequence[str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of backend and precision; a backend is left out where it lacks a precision that
    another one has.

    Raises:
        RecipeError: a backend or precision is unknown.
        CodecError: no backend has a precision, or the one that has it is not installed.
    """
    for precision in precisions:
        if precision not in PRECISIONS:
            raise RecipeError(f"unknown precision {precision!r}; {closest(precision, PRECISIONS)}")
    classes = {name: None if name == EAGER else BACKENDS[name] for name in dict.fromkeys(backends)}
    found = []
    for precision in dict.fromkeys(precisions):
        having = [
            name
            for name, one in classes.items()
            if precision in (("float32",) if one is None else one.precisions)
        ]
        if not having and set(classes) == {EAGER}:
            raise RecipeError(f"precision {precision!r} needs a --backend other than eager")
        for name in having or [n for n in classes if n != EAGER]:
            if name != EAGER:
                BACKENDS[name]().check(precision)
            found.append((name, precision))
    return sorted(found, key=lambda pair: list(classes).index(pair[0]))


def variants(
    codecs: Mapping[str, Any],
    backends: Sequence[str],
    precisions: Sequence[str] = ("float32",),
    *,
    image: str | Path | Tensor | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[Variant, Any]:
    """Return each codec by each backend in each precision that it has, those of the first backend
    first.

    Slimmable codecs are taken at the width that is set. A codec that its methods stay on, as gates
    do, is taken as it is where `EAGER` is among the backends.

    Args:
        codecs: by label.
        image: at which layers are measured.
        say: called with what was done to each codec.
    """
    chosen = engines(backends, precisions)
    ranges: list[Tensor] = []
    if any(precision == "int8" for _, precision in chosen):
        ranges = [x[0].mul(255).round().byte() for x in calibration_images("samples")]
    found: dict[Variant, Any] = {}
    for backend, precision in chosen:
        for label, codec in codecs.items():
            if backend == EAGER:
                found[Variant(label, backend, precision)] = codec
                continue
            plain = codec
            if getattr(codec, "widths", None) is not None:
                plain = codec.extract(codec.point().width)
            elif getattr(codec, "methods", None) is not None and EAGER in backends:
                say(f"{label}: not by {backend}, as methods stay on it")
                continue
            fast = accelerate(plain, backend, precision, image=image, calibration=ranges)
            found[Variant(label, backend, precision)] = fast
            say(f"{label}: {fast.acceleration}")
    return found
