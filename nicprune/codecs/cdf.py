"""CDF tables: which entropy bottlenecks they were made from, making them anew where those have
changed, and finding a latent's table quickly.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressai.entropy_models import GaussianConditional
from torch import Tensor, nn

from nicprune.codecs.anatomy import unwrap
from nicprune.codecs.layer_kinds import entropy_models, is_bottleneck
from nicprune.codecs.provenance import provenance

_COMPARED = GaussianConditional.build_indexes


def _bisected(self: Any, scales: Tensor) -> Tensor:
    if scales.dtype != self.scale_table.dtype:  # bisection takes one type alone
        return _COMPARED(self, scales)
    scales = self.lower_bound_scale(scales)
    return torch.bucketize(scales.contiguous(), self.scale_table[:-1], out_int32=True)


@contextmanager
def fast_indexes() -> Iterator[None]:
    """Within it, codecs find the CDF table of each latent by bisection; CompressAI compares its
    scale with every entry of the scale table (64).

        with nicprune.fast_indexes():
            sent = codec.compress(x)

    The indexes are the same, and so are the bitstreams. What `nicprune` codes itself is coded
    within it. An own `build_indexes`, of a subclass or put in place of CompressAI's, stays.
    """
    if GaussianConditional.build_indexes is not _COMPARED:
        yield
        return
    GaussianConditional.build_indexes = _bisected  # type: ignore[method-assign]
    try:
        yield
    finally:
        # With several threads it may end early for another one, which then compares: slower, and
        # the same.
        GaussianConditional.build_indexes = _COMPARED  # type: ignore[method-assign]


def _bottleneck_hash(codec: Any) -> str:
    digest = hashlib.sha256()
    for name, module in codec.named_modules():
        if is_bottleneck(module):
            for key, value in module.named_parameters():
                raw = value.detach().cpu().contiguous().view(torch.uint8)  # numpy knows no bfloat16
                digest.update(f"{name}.{key}".encode() + raw.numpy().tobytes())
    return digest.hexdigest()


def note_tables(model: nn.Module) -> None:
    """Remember that the CDF tables of a codec, and of the methods on it, are those of their entropy
    bottlenecks as they are now.
    """
    provenance(unwrap(model)).tables = _bottleneck_hash(unwrap(model))
    for part in _parts(model):
        part.cdf_source_hash = _bottleneck_hash(part)


def _parts(model: nn.Module) -> list[Any]:
    """Methods on the codec that code with it, and may have entropy bottlenecks of their own."""
    roles = getattr(model, "roles", None)
    return list(roles.parts) if roles is not None else []


def _stale(part: nn.Module, tables: str) -> bool:
    made: list[Any] = [m for m in entropy_models(part) if hasattr(m, "_quantized_cdf")]
    return not all(m._quantized_cdf.numel() for m in made) or tables != _bottleneck_hash(part)


def update_tables(codec: Any) -> None:
    """Make all CDF tables of a codec anew, for the scales of its Gaussian conditionals that it has
    already, if any.
    """
    models: list[Any] = entropy_models(codec)
    found = [
        m.scale_table
        for m in models
        if getattr(m, "scale_table", None) is not None and m.scale_table.numel()
    ]
    takes_scales = found and "scale_table" in inspect.signature(codec.update).parameters
    codec.update(force=True, **({"scale_table": found[0]} if takes_scales else {}))


def refresh_tables(model: nn.Module) -> None:
    """Make the CDF tables of a codec, and of methods on it, anew, unless the entropy bottlenecks
    are still those that they were made from.

    Made anew they may differ in the last bit, on another machine or from weights that were rounded
    since: streams would not decode any more.
    """
    codec = unwrap(model)
    if _stale(codec, provenance(codec).tables):
        update_tables(codec)
    for part in _parts(model):
        if _stale(part, part.cdf_source_hash):
            part.update(force=True)
    note_tables(model)
