"""Export for other tools: CompressAI's own checkpoint where widths allow it, and ONNX, one checked
file per transform.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nicprune.codecs.anatomy import check_codec, unwrap
from nicprune.codecs.calling import run
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import example_image, image_shape, size_multiple
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.layer_kinds.entropy import is_bottleneck
from nicprune.codecs.replaced_forward import check_not_replaced
from nicprune.codecs.roles import ANALYSIS, SYNTHESIS, roles_of
from nicprune.common.errors import CodecError, FileError, first_line
from nicprune.common.files import write_atomically

EXPORTED = ("g_a", "h_a", "h_s", "g_s")
SIZES = ((2, 3), (1, 1))
"""Image sizes (H, W) at which transforms are compared, as multiples of what the codec's sides must
be a multiple of. The first is traced: z is 2x3 there, since a side of 1 would become a constant.
"""
TOLERANCE = 1e-4
"""Largest difference between ONNX Runtime and torch, relative to the output's largest value."""


def export_compressai(codec: nn.Module, path: str | Path) -> Path:
    """Write {"state_dict", "N", "M"} for stock CompressAI.

    The class's own `from_state_dict` must load it before it is written.

    Args:
        codec: a plain `CompressionModel`.
        path: the `.pth.tar` file to write.

    Raises:
        CodecError: not a plain codec (harden it first).
        FileError: stock CompressAI, which reads only N and M, cannot load these widths; names the
            first layers that do not fit.
    """
    ready = _plain_copy(codec)
    refresh_tables(ready)
    state = {key: value.detach().clone() for key, value in ready.state_dict().items()}
    stock = _stock(ready, state)
    image = example_image(ready, seed=0)
    with torch.no_grad():
        outputs = [_outputs(run(model, image)) for model in (stock.eval(), ready)]
    # A missing or reshaped output is as wrong as a different number.
    same = outputs[0].keys() == outputs[1].keys() and all(
        torch.equal(outputs[0][key], outputs[1][key]) for key in outputs[0]
    )
    if not same:
        raise FileError(
            f"stock {type(codec).__name__} loads these weights but computes something else; use"
            " nicprune.save and nicprune.load"
        )
    widths = {
        name: getattr(stock, name)
        for name in ("N", "M")
        if isinstance(getattr(stock, name, None), int)
    }
    return write_atomically(
        path, lambda temporary: torch.save({"state_dict": state, **widths}, temporary)
    )


def _plain_copy(codec: nn.Module) -> Any:
    """Return a copy on the CPU in float32, in evaluation mode.

    Raises:
        CodecError: not a codec, or one with methods attached, whose masks no other tool knows.
    """
    inner = unwrap(codec)
    check_codec(inner)
    check_not_replaced(inner)
    if inner is not codec or has_hooks(inner):
        raise CodecError(
            "this codec has methods on it, which other programs do not know; export harden(), one"
            " rate of it with harden(level=0), or one width with extract(0)"
        )
    return copy_codec(codec).cpu().float().eval()


def _outputs(out: dict[str, Any]) -> dict[str, Tensor]:
    return {
        "x_hat": out["x_hat"],
        **{f"likelihoods.{key}": value for key, value in out["likelihoods"].items()},
    }


def _stock(codec: Any, state: dict[str, Tensor]) -> nn.Module:
    """Load a state dict as stock CompressAI does."""
    name = type(codec).__name__
    loader = getattr(type(codec), "from_state_dict", None)
    if loader is None:
        raise FileError(
            f"{name} has no from_state_dict for stock CompressAI to load it with; use nicprune.save"
            " and nicprune.load"
        )
    options: dict[str, Any] = {}
    if "vr_entbttlnck" in inspect.signature(loader).parameters:
        options["vr_entbttlnck"] = bool(codec.vr_entbttlnck)
        # Stock CompressAI does not resize the tables of the variable-rate bottleneck when loading;
        # they are left empty, and update() rebuilds them.
        tables = ("_offset", "_quantized_cdf", "_cdf_length")
        for path, module in codec.named_modules():
            if is_bottleneck(module) and options["vr_entbttlnck"]:
                for table in tables:
                    state[f"{path}.{table}"] = state[f"{path}.{table}"].new_empty(0)
    try:
        stock: nn.Module = loader(dict(state), **options)
        return stock
    except Exception as error:  # a class outside CompressAI may raise anything
        misfits = _misfits(str(error))
        raise FileError(
            f"stock CompressAI cannot load this {name}: it reads N and M alone and expects every"
            f" other width to follow{': ' + misfits if misfits else ''}; use nicprune.load, or"
            " prune to uniform widths (widths: ...)"
        ) from None


def _misfits(message: str) -> str:
    """Return the first layers that a size mismatch names; if none, the error's first line."""
    lines = [line.strip() for line in message.splitlines() if "size mismatch for" in line]
    found = []
    for line in lines[:3]:
        name = line.split("size mismatch for ")[1].split(":")[0]
        shapes = [part.split("]")[0] for part in line.split("torch.Size([")[1:]]
        found.append(
            f"{name} is [{shapes[0]}] where [{shapes[1]}] would follow"
            if len(shapes) == 2
            else name
        )
    if not lines:
        return message.splitlines()[0] if message else ""
    return "; ".join(found) + ("; ..." if len(lines) > 3 else "")


def export_onnx(
    codec: nn.Module,
    folder: str | Path,
    *,
    check: bool = True,
    say: Callable[[str], Any] | None = None,
) -> list[Path]:
    """Write g_a.onnx, h_a.onnx, h_s.onnx and g_s.onnx (those that the codec has), for any height
    and width. Of a codec with other names, the modules that do the work of g_a and g_s.

    Entropy coding stays in Python: only transforms are exported.

    Args:
        codec: a plain `CompressionModel`.
        folder: folder for the files; files of these names are replaced.
        check: run each file in ONNX Runtime at two sizes and compare it with torch before it gets
            its name.
        say: called with a line per file: the difference between ONNX Runtime and torch.

    Raises:
        CodecError: the codec has no transforms of these names, has methods attached, or onnx is not
            installed.
        FileError: a transform cannot be exported, or a file cannot be written or computes something
            else.
    """
    ready = _plain_copy(codec)
    _require("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    transforms = {
        short: name
        for name, _ in ready.named_modules()
        if (short := name.rsplit(".", 1)[-1]) in EXPORTED
    }
    roles = roles_of(ready)
    for short, end in ((ANALYSIS, roles.analysis), (SYNTHESIS, roles.synthesis)):
        if end is not None and end.whole:
            transforms.setdefault(short, end.module)
    if not transforms:
        reason = f"; {roles.reason}" if roles.reason else ""
        raise CodecError(f"{type(codec).__name__} has none of {', '.join(EXPORTED)}{reason}")
    written = []
    for short, name in transforms.items():
        module = ready.get_submodule(name)
        inputs = [_example(ready, name, times) for times in SIZES]
        found: list[float] = []

        def write(
            path: Path,
            short: str = short,
            module: nn.Module = module,
            inputs: list[Tensor] = inputs,
            found: list[float] = found,
        ) -> None:
            try:
                write_onnx(module, inputs[0], path)
            except OSError:
                raise
            except Exception as error:
                cause: BaseException = error  # torch wraps what failed in advice
                while cause.__cause__ is not None:
                    cause = cause.__cause__
                raise FileError(
                    f"{short} cannot be exported to ONNX: {first_line(cause)}"
                ) from error
            if check:
                found += _differences(short, module, inputs, path)

        written.append(write_atomically(Path(folder) / f"{short}.onnx", write))
        if say is not None and check:
            sizes = " and ".join("x".join(map(str, x.shape[1:])) for x in inputs)
            say(
                f"{short}.onnx: ONNX Runtime = torch to {max(found):.1e} of the output's largest"
                f" value (cpu, float32, inputs {sizes})"
            )
    return written


def _require(*packages: str) -> None:
    import importlib

    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise CodecError(
                f"exporting to ONNX needs {package}, which is not installed: pip install"
                " 'nicprune[export]'"
            ) from None


def _example(codec: nn.Module, name: str, times: tuple[int, int]) -> Tensor:
    """Return an input for a transform: its input for a random image of this size, plus noise."""
    taken: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> None:
        taken.append(args[0].detach().clone())

    handle = codec.get_submodule(name).register_forward_pre_hook(take)
    try:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            size = [size_multiple(codec) * n for n in times]
            run(codec, torch.rand(1, image_shape(codec)[0], *size, generator=generator))
    finally:
        handle.remove()
    if not taken:
        raise CodecError(
            f"{name} cannot be exported: {type(codec).__name__} does not call it, or calls its"
            " layers one by one"
        )
    # The latents of an untrained codec all round to zero; noise makes the comparison meaningful.
    return taken[0] + torch.randn(taken[0].shape, generator=torch.Generator().manual_seed(1))


def write_onnx(module: nn.Module, x: Tensor, path: Path) -> None:
    """Write a module of one input (B, C, H, W) as ONNX, for any height and width."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        height, width = (
            torch.export.Dim("height", min=1, max=8192),
            torch.export.Dim("width", min=1, max=8192),
        )
        program = torch.onnx.export(
            module, (x,), dynamo=True, dynamic_shapes=({2: height, 3: width},), verbose=False
        )
        assert program is not None
        program.save(str(path))


def _differences(name: str, module: nn.Module, inputs: list[Tensor], path: Path) -> list[float]:
    """Run a file in ONNX Runtime; return its largest |difference| from torch for each input,
    relative to the largest value of the output.

    Raises:
        FileError: a difference is above `TOLERANCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for x in inputs:
        with torch.no_grad():
            expected = module(x)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        scale = max(float(expected.abs().max()), 1e-12)
        found.append(float((torch.from_numpy(output) - expected).abs().max()) / scale)
        if not found[-1] <= TOLERANCE:
            raise FileError(
                f"{name}.onnx does not compute what {name} does: they differ by {found[-1]:.1e} at"
                f" input {tuple(x.shape)}"
            )
    return found
