"""Choose the fastest form of each layer by measuring it on this machine."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import kind_of
from nicprune.common.files import write_text
from nicprune.common.machine import machine_line
from nicprune.runtime.backends import Backend

ORIGINAL = "as it is"
TURNS = 7
"""Each form is run so often, in turns; the fastest run counts, since other programs only add."""


@dataclass(frozen=True)
class LayerForm:
    """The form chosen for a layer, and the seconds of every form at the size measured."""

    layer: str
    form: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        times = ", ".join(
            f"{form} {1000 * seconds:.2f} ms" for form, seconds in self.seconds.items()
        )
        return f"{self.layer}: {self.form} ({times})"


@torch.no_grad()
def choose_forms(
    transform: nn.Module, name: str, x: Tensor, backend: Backend, precision: str
) -> tuple[nn.Module, list[LayerForm]]:
    """Return a copy of a transform whose layers have the forms that are fastest on this machine.

    Args:
        transform: from one tensor (B, C, H, W) to one tensor, in float32 and evaluation mode.
        name: its dotted name in the codec, for the names of its layers.
        x: the input at which layers are measured.
        backend: what compiles the layers; measured and chosen for it.
        precision: the backend's precision, in which layers are measured.

    Times are kept in a file (`cache_file`) by processor, versions, number of threads, layer and
    size, so that each is measured once.
    """
    transform = fix(copy.deepcopy(transform))
    inputs = _inputs(transform, x)
    cache = Cache()
    chosen = []
    for path, layer in list(transform.named_modules()):
        forms = forms_of(layer, backend) if path in inputs else {}
        if len(forms) < 2:
            continue
        seconds = seconds_of_forms(forms, inputs[path], backend, precision, cache)
        form = min(seconds, key=lambda form: seconds[form])
        if path and form != ORIGINAL:
            transform.set_submodule(path, forms[form])
        elif form != ORIGINAL:
            transform = forms[form]
        chosen.append(LayerForm(".".join(filter(None, (name, path))), form, seconds))
    cache.write()
    return transform, chosen


def forms_of(layer: nn.Module, backend: Backend) -> dict[str, nn.Module]:
    """Return the forms of a layer that a backend may run faster, the layer itself first."""
    kind = kind_of(layer)
    return {ORIGINAL: layer} | {
        name: form
        for name, form in (kind.forms(layer) if kind is not None else {}).items()
        if name in backend.forms
    }


def fix(transform: nn.Module) -> nn.Module:
    """Compute once what layers compute from their parameters at every call."""
    for path, layer in list(transform.named_modules()):
        kind = kind_of(layer)
        if kind is not None and (fixed := kind.fixed(layer)) is not layer:
            if not path:
                return fixed
            transform.set_submodule(path, fixed)
    return transform


def _inputs(transform: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the input of each layer that runs once on one tensor."""
    found: dict[str, list[Any]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, path=path: found.setdefault(path, []).append(args)
        )
        for path, module in transform.named_modules()
    ]
    try:
        transform(x)
    finally:
        for handle in handles:
            handle.remove()
    return {
        path: calls[0][0]
        for path, calls in found.items()
        if len(calls) == 1 and len(calls[0]) == 1 and isinstance(calls[0][0], Tensor)
    }


def seconds_of_forms(
    forms: dict[str, nn.Module],
    x: Tensor,
    backend: Backend,
    precision: str,
    cache: Cache,
    turns: int = TURNS,
) -> dict[str, float]:
    """Return the seconds of each form of a layer, from the cache if they are there."""
    key = _key(forms[ORIGINAL], x, backend, precision, turns)
    seconds = cache.get(key, forms)
    if seconds is None:
        seconds = _seconds(forms, x, backend, precision, turns)
        cache.put(key, seconds)
    return seconds


def _seconds(
    forms: dict[str, nn.Module], x: Tensor, backend: Backend, precision: str, turns: int
) -> dict[str, float]:
    functions = {
        form: backend.compile(copy.deepcopy(layer), x, precision, (x,))
        for form, layer in forms.items()
    }
    fastest = dict.fromkeys(functions, float("inf"))
    for turn in range(turns + 1):
        for form, function in functions.items():
            started = time.perf_counter()
            function(x)
            if turn:  # the first turn warms up
                fastest[form] = min(fastest[form], time.perf_counter() - started)
    return fastest


def _key(layer: nn.Module, x: Tensor, backend: Backend, precision: str, turns: int) -> str:
    return key_of(backend, precision, repr(layer), _shapes(layer), tuple(x.shape), turns)


def _shapes(layer: nn.Module) -> list[tuple[int, ...]]:
    """Return what the text of a layer of one's own may not say."""
    return [tuple(value.shape) for value in layer.parameters()]


def key_of(backend: Backend, precision: str, *more: Any) -> str:
    """Return a key of times on this machine, with its versions and number of threads."""
    parts: Sequence[Any] = (
        machine_line(), torch.__version__, backend.versions(), torch.get_num_threads(),
        backend.name, precision, *more,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """Return the folder of measured times: NICPRUNE_CACHE, or the user's cache."""
    return Path(os.environ.get("NICPRUNE_CACHE") or user_cache_path("nicprune"))


def cache_file() -> Path:
    """Return the file that keeps times of layers."""
    return cache_folder() / "layer_times.json"


class Cache:
    """Measured seconds by key. A file that cannot be read is measured again; one that cannot be
    written is done without.
    """

    def __init__(self) -> None:
        self._new = False
        try:
            known = json.loads(cache_file().read_text())
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def get(self, key: str, forms: dict[str, nn.Module]) -> dict[str, float] | None:
        """Return the seconds of these forms; None if they are not there."""
        seconds = self._known.get(key)
        if not isinstance(seconds, dict) or seconds.keys() != forms.keys():
            return None
        if all(isinstance(value, float) and value > 0 for value in seconds.values()):
            return dict(seconds)
        return None

    def put(self, key: str, seconds: dict[str, float]) -> None:
        """Keep the seconds of forms."""
        self._known[key], self._new = seconds, True

    def write(self) -> None:
        """Write the file, if anything was put."""
        if not self._new:
            return
        try:
            cache_file().parent.mkdir(parents=True, exist_ok=True)
            write_text(cache_file(), json.dumps(self._known, indent=1))
        except OSError:
            return
