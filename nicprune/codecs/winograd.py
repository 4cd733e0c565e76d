"""3x3 convolutions in float64 by Winograd's minimal filtering.

F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016
(arXiv 1509.09308): a tile of 4x4 outputs takes 36 products for each pair of channels instead of
144. In float64, where processors compute half as fast as in float32, this more than pays for the
transforms; their rounding errors, about 1e-14 of the largest output, do not matter there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

SMALLEST_TILES, SMALLEST_WEIGHT = 16, 2048
"""Smallest number of tiles in a batch, and of pairs of channels, for which it is faster."""

_INPUT = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
_KERNEL = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
    dtype=torch.float64,
).div(24)
_OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    dtype=torch.float64,
)
INPUT, KERNEL, OUTPUT = (torch.kron(one, one) for one in (_INPUT, _KERNEL, _OUTPUT))
"""Transforms of 6x6 inputs, 3x3 kernels and to 4x4 outputs, of both axes at once."""


class Winograd:
    """Convolutions, with the transformed kernels of weights kept as long as the weights live.

    Attributes:
        on: whether there are any; off, `convolve` returns None for all.
    """

    def __init__(self) -> None:
        self.on = True
        self._kernels: Any = WeakTensorKeyDictionary()

    def convolve(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        """Return what `torch.conv2d` returns for these arguments, or None where it is no faster, or
        the convolution is not one of 3x3 without stride, dilation and groups in float64.

        Args:
            input: shape (B, C, H, W).
            weight: shape (O, C, 3, 3).
        """
        if not self.on or weight.shape[2:] != (3, 3) or input.dim() != 4 or groups != 1:
            return None
        if {input.dtype, weight.dtype} != {torch.float64} or weight.device.type != "cpu":
            return None
        if _both(stride) != (1, 1) or _both(dilation) != (1, 1) or isinstance(padding, str):
            return None
        (batch, inputs, height, width), outputs = input.shape, weight.shape[0]
        above, left = _both(padding)
        rows, columns = height + 2 * above - 2, width + 2 * left - 2
        down, across = -(-rows // 4), -(-columns // 4)
        if min(rows, columns) < 1 or inputs != weight.shape[1]:
            return None  # torch says what is wrong
        if batch * down * across < SMALLEST_TILES or inputs * outputs < SMALLEST_WEIGHT:
            return None
        sides = (
            left,
            4 * across + 2 - width - left,
            above,
            4 * down + 2 - height - above,
        )
        tiles = F.pad(input, sides).permute(0, 2, 3, 1).unfold(1, 6, 4).unfold(2, 6, 4)
        tiles = tiles.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)
        products = (INPUT @ tiles).view(36, -1, inputs) @ self._kernel(weight)
        out = (OUTPUT @ products.view(36, -1)).view(4, 4, batch, down, across, outputs)
        out = out.permute(2, 3, 0, 4, 1, 5).reshape(batch, 4 * down, 4 * across, outputs)
        out = out[:, :rows, :columns]
        return (out if bias is None else out + bias).permute(0, 3, 1, 2)

    def _kernel(self, weight: Tensor) -> Tensor:
        """Return the transformed kernels of a weight, shape (36, C, O)."""
        # Its version does not say whether `weight.data` was written to, as by a codec that sets its
        # weights for each image.
        made_of, kernel = self._kernels.get(weight, (None, None))
        if made_of is None or not torch.equal(made_of, weight):
            outputs, inputs = weight.shape[:2]
            kernel = (KERNEL @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, inputs, outputs)
            self._kernels[weight] = weight.detach().clone(), kernel
        return kernel  # type: ignore[no-any-return]


def _both(value: Any) -> tuple[int, int]:
    """Return an argument of both axes, given once or for each."""
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]
