"""Codecs for other tools: CompressAI's own checkpoint where widths allow, and ONNX, one file a transform, each checked."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs import FACTOR, check_codec, is_bottleneck
from nicprune.errors import CodecError, FileError
from nicprune.files import write_atomically

EXPORTED = ("g_a", "h_a", "h_s", "g_s")
SIZES = ((64, 64), (96, 160))
TOLERANCE = 1e-4
"""Largest difference between ONNX Runtime and torch, relative to the output's largest value."""


def export_compressai(codec: nn.Module, path: str | Path) -> Path:
    """Write {"state_dict": ...} for stock CompressAI, after loading it back with the class's own `from_state_dict`.

    Raises:
        FileError: stock CompressAI cannot load these widths (it reads only N and M); names the layers in the way.
    """
    check_codec(codec)
    ready: Any = copy.deepcopy(codec).cpu().float().eval()
    ready.update(force=True)
    state = {key: value.detach().clone() for key, value in ready.state_dict().items()}
    stock = _stock(ready, state)
    image = torch.rand(1, 3, FACTOR, FACTOR, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = float((stock.eval()(image)["x_hat"] - ready(image)["x_hat"]).abs().max())
    if found != 0:
        raise FileError(f"stock {type(codec).__name__} loads these weights but computes something else (largest difference {found:.1e})")
    return write_atomically(path, lambda temporary: torch.save({"state_dict": state}, temporary))


def _stock(codec: Any, state: dict[str, Tensor]) -> nn.Module:
    """Load a state dict as stock CompressAI does."""
    loader = type(codec).from_state_dict
    options: dict[str, Any] = {}
    if "vr_entbttlnck" in inspect.signature(loader).parameters:
        options["vr_entbttlnck"] = bool(codec.vr_entbttlnck)
        # The variable-rate bottleneck's tables are not resized when loading: stock tools update() after it.
        tables = ("_offset", "_quantized_cdf", "_cdf_length")
        for name, module in codec.named_modules():
            if is_bottleneck(module) and options["vr_entbttlnck"]:
                for table in tables:
                    state[f"{name}.{table}"] = state[f"{name}.{table}"].new_empty(0)
    try:
        return loader(dict(state), **options)
    except (RuntimeError, KeyError, IndexError, AssertionError) as error:
        misfits = _misfits(str(error))
        raise FileError(
            f"stock CompressAI cannot load this {type(codec).__name__}: it reads N and M alone and expects every other width to follow"
            f"{': ' + misfits if misfits else ''}; use nicprune.load, or prune to uniform widths (widths: ...)"
        ) from None


def _misfits(message: str) -> str:
    """The first layers that a size mismatch names."""
    lines = [line.strip() for line in message.splitlines() if "size mismatch for" in line]
    told = []
    for line in lines[:3]:
        name = line.split("size mismatch for ")[1].split(":")[0]
        shapes = [part.split("]")[0] for part in line.split("torch.Size([")[1:]]
        told.append(f"{name} is [{shapes[0]}] where [{shapes[1]}] would follow" if len(shapes) == 2 else name)
    return "; ".join(told) + ("; ..." if len(lines) > 3 else "")


def export_onnx(codec: nn.Module, folder: str | Path, *, check: bool = True) -> list[Path]:
    """Write g_a.onnx, h_a.onnx, h_s.onnx and g_s.onnx (those that the codec has), for any height and width.

    Entropy coding stays in Python: only transforms are exported. Each file is run in ONNX Runtime at two sizes and compared.

    Raises:
        CodecError: the codec has no transforms of these names, or onnx is not installed.
        FileError: a file cannot be written, or does not compute the same.
    """
    check_codec(codec)
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise CodecError("exporting to ONNX needs onnx, onnxruntime and onnxscript: pip install 'nicprune[export]'") from None
    ready = copy.deepcopy(codec).cpu().float().eval()
    transforms = [(name, module) for name, module in ready.named_modules() if name.rsplit(".", 1)[-1] in EXPORTED]
    if not transforms:
        raise CodecError(f"{type(codec).__name__} has none of {', '.join(EXPORTED)}")
    written = []
    for name, module in transforms:
        short = name.rsplit(".", 1)[-1]
        inputs = [_example(ready, name, size) for size in SIZES]
        path = write_atomically(Path(folder) / f"{short}.onnx", partial(_write, module, inputs[0]))
        if check:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            for x in inputs:
                _compare(short, module, x, session.run(None, {session.get_inputs()[0].name: x.numpy()}))
        written.append(path)
    return written


def _example(codec: nn.Module, name: str, size: tuple[int, int]) -> Tensor:
    """What a transform is given for an image of this size, values of its usual kind."""
    taken: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> None:
        taken.append(args[0].detach().clone())

    handle = codec.get_submodule(name).register_forward_pre_hook(take)
    height, width = (-(-side // FACTOR) * FACTOR for side in size)
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            codec(image)
    finally:
        handle.remove()
    # An untrained codec's latents all round to zero; any values do for comparing.
    return taken[0] + torch.randn(taken[0].shape, generator=torch.Generator().manual_seed(1))


def _write(module: nn.Module, x: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        height, width = torch.export.Dim("height", min=1, max=8192), torch.export.Dim("width", min=1, max=8192)
        program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=({2: height, 3: width},), verbose=False)
        assert program is not None
        program.save(str(path))


def _compare(name: str, module: nn.Module, x: Tensor, outputs: Sequence[Any]) -> None:
    with torch.no_grad():
        expected = module(x)
    scale = max(float(expected.abs().max()), 1e-12)
    found = float((torch.from_numpy(outputs[0]) - expected).abs().max()) / scale
    if not found <= TOLERANCE:
        raise FileError(f"{name}.onnx does not compute what {name} does: they differ by {found:.1e} at input {tuple(x.shape)}")
