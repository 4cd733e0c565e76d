"""Modules that stand in for a codec's analysis or synthesis, while it runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nicprune.codecs.roles import End


class Given(nn.Module):
    """Take the place of a codec's analysis, with latents computed before."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.y = y

    def forward(self, x: Tensor) -> Tensor:
        """Return the given latents."""
        return self.y


def can_stand_in(codec: nn.Module, end: End) -> bool:
    """Return whether another module can stand in for the analysis or synthesis: whether it is one
    module, given one tensor, that the codec's own code calls.
    """
    parent = codec.get_submodule(end.module.rpartition(".")[0])
    return end.whole and not isinstance(parent, (nn.Sequential, nn.ModuleList))


def standing_in(codec: nn.Module, path: str, module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return what `override_attributes` is given, so that a module stands in for another one."""
    parent, _, last = path.rpartition(".")
    return codec.get_submodule(parent), {last: module}
