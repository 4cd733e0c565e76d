"""CDF tables of entropy models: checking them, and making them anew."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from compressai.entropy_models import EntropyModel, EntropyModelVbr
from torch import Tensor, nn

from nicprune.codecs.anatomy import CDF_BUFFERS, unwrap
from nicprune.codecs.layer_kinds.entropy import entropy_models, is_bottleneck, quantile_gaps
from nicprune.codecs.layer_operations import resize
from nicprune.codecs.provenance import provenance
from nicprune.common.errors import CodecError

WIDEST = 1 << 15
"""Symbols that an entropy bottleneck may have a probability for: CDF tables have 65536 steps."""


def _bottleneck_hash(codec: Any) -> str:
    digest = hashlib.sha256()
    for name, module in codec.named_modules():
        if is_bottleneck(module):
            for key, value in module.named_parameters():
                flat = value.detach().cpu().reshape(-1)
                raw = flat.view(torch.uint8)  # numpy knows no bfloat16
                digest.update(f"{name}.{key}".encode() + raw.numpy().tobytes())
    return digest.hexdigest()


def note_tables(model: nn.Module) -> None:
    """Record that the CDF tables of a codec, and of the methods on it, were built from its current
    entropy bottlenecks.
    """
    provenance(unwrap(model)).tables = _bottleneck_hash(unwrap(model))
    for part in coding_parts(model):
        part.cdf_source_hash = _bottleneck_hash(part)


def coding_parts(model: nn.Module) -> list[Any]:
    """Return the methods that take part in coding; they may have entropy bottlenecks of their
    own.
    """
    roles = getattr(model, "roles", None)
    return list(roles.parts) if roles is not None else []


def _stale(part: nn.Module, tables: str) -> bool:
    made: list[Any] = [m for m in entropy_models(part) if hasattr(m, "_quantized_cdf")]
    return not all(m._quantized_cdf.numel() for m in made) or tables != _bottleneck_hash(part)


def tables_are_current(model: nn.Module) -> bool:
    """Return whether CDF tables were built from the entropy bottlenecks as they are now."""
    codec = unwrap(model)
    stale = [_stale(part, part.cdf_source_hash) for part in coding_parts(model)]
    return not any([_stale(codec, provenance(codec).tables), *stale])


def check_bottlenecks(model: nn.Module) -> None:
    """Raise CodecError where CDF tables cannot be made of an entropy bottleneck, whose parameters
    are not finite or whose quantiles are too far apart: names the first.
    """
    for name, module in model.named_modules():
        if not is_bottleneck(module):
            continue
        for key, value in module.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise CodecError(f"CDF tables cannot be made of {name}: its {key} is not finite")
        if not bool((quantile_gaps(module) < WIDEST).all()):
            raise CodecError(
                f"CDF tables cannot be made of {name}: its quantiles are further apart than"
                f" {WIDEST}; train its auxiliary loss (codec.aux_loss())"
            )


def resize_tables(model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Give the CDF tables of all entropy models in `model` the shapes that `state` has for them,
    below `prefix`; values are left to load_state_dict.
    """
    tables = {key: value for key, value in state.items() if key.rpartition(".")[2] in CDF_BUFFERS}
    for name, module in model.named_modules():
        if CDF_BUFFERS & module._buffers.keys():
            start = f"{prefix}{name}."
            resize(module, {key.removeprefix(start): value for key, value in tables.items()})


def check_tables(model: nn.Module) -> None:
    """Raise CodecError where CDF tables are not such that CompressAI's coder can read: it looks up
    what they say without looking where they end.
    """
    models: list[tuple[str, Any]] = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, (EntropyModel, EntropyModelVbr))
        # All three are empty before they are made.
        and any(t.numel() for t in (m._quantized_cdf, m._cdf_length, m._offset))
    ]
    for name, m in models:
        if reason := _misfit(m):
            raise CodecError(f"the CDF tables of {name} are damaged: {reason}")


def _misfit(model: Any) -> str:
    """Return what is wrong with the tables of an entropy model, empty for nothing."""
    table, length, offset = model._quantized_cdf, model._cdf_length, model._offset
    if any(t.is_floating_point() for t in (table, length, offset)):
        return "they are not whole numbers"
    if table.dim() != 2 or length.shape != table.shape[:1] or offset.shape != table.shape[:1]:
        return f"their shapes are {[tuple(t.shape) for t in (table, length, offset)]}"
    scales = getattr(model, "scale_table", None)
    rows = len(scales) if scales is not None else getattr(model, "channels", len(table))
    if len(table) != rows:
        return f"there are {len(table)} for {rows} channels or scales"
    if not bool(((length >= 2) & (length <= table.shape[1])).all()):
        return f"their lengths lie outside 2 to {table.shape[1]}"
    if not bool((offset.long().abs() <= WIDEST).all()):  # -2^31 has no opposite in 32 bits
        return "their offsets are out of range"
    places = torch.arange(table.shape[1], device=table.device)
    inside = places[None, 1:] < length[:, None]
    last = table.gather(1, length[:, None].long() - 1)
    if (
        bool((table[:, 0] != 0).any())
        or bool((last != 1 << model.entropy_coder_precision).any())
        or not bool((table.diff(dim=1)[inside] > 0).all())
    ):
        return "they do not rise from 0 to 1"
    return ""


def update_tables(codec: Any) -> None:
    """Rebuild all CDF tables of a codec, with the scale table of its Gaussian conditionals if it
    has one.

    Raises:
        CodecError: they cannot be made; see `check_bottlenecks`.
    """
    check_bottlenecks(codec)
    models: list[Any] = entropy_models(codec)
    found = [
        m.scale_table
        for m in models
        if getattr(m, "scale_table", None) is not None and m.scale_table.numel()
    ]
    takes_scales = found and "scale_table" in inspect.signature(codec.update).parameters
    _make_tables(codec, **({"scale_table": found[0]} if takes_scales else {}))


def _make_tables(part: Any, **arguments: Any) -> None:
    known = inspect.signature(part.update).parameters.values()
    if not any(p.name == "force" or p.kind is p.VAR_KEYWORD for p in known):
        raise CodecError(
            f"CDF tables cannot be made of {type(part).__name__}: its update() takes no force, by"
            " which tables that are there are made anew; CompressAI's is update(scale_table=None,"
            " force=False)"
        )
    try:
        part.update(force=True, **arguments)
    except ValueError as error:  # finite parameters may still give a density that is not
        reason = str(error).splitlines()[0]
        raise CodecError(f"CDF tables cannot be made of {type(part).__name__}: {reason}") from error


def refresh_tables(model: nn.Module) -> None:
    """Rebuild the CDF tables of a codec and of the methods on it if the entropy bottlenecks have
    changed since the tables were built.

    Tables that are up to date are kept. Rebuilt on another machine, or from rounded weights, they
    may differ in the last bit, and existing bitstreams would no longer decode.
    """
    codec = unwrap(model)
    if _stale(codec, provenance(codec).tables):
        update_tables(codec)
    for part in coding_parts(model):
        if _stale(part, part.cdf_source_hash):
            check_bottlenecks(part)
            _make_tables(part)
    note_tables(model)
