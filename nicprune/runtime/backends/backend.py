"""The interface of a backend."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import metadata

from torch import Tensor, nn

from nicprune.common.errors import CodecError
from nicprune.common.registry import Registry

Function = Callable[[Tensor], Tensor]

PRECISIONS = ("float32", "bf16", "int8")


class Backend(ABC):
    """Compile transforms for the CPU.

    Attributes:
        name: its name in `accelerate`.
        precisions: those of `PRECISIONS` that it has.
        packages: packages that it needs beside nicprune's own.
        extra: the extra of nicprune that installs them.
        forms: the forms of layers (see `LayerKind.forms`) that it may run faster.
    """

    name: str
    precisions: tuple[str, ...] = ("float32",)
    packages: tuple[str, ...] = ()
    extra = ""
    forms: tuple[str, ...] = ("convolution and pixel shuffle",)

    def check(self, precision: str) -> None:
        """Raise CodecError where packages are missing or the precision is not offered."""
        if precision not in self.precisions:
            raise CodecError(
                f"backend {self.name!r} has no precision {precision!r}; it has"
                f" {', '.join(self.precisions)}"
            )
        for package in self.packages:
            try:
                importlib.import_module(package)
            except ImportError:
                raise CodecError(
                    f"backend {self.name!r} needs {package}, which is not installed: pip install"
                    f" 'nicprune[{self.extra}]'"
                ) from None

    def versions(self) -> list[str]:
        """Return the versions of its packages, on which times depend."""
        return [f"{name} {metadata.version(name)}" for name in self.packages]

    @abstractmethod
    def compile(
        self, transform: nn.Module, example: Tensor, precision: str, calibration: Sequence[Tensor]
    ) -> Function:
        """Return a function that computes what `transform` computes.

        Args:
            transform: from one tensor (B, C, H, W) to one tensor, in float32 and evaluation mode.
            example: an input.
            precision: one of `precisions`.
            calibration: inputs by which "int8" finds the ranges of activations.
        """


BACKENDS: Registry[type[Backend]] = Registry("backend", Backend)
