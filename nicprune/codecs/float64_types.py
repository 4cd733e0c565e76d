"""Run a codec in float64 whatever types its own code asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

T = TypeVar("T", bound=nn.Module)

PRODUCTS = {
    F.linear, torch.addmm, torch.baddbmm, torch.bmm, torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, torch.einsum,
    torch.matmul, torch.mm, torch.batch_norm, torch.group_norm, torch.instance_norm,
    torch.layer_norm, torch.prelu, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
}  # fmt: skip
"""Functions that refuse operands of two types."""

HIGHER = {
    torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128, torch.complex32: torch.complex128,
}  # fmt: skip
"""Of each type of lower precision, the one of float64's."""

TENSOR_CLASSES: set[Any] = {torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor}
TENSOR_CLASSES |= {f"torch.{cls.__name__}" for cls in TENSOR_CLASSES}


def as_precise(dtype: torch.dtype, value: Tensor) -> torch.dtype:
    """Return the type that a tensor has among others in this floating-point type: the complex one
    of the same precision if it is complex, and its own if it holds whole numbers.
    """
    if value.is_complex():
        return dtype.to_complex()
    return dtype if value.is_floating_point() else value.dtype


def to_type(dtype: torch.dtype, values: Any) -> Any:
    """Return nested values with all floating-point tensors in this type, and complex ones in its
    precision.
    """
    return tree_map_only(Tensor, lambda t: t.to(as_precise(dtype, t)), values)


def to_precision(dtype: torch.dtype, module: T) -> T:
    """Convert a module as `float` and `double` do, and its complex values, which these leave as
    they are; return it.
    """
    whole: Any = module
    converted: T = whole._apply(lambda t: t.to(as_precise(dtype, t)))
    return converted


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Let a codec whose weights are in float64 compute in it inside the block, and nowhere in less:
    not where its code converts to float32 or makes tensors in it.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)


class _Float64(TorchFunctionMode):
    """Asks for float64 where code asks for a lower precision, and computes products of the two."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if func in (Tensor.cfloat, Tensor.chalf):  # type: ignore[attr-defined]
            return args[0].cdouble()
        if func in (Tensor.to, Tensor.type_as) and len(args) + len(kwargs) > 1:
            other = args[1] if len(args) > 1 else kwargs.get("other")
            if isinstance(other, Tensor) and other.dtype in HIGHER:
                return args[0].to(other.device, HIGHER[other.dtype])
        if func is Tensor.type and len(args) > 1 and args[1] in TENSOR_CLASSES:
            return args[0].double()
        # `view(dtype)` does not convert: it reads the same bytes.
        if func is not Tensor.view:
            args = tuple(_raised(value) for value in args)
            kwargs = {name: _raised(value) for name, value in kwargs.items()}
        if func in PRODUCTS:
            args, kwargs = tree_map_only(Tensor, _converted, (args, kwargs))
        return func(*args, **kwargs)


def _converted(value: Tensor) -> Tensor:
    """A tensor in float64; a parameter as it is: in another type it is not the codec's own."""
    return value if isinstance(value, nn.Parameter) else value.to(as_precise(torch.float64, value))


def _raised(value: Any) -> Any:
    return HIGHER.get(value, value) if isinstance(value, torch.dtype) else value
