"""bfloat16 autocast for training; entropy models stay in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.entropy import entropy_models


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type for `precision` ("auto", "32", "bf16") on `device`; None for plain
    float32.

    "auto" is bfloat16 where the device computes in it natively (GPUs since Ampere, CPUs with
    AVX512_BF16 or AMX).
    """
    if precision == "32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu":
        native = (
            getattr(torch.cpu, name, lambda: False)
            for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
        return torch.bfloat16 if any(supported() for supported in native) else None
    return None


@contextmanager
def entropy_models_in_float32(codec: nn.Module) -> Iterator[None]:
    """Run every entropy model of `codec` outside autocast, on float32 inputs, inside the block.

    In bfloat16, their 3x3 matrix products and the tails of their distributions lose all precision.
    """
    handles = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        context = torch.autocast(device, enabled=False)
        context.__enter__()
        stack.append(context)
        return tuple(map(_float, args)), {name: _float(value) for name, value in kwargs.items()}

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop().__exit__(None, None, None)

    stack: list[Any] = []
    for model in entropy_models(codec):
        handles.append(model.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(model.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
