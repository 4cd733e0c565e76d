"""No sparsity at all: the control. The original trained on for as long as the others."""

from __future__ import annotations

from nicprune.methods.contract import METHODS, Method


@METHODS.register("none")
class NoMethod(Method):
    """Keeps every channel."""

    name = "none"
    summary = "control: the original, trained on"
