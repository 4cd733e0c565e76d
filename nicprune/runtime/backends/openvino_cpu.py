"""OpenVINO on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.runtime.backends.backend import BACKENDS, Backend, Function

HINTS = {"float32": "f32", "bf16": "bf16", "int8": "f32"}


@BACKENDS.register("openvino")
class OpenVINO(Backend):
    """OpenVINO on the CPU; "int8" by NNCF's post-training quantisation."""

    name = "openvino"
    precisions = ("float32", "bf16", "int8")
    packages: tuple[str, ...] = ("openvino",)
    extra = "openvino"

    def check(self, precision: str) -> None:
        self.packages = ("openvino", "nncf") if precision == "int8" else ("openvino",)
        super().check(precision)

    def compile(
        self, transform: nn.Module, example: Tensor, precision: str, calibration: Sequence[Tensor]
    ) -> Function:
        import openvino

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch.jit's deprecation, inside OpenVINO
            model = openvino.convert_model(transform.eval(), example_input=example)
        # Any number of images of any size: OpenVINO leaves these sizes open, not the channels.
        if precision == "int8":
            model = _quantised(model, calibration)
        compiled = openvino.Core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": HINTS[precision],
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            },
        )
        return lambda x: torch.from_numpy(compiled(x.detach().contiguous().numpy())[0].copy())


def _quantised(model: Any, calibration: Sequence[Tensor]) -> Any:
    import nncf

    data = nncf.Dataset(list(calibration), lambda x: x.contiguous().numpy())
    return nncf.quantize(model, data, subset_size=len(calibration))
