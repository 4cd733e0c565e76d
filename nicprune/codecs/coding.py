"""Entropy models that code arrays: CompressAI's make a list of every symbol, index and table, which
takes longer than to code them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from compressai.entropy_models import entropy_models, entropy_models_vbr
from torch import Tensor

from nicprune.codecs.rans import Tables, decode, encode

CODERS = (entropy_models._EntropyCoder, entropy_models_vbr._EntropyCoder)

Method = Callable[..., Any]


def _codes_by_rans(model: Any) -> bool:
    """Return whether an entropy model uses CompressAI's rANS coder, which others may replace."""
    coder: Any = model.entropy_coder
    return type(coder) in CODERS and coder.name == "ans"


def whole_numbers(values: Tensor) -> np.ndarray:
    """Return a tensor of whole numbers as int32, shape (n,), in the order of its dimensions."""
    found: np.ndarray = values.detach().reshape(-1).int().cpu().contiguous().numpy()
    return found


def compressing(own: Method) -> Method:
    """Return what an entropy model's `compress` does, without lists."""

    @functools.wraps(own)
    def compress(self: Any, inputs: Tensor, indexes: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _codes_by_rans(self) or inputs.dim() < 2 or inputs.shape != indexes.shape:
            return own(self, inputs, indexes, *args, **kwargs)
        symbols = _symbols(self, inputs, *args, **kwargs)
        _check_made(self)
        tables = Tables.of(self)
        return [
            encode(whole_numbers(some), whole_numbers(rows), tables)
            for some, rows in zip(symbols, indexes, strict=True)
        ]

    return compress


def decompressing(own: Method) -> Method:
    """Return what an entropy model's `decompress` does, without lists."""

    @functools.wraps(own)
    def decompress(
        self: Any,
        strings: Any,
        indexes: Tensor,
        dtype: torch.dtype = torch.float,
        means: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        listed = isinstance(strings, (tuple, list)) and len(strings) == indexes.size(0)
        if not _codes_by_rans(self) or not listed or indexes.dim() < 2 or not _fit(means, indexes):
            return own(self, strings, indexes, dtype, means, *args, **kwargs)
        _check_made(self)
        tables = Tables.of(self)
        symbols = torch.empty(indexes.shape, dtype=torch.int32)
        for i, string in enumerate(strings):
            read = decode(string, whole_numbers(indexes[i]), tables)
            symbols[i] = torch.from_numpy(read).reshape(indexes.shape[1:])
        return _latents(self, symbols.to(self._quantized_cdf.device), dtype, means, *args, **kwargs)

    return decompress


def _symbols(
    model: Any, inputs: Tensor, means: Tensor | None = None, qs: Tensor | None = None
) -> Tensor:
    if qs is None:
        found: Tensor = model.quantize(inputs, "symbols", means)
    else:
        found = model.quantize_variable(inputs, "symbols", means=means, qs=qs)
    return found


def _latents(
    model: Any,
    symbols: Tensor,
    dtype: torch.dtype,
    means: Tensor | None,
    qs: Tensor | None = None,
) -> Tensor:
    if qs is None:
        found: Tensor = model.dequantize(symbols, means, dtype)
    else:
        found = model.dequantize_variable(symbols, means=means, dtype=dtype, qs=qs)
    return found


def _fit(means: Tensor | None, indexes: Tensor) -> bool:
    """Return whether means have the shape of the indexes, or one value for a channel."""
    if means is None or means.shape == indexes.shape:
        return True
    return means.shape[:2] == indexes.shape[:2] and all(size == 1 for size in means.shape[2:])


def _check_made(model: Any) -> None:
    """Raise as CompressAI does where there are no tables yet."""
    model._check_cdf_size()
    model._check_cdf_length()
    model._check_offsets_size()


METHODS: list[tuple[type, str, Method, Method]] = [
    (cls, name, own, change(own))
    for cls in (entropy_models.EntropyModel, entropy_models_vbr.EntropyModelVbr)
    for name, change in (("compress", compressing), ("decompress", decompressing))
    for own in (getattr(cls, name),)
]
"""Methods that are replaced while coding: class, name, CompressAI's own, replacement."""
