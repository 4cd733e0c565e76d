"""The optimisers for training, by name.

`soap` is Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., "SOAP: Improving and
Stabilizing Shampoo using Adam", 2024, arXiv 2409.11321), from the package pytorch-optimizer. The
matrix products of a convolution's weight are computed here, without copying the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pytorch_optimizer import SOAP
from torch import Tensor, nn

from nicprune.common.errors import RecipeError, closest

MAX_PRECONDITIONED = 1024
"""Axes longer than this are not preconditioned, as in Adam, unless another length is given."""


class ConvolutionSOAP(SOAP):
    """SOAP for weights of convolutions.

    A weight (O, I, H, W) is treated as a tensor of three axes: channels, channels and the H·W
    positions of the kernel, in memory order, channels_last or not. The parent class copies the
    weight to move each of four axes to the front, and its step takes about twice as long.
    """

    def project(
        self,
        grad: Tensor,
        state: Any,
        merge_dims: bool = False,
        max_precondition_dim: int = MAX_PRECONDITIONED,
        project_type: str = "forward",
    ) -> Tensor:
        """Rotate `grad` into the eigenbases `state["Q"]`, or back unless `project_type` is
        "forward".
        """
        out = _axes(grad)
        for axis, basis in enumerate(state["Q"]):
            if len(basis):
                out = _times(out, basis if project_type == "forward" else basis.T, axis)
        return _like(out, grad)

    def get_orthogonal_matrix_qr(
        self, state: Any, max_precondition_dim: int = MAX_PRECONDITIONED, merge_dims: bool = False
    ) -> list[Any]:
        """Take one step of power iteration for each eigenbasis, and order `exp_avg_sq` as the
        basis; see the parent class.
        """
        squares = _axes(state["exp_avg_sq"])
        bases: list[Any] = []
        for axis, (moments, basis) in enumerate(zip(state["GG"], state["Q"], strict=True)):
            if not len(moments):
                bases.append([])
                continue
            product = moments @ basis
            order = torch.argsort((basis * product).sum(dim=0), descending=True)
            squares = squares.index_select(axis, order)
            bases.append(_orthogonal(product.index_select(1, order)))
        state["exp_avg_sq"] = _like(squares, state["exp_avg_sq"])
        return bases

    @staticmethod
    def get_orthogonal_matrix(mat: Any) -> list[Any]:
        """Return the first eigenbases; computed on the CPU, as in `_orthogonal`."""
        device = next((m.device for m in mat if len(m)), torch.device("cpu"))
        on_cpu: Any = [m.cpu() if len(m) else m for m in mat]
        found = SOAP.get_orthogonal_matrix(on_cpu)
        return [q.to(device) if len(q) else q for q in found]

    def init_pre_conditioner(self, grad: Tensor, state: Any, *args: Any, **settings: Any) -> None:
        """Create the state of the preconditioner; see the parent class."""
        super().init_pre_conditioner(_axes(grad), state, *args, **settings)

    def update_pre_conditioner(
        self,
        grad: Tensor,
        state: Any,
        step: int,
        max_precondition_dim: int = MAX_PRECONDITIONED,
        precondition_1d: bool = False,
        merge_dims: bool = False,
    ) -> None:
        """Update the gradient's second moments along each axis, and their eigenbases every
        `precondition_frequency` steps.
        """
        axes = _axes(grad)
        for axis, moments in enumerate(state["GG"]):
            if len(moments):
                moments.lerp_(_outer(axes, axis), 1 - state["shampoo_beta"])
        if state["Q"] is None:
            state["Q"] = self.get_orthogonal_matrix(state["GG"])
        elif step > 0 and step % state["precondition_frequency"] == 0:
            state["Q"] = self.get_orthogonal_matrix_qr(state, max_precondition_dim)


def _axes(tensor: Tensor) -> Tensor:
    """Return a convolution's weight as a tensor of three axes in memory order; any other tensor as
    it is.
    """
    if tensor.ndim != 4:
        return tensor
    if tensor.is_contiguous():
        return tensor.flatten(2)
    return tensor.permute(0, 2, 3, 1).flatten(1, 2)


def _like(axes: Tensor, tensor: Tensor) -> Tensor:
    """Undo `_axes`."""
    if tensor.ndim != 4:
        return axes
    if tensor.is_contiguous():
        return axes.view(tensor.shape)
    first, second, height, width = tensor.shape
    return axes.reshape(first, height, width, second).permute(0, 3, 1, 2)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Return Q of a QR decomposition in float32, computed on the CPU: for matrices of some hundred
    rows a GPU takes longer, and does nothing else meanwhile.
    """
    orthogonal: Tensor = torch.linalg.qr(matrix.to("cpu", torch.float32))[0]
    return orthogonal.to(matrix)


def _times(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply one axis by a matrix."""
    if axis == tensor.ndim - 1:
        return tensor @ matrix
    if axis == 0:
        return (matrix.T @ tensor.flatten(1)).view(tensor.shape)
    if axis == tensor.ndim - 2:
        return matrix.T @ tensor
    return (tensor.transpose(axis, -1) @ matrix).transpose(axis, -1)


def _outer(tensor: Tensor, axis: int) -> Tensor:
    """Return the second moments along an axis: the sum over all other axes of the outer
    products.
    """
    if axis == tensor.ndim - 1:
        rows = tensor.flatten(0, -2)
        return rows.T @ rows
    rows = tensor.transpose(0, axis).flatten(1)
    return rows @ rows.T


def _adam(parameters: Iterable[nn.Parameter], lr: float, longest: int) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr)


def _soap(parameters: Iterable[nn.Parameter], lr: float, longest: int) -> torch.optim.Optimizer:
    return ConvolutionSOAP(
        list(parameters),
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        precondition_frequency=10,
        max_precondition_dim=longest,
    )


DEFAULT_LR = {"adam": 1e-4, "soap": 1e-3}
"""CompressAI's learning rate for Adam; for SOAP, the same for training and for pruning
(`reports/evidence_optimizer`).
"""

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float, int], torch.optim.Optimizer]] = {
    "adam": _adam,
    "soap": _soap,
}


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    max_precondition_dim: int = MAX_PRECONDITIONED,
) -> torch.optim.Optimizer:
    """Return a new optimiser.

    Args:
        name: one of `OPTIMIZERS`.
        parameters: the parameters to update, without the quantiles of entropy bottlenecks.
        lr: the learning rate.
        max_precondition_dim: SOAP leaves axes longer than this as they are. The preconditioner of
            an axis of length n costs n^2 per weight's row and n^3 every ten steps, so wide
            pointwise convolutions, as in EVC, train faster with a small one.

    Raises:
        RecipeError: there is no such optimiser.
    """
    if name not in OPTIMIZERS:
        raise RecipeError(f"unknown optimizer {name!r}; {closest(name, OPTIMIZERS)}")
    return OPTIMIZERS[name](parameters, lr, max_precondition_dim)
