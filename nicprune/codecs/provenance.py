"""Provenance of a codec: its origin and its history."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from compressai.registry import MODELS
from torch import nn

from nicprune.codecs.anatomy import check_codec, unwrap


@dataclass
class Provenance:
    """Origin and history of a codec.

    Attributes:
        name, quality, metric: as given to `load_codec`. A codec that was given as an object has the
            name of its class, or the name under which CompressAI registers the class.
        build: import path and keyword arguments that construct the architecture at its original
            widths.
        original: MACs and params before any pruning (see `cost.Totals`), empty if never pruned.
        history: what was done, in order; one entry per step.
        verified: result of the last surgery's verification, as text; empty without one.
        tables: hash of the entropy bottlenecks that the CDF tables were built from; empty if
            unknown.
    """

    name: str
    quality: int | None = None
    metric: str = "mse"
    build: dict[str, Any] = field(default_factory=dict)
    original: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    verified: str = ""
    tables: str = ""

    def copy(self) -> Provenance:
        """Return an independent copy."""
        return Provenance(
            self.name,
            self.quality,
            self.metric,
            dict(self.build),
            dict(self.original),
            list(self.history),
            self.verified,
            self.tables,
        )


def provenance(codec: nn.Module) -> Provenance:
    """Return the record of `codec`, or of the codec that methods are attached to; a codec without
    one gets a record of its class.

    The record is stored as a plain dictionary on the object: deepcopy and pickle keep it, and a
    pickled codec loads without nicprune.

    Raises:
        CodecError: not a codec.
    """
    codec = unwrap(codec)
    check_codec(codec)
    stored = codec.__dict__.get(ATTRIBUTE)
    if stored is None:
        cls = type(codec)
        name = next((name for name, model in MODELS.items() if model is cls), cls.__name__)
        built = {
            "class": f"{cls.__module__}:{cls.__qualname__}",
            "kwargs": _constructor_arguments(codec),
        }
        return set_provenance(codec, Provenance(name, build=built))
    record = Provenance.__new__(Provenance)
    record.__dict__ = stored  # shared: changes of the record are changes on the codec
    return record


def set_provenance(codec: nn.Module, record: Provenance) -> Provenance:
    """Store `record` on `codec`; return it."""
    codec.__dict__[ATTRIBUTE] = record.__dict__
    return record


ATTRIBUTE = "_nicprune_provenance"
"""Attribute of a codec that holds its record."""


def _constructor_arguments(codec: nn.Module) -> dict[str, Any]:
    """Recover the constructor's arguments from attributes of the same name, as CompressAI's own
    classes keep them.
    """
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(codec).__init__).parameters.items():
        value = getattr(codec, name, None)
        plain = isinstance(value, (int, float, str, bool)) or (
            isinstance(value, list) and all(isinstance(v, int) for v in value)
        )
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD and plain:
            arguments[name] = value
    if "groups" in arguments and "M" in inspect.signature(type(codec).__init__).parameters:
        # ELIC does not store M, and requires sum(groups) == M.
        arguments["M"] = sum(arguments["groups"])
    return arguments
