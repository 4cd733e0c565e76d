"""The control: no sparsity. The original is trained for as many steps as the others."""

from __future__ import annotations

from nicprune.methods.contract import METHODS, Method


@METHODS.register("none")
class NoMethod(Method):
    """Keep every channel."""

    name = "none"
    summary = "control: the original, trained on"
