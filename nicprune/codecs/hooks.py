"""Hooks that methods register on a codec: their base class, finding and removing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from nicprune.codecs.recomputation import refuse_recomputation

ENDED = "when the width or domain is no longer set"
"""Reason against running layers after the forward pass at an operating point."""


class Hook:
    """Base class of this package's hooks.

    Hooks are plain objects, so that a deep copy of a codec has hooks of its own.

    Attributes:
        owner: the module that registered the hook and whose state it reads.
        scales: whether it scales the channels of the layer's input, and therefore needs all of
            them.
    """

    owner: nn.Module
    scales: bool = False

    def share(self) -> Tensor | None:
        """Return the factor of each output channel of the layer, shape (C,); None if there is
        none.
        """
        return None


class NarrowHook(Hook):
    """Hook that runs a codec's forward pass at the operating point that is set, inside its owner's
    `active` context.
    """

    def __init__(self, owner: Any):
        self.owner = owner
        self._open: list[Any] = []

    def before(self, codec: nn.Module, args: Any) -> None:
        """Enter the context, as a forward pre-hook."""
        context = self.owner.active(codec)  # type: ignore[operator]
        context.__enter__()
        self._open.append(context)

    def __call__(self, codec: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)
        refuse_recomputation(codec, output, ENDED)


def hook_dicts(module: nn.Module) -> tuple[Any, Any]:
    """Return a module's dictionaries of forward pre-hooks and of forward hooks."""
    return module._forward_pre_hooks, module._forward_hooks


def _hook_of(entry: Any) -> Hook | None:
    hook = getattr(entry, "__self__", entry)  # the entry may be a bound method of the hook
    return hook if isinstance(hook, Hook) else None


def share_of(module: nn.Module) -> Tensor | None:
    """Return what hooks multiply each output channel of a layer by, shape (C,); None if there are
    none that do.
    """
    found: Tensor | None = None
    for entry in hook_dicts(module)[1].values():
        share = entry.share() if isinstance(entry, Hook) else None
        if share is not None:
            found = share if found is None else found * share
    return found


def has_hooks(codec: nn.Module) -> bool:
    """Return whether a method has hooks on the codec."""
    return any(
        _hook_of(entry) is not None
        for module in codec.modules()
        for table in hook_dicts(module)
        for entry in table.values()
    )


def narrows(codec: nn.Module) -> bool:
    """Return whether the codec's forward pass runs inside a method's `active` context."""
    return any(isinstance(_hook_of(entry), NarrowHook) for entry in hook_dicts(codec)[0].values())


def remove_hooks(codec: nn.Module, mine: Callable[[Hook], bool]) -> None:
    """Remove the hooks for which `mine` returns True from every module."""
    for module in codec.modules():
        for table in hook_dicts(module):
            for key, entry in list(table.items()):
                hook = _hook_of(entry)
                if hook is not None and mine(hook):
                    del table[key]
                    module._forward_hooks_always_called.pop(key, None)


@contextmanager
def without_hooks(codec: nn.Module) -> Iterator[None]:
    """Remove every hook of a method from the codec inside the block, e.g. to count the layers
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
