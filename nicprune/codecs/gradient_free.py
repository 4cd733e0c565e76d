"""Parameters that are not trained, in a training loop of one's own: their gradients are dropped as
soon as they are there, so that no optimiser moves them.

`requires_grad_(False)` would not do: CompressAI's `net_aux_optimizer` refuses codecs with such
parameters, and an optimiser may hold momentum of them already. An optimiser passes over a
parameter whose gradient is None, weight decay included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Drop the gradients of these parameters from now on. What is copied of them does not."""
    for parameter in parameters:
        if parameter.requires_grad and _drop not in _hooks(parameter).values():
            parameter.register_post_accumulate_grad_hook(_drop)


def keep_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Undo `drop_gradients`."""
    for parameter in parameters:
        hooks = _hooks(parameter)
        for key in [key for key, hook in hooks.items() if hook is _drop]:
            del hooks[key]


def learns(parameter: nn.Parameter) -> bool:
    """Return whether training changes a parameter: it has gradients, and they are not dropped."""
    return parameter.requires_grad and _drop not in _hooks(parameter).values()


def _hooks(parameter: Any) -> dict[int, Any]:
    return parameter._post_accumulate_grad_hooks or {}


def _drop(parameter: Any) -> None:
    parameter.grad = None
