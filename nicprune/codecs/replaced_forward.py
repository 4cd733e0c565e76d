"""Modules of a codec that are run by another function than their own `forward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nicprune.common.errors import CodecError


class ReplacedForward:
    """A function in place of a module's `forward`; the module keeps its weights.

    Copies of the module share the function, which may belong to a compiled model that cannot be
    copied.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def __deepcopy__(self, memo: Any) -> ReplacedForward:
        return self

    def __reduce__(self) -> Any:
        raise CodecError(ACCELERATED)


ACCELERATED = (
    "this codec is accelerated: it can code images, but not be changed, trained or saved; use the"
    " codec that accelerate was given"
)


def replaced(codec: nn.Module) -> list[nn.Module]:
    """Return the modules with another `forward`."""
    return [
        module
        for module in codec.modules()
        if isinstance(module.__dict__.get("forward"), ReplacedForward)
    ]


def check_not_replaced(codec: nn.Module) -> None:
    """Raise CodecError where a codec is accelerated."""
    if replaced(codec):
        raise CodecError(ACCELERATED)


@contextmanager
def own_forwards(codec: nn.Module) -> Iterator[None]:
    """Let every module run its own `forward` inside the block, e.g. to count its layers."""
    taken = [(module, module.__dict__.pop("forward")) for module in replaced(codec)]
    try:
        yield
    finally:
        for module, function in taken:
            module.__dict__["forward"] = function
