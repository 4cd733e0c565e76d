"""ONNX Runtime on the CPU."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.runtime.backends.backend import BACKENDS, Backend, Function
from nicprune.storage.export import write_onnx


@BACKENDS.register("onnxruntime")
class ONNXRuntime(Backend):
    """ONNX Runtime on the CPU; "int8" by its own static quantisation."""

    name = "onnxruntime"
    precisions = ("float32", "int8")
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "export"

    def compile(
        self, transform: nn.Module, example: Tensor, precision: str, calibration: Sequence[Tensor]
    ) -> Function:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "transform.onnx"
            write_onnx(transform.eval(), example, path)
            if precision == "int8":
                path = _quantised(path, calibration)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        name = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(
            session.run(None, {name: x.detach().contiguous().numpy()})[0]
        )


def _quantised(path: Path, calibration: Sequence[Tensor]) -> Path:
    import onnxruntime
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.left, None)
            return None if x is None else {name: x.contiguous().numpy()}

    name = onnxruntime.InferenceSession(str(path)).get_inputs()[0].name
    prepared, out = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    logging.getLogger().disabled, before = True, logging.getLogger().disabled
    try:
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared), str(out), Reader(), quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
        )  # fmt: skip
    finally:
        logging.getLogger().disabled = before
    return out
