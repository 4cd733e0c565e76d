"""What is found of a codec is found once in a run of the tests: most of them begin with a copy of
the same few narrow codecs, whose tracing and counting would take most of their time.

The key is everything that makes a codec what it is, weights included; those that anything is hooked
to, or whose code is not CompressAI's and torch's alone, are analysed each time.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nicprune.pruning.surgery import has_foreign_code


class _Contents(pickle.Pickler):
    """Writes tensors as their bytes, which torch would wrap in an archive each."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        data = obj.detach().cpu().contiguous()
        return type(obj).__name__, str(obj.dtype), tuple(obj.shape), data.numpy().tobytes()


def contents(codec: nn.Module) -> bytes | None:
    """Return a hash of all that a codec is; None where it holds what cannot be written."""
    buffer = io.BytesIO()
    try:
        _Contents(buffer).dump(codec)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError):
        return None
    return hashlib.sha256(buffer.getvalue()).digest()


def once(find: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a codec that keeps what it found."""
    known: dict[tuple[bytes, Any], Any] = {}

    def found(codec: nn.Module, *args: Any) -> Any:
        key = None if has_foreign_code(codec) else contents(codec)
        if key is None:
            return find(codec, *args)
        if (key, args) not in known:
            known[key, args] = find(codec, *args)
        return known[key, args]

    return found
