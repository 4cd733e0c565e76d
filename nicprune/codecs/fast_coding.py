"""Code without detours: methods of CompressAI that are replaced while coding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from compressai.entropy_models import EntropyModel, EntropyModelVbr, GaussianConditional
from compressai.ops import LowerBound
from torch import Tensor

from nicprune.codecs import coding, context_coding
from nicprune.codecs.rans import compiled
from nicprune.common.errors import CodecError

_COMPARED = GaussianConditional.build_indexes

LARGEST_SYMBOL = 1 << 26
"""Latents are written as whole numbers below this. CompressAI's coder, which shifts a number right
until nothing is left of it, never ends from twice as large on, nor for NaN and infinity, which
become the largest there is.
"""


def _refuse_unless(fine: Tensor, what: str) -> None:
    if not bool(fine.all()):
        raise CodecError(context_coding.not_finite(what))


def _found_quickly(self: Any, scales: Tensor) -> Tensor | None:
    """Return the indexes of scales by the compiled kernel; None where it does not serve."""
    table, bound = self.scale_table, self.lower_bound_scale
    kernels = compiled()
    if kernels is None or type(bound) is not LowerBound or not scales.numel():
        return None
    exact = (torch.float32, torch.float64)  # what float64 holds
    if scales.device.type != "cpu" or scales.dtype != table.dtype or table.dtype not in exact:
        return None
    smallest, table = float(bound.bound), table[:-1].double().numpy()
    values = scales.detach().to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    rows = torch.empty(scales.shape, dtype=torch.int32)
    begin = kernels.first_rows(table)
    fault = kernels.find_rows(
        values.view(-1).numpy(), smallest, table, begin, rows.view(-1).numpy()
    )
    if fault:
        raise CodecError(context_coding.not_finite("scales"))
    return rows


def _bisected(self: Any, scales: Tensor) -> Tensor:
    if (rows := _found_quickly(self, scales)) is not None:
        return rows
    _refuse_unless(torch.isfinite(scales), "scales")
    if scales.dtype != self.scale_table.dtype:  # torch.bucketize needs a single dtype
        compared: Tensor = _COMPARED(self, scales)
        return compared
    scales = self.lower_bound_scale(scales)
    return torch.bucketize(scales.contiguous(), self.scale_table[:-1], out_int32=True)


def _checking(quantize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same, of values that can be coded."""

    @functools.wraps(quantize)
    def checked(
        self: Any, inputs: Tensor, mode: str, means: Tensor | None = None, qs: Tensor | None = None
    ) -> Tensor:
        if mode == "symbols":
            centred = inputs if means is None else inputs - means
            steps = centred if qs is None else centred / qs
            _refuse_unless(steps.abs() < LARGEST_SYMBOL, "latents")
        if qs is None:
            return quantize(self, inputs, mode, means)
        return quantize(self, inputs, mode, means, qs)

    return checked


Replacement = tuple[type, str, Callable[..., Any], Callable[..., Any]]

_ARITHMETIC: list[Replacement] = [
    (GaussianConditional, "build_indexes", _COMPARED, lambda self, x: _bisected(self, x)),
    *(
        (cls, name, getattr(cls, name), _checking(getattr(cls, name)))
        for cls, name in (
            (EntropyModel, "quantize"),
            (EntropyModelVbr, "quantize"),
            (EntropyModelVbr, "quantize_variable"),
        )
    ),
]
"""Methods that find symbols and indexes: class, name, CompressAI's own, replacement."""


_KNOWN = {"dequantize": {GaussianConditional.dequantize}} | {
    name: {own, other}
    for cls, name, own, other in _ARITHMETIC
    if issubclass(GaussianConditional, cls)
}


def _as_known() -> bool:
    """Return whether Gaussian conditionals find symbols, indexes and latents as CompressAI does."""
    return all(getattr(GaussianConditional, name) in known for name, known in _KNOWN.items())


_CODING: list[Replacement] = [
    *_ARITHMETIC,
    *coding.METHODS,
    *context_coding.methods(LARGEST_SYMBOL, _as_known),
]
"""All methods that are replaced while coding."""


@contextmanager
def fast_indexes() -> Iterator[None]:
    """Code without detours inside the block: find the CDF table of each latent by search, code
    arrays rather than lists, and compute context models in one compiled kernel.

    CompressAI compares the scale of each latent with all 64 entries of the scale table, makes lists
    of all symbols and tables, and calls five layers for each position of a context model. With
    numba (`pip install 'nicprune[fast]'`) all of these are compiled; without, the first two are
    done by torch and CompressAI's coder. Context models are computed by the kernel in float64
    alone, in which `encode` and `evaluate` run them.

        with nicprune.fast_indexes():
            sent = codec.compress(x)

    The indexes are the same, and so are the bitstreams. Latents or scales that are not finite, with
    which CompressAI's coder would never end, raise `CodecError`. nicprune's own functions code
    inside it. A `build_indexes` of a subclass, or one that replaced CompressAI's, is not changed.
    """
    with ExitStack() as stack:
        for cls, name, own, other in _CODING:
            if getattr(cls, name) is own:
                setattr(cls, name, other)
                # With several threads it may end early for another one, which then compares:
                # slower, and the same.
                stack.callback(setattr, cls, name, own)
        yield
