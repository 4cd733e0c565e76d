"""Context models coded by one compiled kernel, the same for encoder and decoder.

CompressAI's codecs of the family of mbt2018 call five layers for each position, when encoding and
when decoding. Here one kernel goes over all positions. It computes in float64, and only what is in
float64 already: see `float64_coding`. Sums are added up in another order than by the layers, so
that results differ by about 1e-16, and symbols do not; each reads what the other writes.

Codecs whose context model has another form, or hooks, code by CompressAI's own loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from compressai.models.google import JointAutoregressiveHierarchicalPriors
from torch import Tensor

from nicprune.codecs.coding import Method
from nicprune.codecs.layer_kinds.pixel_context import PixelContext, pixel_context
from nicprune.codecs.rans import DAMAGED, Tables, compiled, encode, note_read, words_of
from nicprune.common.errors import CodecError


class ContextCoder:
    """A context model made ready for the kernel.

    Args:
        model: what it computes.
        tables: CDF tables of its Gaussian conditional.
        largest: latents below it can be written.
        kernels: the compiled kernels.
    """

    def __init__(self, model: PixelContext, tables: Tables, largest: float, kernels: Any):
        self._tables, self._largest, self._kernels = tables, largest, kernels
        self._reach, self._bound = model.reach, model.bound
        weight, bias = model.context
        self._channels = weight.shape[1]
        outputs, reach = weight.shape[0], model.reach
        taps = weight.permute(2, 3, 1, 0)
        first = model.layers[0][0].T
        self._params = first.shape[0] - outputs
        weights = [
            taps[:reach],
            taps[reach, :reach],
            first[: self._params],
            torch.cat(
                [first[self._params :].reshape(-1), *(w.T.reshape(-1) for w, _ in model.layers[1:])]
            ),
        ]
        # Weights that were in float32 are read as such, half as many bytes, and computed with in
        # float64: the same numbers.
        short = [w.float() for w in weights]
        if all(torch.equal(s.double(), w) for s, w in zip(short, weights, strict=True)):
            weights = short
        self._weights = [_flat(w) for w in weights]
        self._context_bias = _flat(bias)
        self._biases = _flat(torch.cat([b for _, b in model.layers]))
        self._sizes = np.array([outputs, *(len(w) for w, _ in model.layers)], np.int64)
        self._slopes = np.array(model.slopes, np.float64)
        self._scales = _flat(model.scale_table[:-1])

    def encode(self, latents: Tensor, params: Tensor) -> bytes:
        """Return a string of latents (C, H, W).

        Args:
            params: of the hyperprior, shape (P, H, W).

        Raises:
            CodecError: scales or latents are not finite.
        """
        symbols, rows, _ = self._run(params, _by_row(latents), None)
        return encode(symbols.reshape(-1), rows.reshape(-1), self._tables)

    def decode(self, string: bytes, params: Tensor) -> Tensor:
        """Return latents, with a border of p zeros around them: (C, H + 2 p, W + 2 p)."""
        symbols, _, decoded = self._run(params, None, words_of(string))
        note_read(string, symbols)
        height, width = (size + 2 * self._reach for size in params.shape[1:])
        return torch.from_numpy(decoded).view(height, width, self._channels).permute(2, 0, 1)

    def _run(
        self, params: Tensor, latents: np.ndarray | None, words: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        height, width = params.shape[1:]
        border, channels = self._reach, self._channels
        decoded = np.zeros((height + 2 * border, (width + 2 * border) * channels))
        symbols = np.empty((height * width, channels), np.int32)
        rows = np.empty_like(symbols)
        above, left, of_params, dense = self._weights
        fault = self._kernels.code_positions(
            words is not None,
            height,
            width,
            border,
            np.empty((0, 0)) if latents is None else latents,
            decoded,
            _by_row(params),
            above,
            left,
            self._context_bias,
            of_params,
            dense,
            self._sizes,
            int(self._sizes.max()),
            self._biases,
            self._slopes,
            float(self._largest),
            self._bound,
            self._scales,
            *self._tables,
            np.empty(0, np.uint32) if words is None else words,
            symbols,
            rows,
        )
        if fault == self._kernels.BAD_SCALE:
            raise CodecError(not_finite("scales"))
        if fault == self._kernels.BAD_LATENT:
            raise CodecError(not_finite("latents"))
        if fault:
            raise CodecError(DAMAGED)
        return symbols, rows, decoded

    def takes(self, params: Tensor, channels: int, reach: int) -> bool:
        """Return whether parameters (P, H, W), latents and border have the shapes of the model."""
        fits = (len(params), channels, reach) == (self._params, self._channels, self._reach)
        return fits and params.dim() == 3 and params.numel() > 0


def not_finite(what: str) -> str:
    """Return what is said of values that cannot be coded."""
    return (
        f"{what} of this codec are not finite, or too large to be coded: its weights are"
        " damaged, or its training diverged"
    )


def _flat(values: Tensor) -> np.ndarray:
    found: np.ndarray = values.detach().reshape(-1).contiguous().numpy()
    return found


def _by_row(values: Tensor) -> np.ndarray:
    """Return values (C, H, W) as rows of positions, each with its channels: (H, W C)."""
    channels, height, width = values.shape
    by_row = values.detach().permute(1, 2, 0).reshape(height, width * channels)
    found: np.ndarray = by_row.contiguous().numpy()
    return found


def _coder(
    codec: Any, y_hat: Tensor, params: Tensor, size: tuple[int, int], reach: int, largest: float
) -> ContextCoder | None:
    """Return what codes an image's latents in the kernel; None where CompressAI's loop has to."""
    kernels = compiled()
    if kernels is None or y_hat.dim() != 4 or params.shape[0] != 1 or params.dim() != 4:
        return None
    model = pixel_context(
        codec.context_prediction, codec.entropy_parameters, codec.gaussian_conditional
    )
    if model is None:
        return None
    if any(
        t.dtype != torch.float64 or t.device.type != "cpu" for t in (*model.tensors, y_hat, params)
    ):
        return None
    coder = ContextCoder(model, Tables.of(codec.gaussian_conditional), largest, kernels)
    padded = (size[0] + 2 * reach, size[1] + 2 * reach)
    if params.shape[2:] != size or y_hat.shape[2:] != padded or y_hat.shape[0] != 1:
        return None
    return coder if coder.takes(params[0], y_hat.shape[1], reach) else None


def compressing(own: Method, largest: float, usual: Callable[[], bool]) -> Method:
    """Return what a codec's `_compress_ar` does, in the kernel.

    Args:
        largest: latents below it can be written.
        usual: returns whether CompressAI's classes find symbols and indexes as they are known to.
    """

    @functools.wraps(own)
    def compress(
        self: Any,
        y_hat: Tensor,
        params: Tensor,
        height: int,
        width: int,
        kernel_size: int,
        padding: int,
    ) -> Any:
        size = height, width
        coder = _coder(self, y_hat, params, size, padding, largest) if usual() else None
        if coder is None:
            return own(self, y_hat, params, height, width, kernel_size, padding)
        inner = y_hat[0, :, padding : padding + height, padding : padding + width]
        return coder.encode(inner, params[0])

    return compress


def decompressing(own: Method, largest: float, usual: Callable[[], bool]) -> Method:
    """Return what a codec's `_decompress_ar` does, in the kernel; see `compressing`."""

    @functools.wraps(own)
    def decompress(
        self: Any,
        y_string: bytes,
        y_hat: Tensor,
        params: Tensor,
        height: int,
        width: int,
        kernel_size: int,
        padding: int,
    ) -> None:
        size = height, width
        coder = _coder(self, y_hat, params, size, padding, largest) if usual() else None
        if coder is None:
            own(self, y_string, y_hat, params, height, width, kernel_size, padding)
            return
        y_hat[0] = coder.decode(y_string, params[0])

    return decompress


OWN = {
    name: getattr(JointAutoregressiveHierarchicalPriors, name)
    for name in ("_compress_ar", "_decompress_ar")
}
"""CompressAI's own methods."""


def methods(largest: float, usual: Callable[[], bool]) -> list[tuple[type, str, Method, Method]]:
    """Return what is replaced while coding: class, name, CompressAI's own method, and this one."""
    return [
        (JointAutoregressiveHierarchicalPriors, name, OWN[name], change(OWN[name], largest, usual))
        for name, change in (("_compress_ar", compressing), ("_decompress_ar", decompressing))
    ]
