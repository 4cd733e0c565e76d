"""The structure of a codec: types and settings of its layers, all but its weights."""

from __future__ import annotations

import functools
import inspect
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from compressai.models import CompressionModel
from torch import dtype, nn

from nicprune.codecs.replaced_forward import ReplacedForward
from nicprune.codecs.trusted import is_listed
from nicprune.common.config import cut

Structure = dict[str, list[Any]]
"""For each module by its name: [type, {setting: value}]."""

WIDTHS = ("channels", "features")
"""Endings of the names of settings that repeat the shapes of the weights."""

_UNKNOWN = object()


def structure(codec: nn.Module) -> Structure:
    """Return the types and settings of a codec's modules, as JSON can write it.

    A setting is an attribute by the name of an argument of the module's constructor, where it
    differs from the default: stride, padding_mode, negative_slope, an activation. Widths are left
    out, which are the weights' shapes, and so are whole numbers that a codec, or a module of
    somebody's own, keeps: most are widths, of before pruning.
    """
    arguments: dict[type, dict[str, Any]] = {}
    found: Structure = {}
    for name, module in codec.named_modules():
        kind = type(module)
        if kind not in arguments:
            arguments[kind] = _arguments(kind)
        found[name] = [kind.__name__, _settings(module, arguments[kind])]
    return found


def checksum(found: Structure, count: Callable[[str], bool] = lambda name: True) -> int:
    """CRC-32 of the part of a structure whose names `count`."""
    counted = {name: found[name] for name in sorted(found) if count(name)}
    return zlib.crc32(json.dumps(counted, sort_keys=True).encode())


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Say where two structures differ, in words; nothing if they are the same."""
    told = []
    for name in [*expected, *(name for name in found if name not in expected)]:
        place = cut(name) or "the codec"
        if name not in found or name not in expected:
            told.append(f"{place} is {'missing' if name not in found else 'new'}")
            continue
        (was, settings), (now, others) = expected[name], found[name]
        if was != now:
            told.append(f"{place} is {cut(str(now))} instead of {cut(str(was))}")
            continue
        for key in sorted({*settings, *others}):
            values = [json.dumps(s[key]) if key in s else "the default" for s in (others, settings)]
            if values[0] != values[1]:
                told.append(f"{place} has {cut(key)} {values[0][:40]} instead of {values[1][:40]}")
    return told


def _settings(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    cls = type(module)
    library = cls.__module__.startswith("torch.") or is_listed(cls)
    own = isinstance(module, CompressionModel) or not library
    found = {}
    for name, default in arguments.items():
        value = _plain(module.__dict__.get(name, _UNKNOWN))
        if value is _UNKNOWN or name.endswith(WIDTHS) or (own and _whole(value)):
            continue
        if default is inspect.Parameter.empty or value != _plain(default):
            found[name] = value
    forward = module.__dict__.get("forward")
    if forward is not None and not isinstance(forward, ReplacedForward):
        name = _plain(forward)
        found["forward"] = type(forward).__qualname__ if name is _UNKNOWN else name
    return found


def _arguments(cls: type) -> dict[str, Any]:
    """Arguments of a class's constructor, those that it passes on to its bases too, with their
    defaults.
    """
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module or "__init__" not in base.__dict__:
            continue
        for name, parameter in inspect.signature(base.__dict__["__init__"]).parameters.items():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(name, parameter.default)
    return found


def _plain(value: Any) -> Any:
    """A value as JSON writes it, functions by their names; `_UNKNOWN` for what has no such form."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, functools.partial):
        return _plain([value.func, value.args, value.keywords])
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return _UNKNOWN if any(item is _UNKNOWN for item in items) else items
    if isinstance(value, Mapping):
        pairs = {str(key): _plain(item) for key, item in value.items()}
        return _UNKNOWN if any(item is _UNKNOWN for item in pairs.values()) else pairs
    if isinstance(value, dtype):
        return str(value)
    if inspect.isroutine(value) or inspect.isclass(value):
        return getattr(value, "__qualname__", None) or getattr(value, "__name__", _UNKNOWN)
    return _UNKNOWN


def _whole(value: Any) -> bool:
    """Return whether a value is a whole number, or several."""
    if isinstance(value, list):
        return all(_whole(item) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)
