"""What methods hang on a codec's layers, and how it is found again and taken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Hook:
    """Marks this package's hooks. They are plain objects, so that deepcopy gives a copy hooks of
    its own.

    Attributes:
        owner: the module that put the hook there and whose state it reads.
        scales: whether it changes the layer's input, channel by channel, and so needs all of them.
    """

    owner: nn.Module
    scales: bool = False

    def share(self) -> Tensor | None:
        """By how much each output channel of the layer is multiplied, shape (C,), if it is."""
        return None


class NarrowHook(Hook):
    """Makes a codec's forward pass one of the width that is set: its owner's `active`,
    for the length of the call.
    """

    def __init__(self, owner: Any):
        self.owner = owner
        self._open: list[Any] = []

    def before(self, codec: nn.Module, args: Any) -> None:
        """Begin."""
        context = self.owner.active(codec)  # type: ignore[operator]
        context.__enter__()
        self._open.append(context)

    def __call__(self, codec: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)


def hook_dicts(module: nn.Module) -> tuple[Any, Any]:
    """A module's tables of forward hooks: those before it, those behind it."""
    return module._forward_pre_hooks, module._forward_hooks


def _hook_of(entry: Any) -> Hook | None:
    hook = getattr(entry, "__self__", entry)  # a hook may be registered by one of its methods
    return hook if isinstance(hook, Hook) else None


def has_hooks(codec: nn.Module) -> bool:
    """Whether a method has its hooks on the codec."""
    return any(
        _hook_of(entry) is not None
        for module in codec.modules()
        for table in hook_dicts(module)
        for entry in table.values()
    )


def remove_hooks(codec: nn.Module, mine: Callable[[Hook], bool]) -> None:
    """Take the hooks that `mine` says yes to off every module."""
    for module in codec.modules():
        for table in hook_dicts(module):
            for key, entry in list(table.items()):
                hook = _hook_of(entry)
                if hook is not None and mine(hook):
                    del table[key]
                    module._forward_hooks_always_called.pop(key, None)


@contextmanager
def without_hooks(codec: nn.Module) -> Iterator[None]:
    """Take every hook of a method off the codec inside the block: counting needs the layers
    alone.
    """
    taken = []
    for module in codec.modules():
        for table in hook_dicts(module):
            if any(_hook_of(entry) is not None for entry in table.values()):
                taken.append((table, dict(table)))
                for key, entry in list(table.items()):
                    if _hook_of(entry) is not None:
                        del table[key]
    try:
        yield
    finally:
        for table, before in reversed(taken):
            table.clear()
            table.update(before)
