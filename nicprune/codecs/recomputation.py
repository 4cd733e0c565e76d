"""Activation checkpointing inside a codec (`torch.utils.checkpoint`): layers of it run once more in
the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from nicprune.codecs.nested_tensors import tensors_in
from nicprune.common.errors import TrainingError


def in_backward() -> bool:
    """Return whether a backward pass calls this."""
    return bool(torch._C._current_graph_task_id() != -1)


def refuse_recomputation(codec: nn.Module, output: Any, why: str) -> None:
    """Let the backward pass of this output of the codec's end in an error where it runs layers of
    the codec once more.

    Args:
        codec: whose layers may not run there.
        output: what its forward pass returned: a tensor, or mappings and sequences of tensors.
        why: the rest of the sentence "they run once more in the backward pass, ...".

    Raises:
        TrainingError: in the backward pass.
    """
    if not torch.is_grad_enabled():
        return
    guard = _Guard(codec, why)
    for tensor in tensors_in(output):
        if tensor.requires_grad:
            tensor.register_hook(guard.start)


class _Guard:
    """Looks at the calls of all modules, from the first gradient of an output to the end of the
    backward pass.
    """

    def __init__(self, codec: nn.Module, why: str):
        self._codec, self._why = codec, why
        self._handle: Any = None

    def start(self, gradient: Tensor) -> None:
        """Begin, as a hook of the output's gradient."""
        if self._handle is None:
            within = {id(module) for module in self._codec.modules()}
            self._handle = register_module_forward_pre_hook(self._look(within))
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._stop)

    def _look(self, within: set[int]) -> Callable[..., None]:
        def look(module: nn.Module, args: Any) -> None:
            if not in_backward():  # the backward pass ended in an error, and called nothing back
                self._stop()
            elif id(module) in within:
                self._stop()
                raise TrainingError(
                    "activation checkpointing inside the codec (torch.utils.checkpoint) is not"
                    f" supported here: its layers run once more in the backward pass, {self._why}."
                    " Turn it off in the codec"
                )

        return look

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
