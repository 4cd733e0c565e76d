"""A registry of named items, filled when the files that define them are imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from nicprune.common.errors import NicpruneError, RecipeError, closest

T = TypeVar("T")


class Registry(Generic[T]):
    """Map names to items of one kind.

    Each name is registered once. Looking up an unknown name raises an error with the closest one.

    Args:
        kind: what the items are, for messages.
        base: the class that every item is derived from, if they are classes.
    """

    def __init__(self, kind: str, base: type | None = None):
        self.kind = kind
        self._base = base
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an item under `name`.

        Raises:
            NicpruneError: the name is taken, or is not lower case; or the item is of another kind.
        """
        if not name.replace("_", "").isalnum() or name != name.lower():
            raise NicpruneError(
                f"a {self.kind}'s name is lower case letters, digits and underscores (got {name!r})"
            )
        if name in self._items:
            raise NicpruneError(f"there is a {self.kind} {name!r} already: {self._items[name]!r}")

        def keep(item: T) -> T:
            base = self._base
            if base is not None and not (isinstance(item, type) and issubclass(item, base)):
                raise NicpruneError(
                    f"a {self.kind} is a class derived from {base.__name__}; {name!r} would be"
                    f" {item!r}"
                )
            self._items[name] = item
            return item

        return keep

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise RecipeError(f"unknown {self.kind} {name!r}; {closest(name, self._items)}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)
