"""CDF tables of entropy models: rebuilding them when the entropy bottlenecks have changed, and
finding the table of a latent quickly.
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
    if scales.dtype != self.scale_table.dtype:  # torch.bucketize needs a single dtype
        compared: Tensor = _COMPARED(self, scales)
        return compared
    scales = self.lower_bound_scale(scales)
    return torch.bucketize(scales.contiguous(), self.scale_table[:-1], out_int32=True)


@contextmanager
def fast_indexes() -> Iterator[None]:
    """Find the CDF table of each latent by bisection inside the block.

    CompressAI compares the scale of each latent with all 64 entries of the scale table.

        with nicprune.fast_indexes():
            sent = codec.compress(x)

    The indexes are the same, and so are the bitstreams. nicprune's own functions code inside it. A
    `build_indexes` of a subclass, or one that replaced CompressAI's, is not changed.
    """
    if GaussianConditional.build_indexes is not _COMPARED:
        yield
        return
    GaussianConditional.build_indexes = _bisected
    try:
        yield
    finally:
        # With several threads this may end another thread's block early, which then gets the same
        # indexes more slowly.
        GaussianConditional.build_indexes = _COMPARED


def _bottleneck_hash(codec: Any) -> str:
    digest = hashlib.sha256()
    for name, module in codec.named_modules():
        if is_bottleneck(module):
            for key, value in module.named_parameters():
                raw = value.detach().cpu().contiguous().view(torch.uint8)  # numpy knows no bfloat16
                digest.update(f"{name}.{key}".encode() + raw.numpy().tobytes())
    return digest.hexdigest()


def note_tables(model: nn.Module) -> None:
    """Record that the CDF tables of a codec, and of the methods on it, were built from its current
    entropy bottlenecks.
    """
    provenance(unwrap(model)).tables = _bottleneck_hash(unwrap(model))
    for part in _parts(model):
        part.cdf_source_hash = _bottleneck_hash(part)


def _parts(model: nn.Module) -> list[Any]:
    """Return the methods that take part in coding; they may have entropy bottlenecks of their
    own.
    """
    roles = getattr(model, "roles", None)
    return list(roles.parts) if roles is not None else []


def _stale(part: nn.Module, tables: str) -> bool:
    made: list[Any] = [m for m in entropy_models(part) if hasattr(m, "_quantized_cdf")]
    return not all(m._quantized_cdf.numel() for m in made) or tables != _bottleneck_hash(part)


def update_tables(codec: Any) -> None:
    """Rebuild all CDF tables of a codec, with the scale table of its Gaussian conditionals if it
    has one.
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
    """Rebuild the CDF tables of a codec and of the methods on it if the entropy bottlenecks have
    changed since the tables were built.

    Tables that are up to date are kept. Rebuilt on another machine, or from rounded weights, they
    may differ in the last bit, and existing bitstreams would no longer decode.
    """
    codec = unwrap(model)
    if _stale(codec, provenance(codec).tables):
        update_tables(codec)
    for part in _parts(model):
        if _stale(part, part.cdf_source_hash):
            part.update(force=True)
    note_tables(model)
