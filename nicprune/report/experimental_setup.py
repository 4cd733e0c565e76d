"""The conditions under which codecs may be compared."""

from __future__ import annotations

from typing import NamedTuple


class Setup(NamedTuple):
    """A codec, its training metric, and the images it was tested on.

    Only records of the same setup are compared; each setup has a table of its own.
    """

    codec: str
    metric: str
    test: str
    images: tuple[tuple[str, int, int], ...]
    """Name, width and height of each; 0 where a record does not say."""

    def __str__(self) -> str:
        count = len(self.images)
        tested = (
            f"{count} image{'s' * (count != 1)} of {self.test or 'an unnamed folder'}"
            if count
            else self.test or "test images unknown"
        )
        return f"{self.codec}{f' ({self.metric})' if self.metric else ''}, {tested}"
