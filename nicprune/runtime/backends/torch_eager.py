"""PyTorch itself: rewritten layers, channels_last, no autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nicprune.codecs.memory_format import fast_format_on, in_format
from nicprune.runtime.backends.backend import BACKENDS, Backend, Function


@BACKENDS.register("torch")
class TorchEager(Backend):
    """PyTorch in eager mode; "bf16" by autocast, for processors that compute in it natively."""

    name = "torch"
    precisions = ("float32", "bf16")
    forms = (
        "convolution and pixel shuffle",
        "pixel unshuffle and convolution",
        "matrix product",
    )

    def compile(
        self, transform: nn.Module, example: Tensor, precision: str, calibration: Sequence[Tensor]
    ) -> Function:
        memory_format = fast_format_on(transform.eval(), example)
        in_format(transform, memory_format)

        def run(x: Tensor) -> Tensor:
            with (
                torch.inference_mode(),
                torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
            ):
                out: Tensor = transform(x.contiguous(memory_format=memory_format))
            # A copy made outside inference mode may be used by any other code.
            return out.float().clone() if out.is_inference() else out.float()

        return run
