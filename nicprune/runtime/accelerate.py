"""Run a codec's transforms by a fast backend.

    fast = nip.accelerate(codec, backend="openvino")
    data = nip.encode(fast, "photo.png")
    nip.decode(codec, data)  # any backend decodes what any other encoded

Only transforms that the encoder alone or the decoder alone runs (g_a, h_a, g_s) are replaced: their
results reach the other side as whole numbers, or not at all. What both sides compute alike (h_s,
context and entropy parameters) stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nicprune.codecs.anatomy import check_codec, unwrap
from nicprune.codecs.calling import compress, decompress
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import image_shape, size_multiple
from nicprune.codecs.fast_coding import fast_indexes
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.replaced_forward import ACCELERATED, ReplacedForward, check_not_replaced
from nicprune.codecs.roles import sides_of_modules
from nicprune.common.errors import CodecError, RecipeError, closest
from nicprune.data.images import given_image
from nicprune.evaluation.padding import pad
from nicprune.evaluation.quality import psnr, string_bytes
from nicprune.runtime.backends import BACKENDS, PRECISIONS, Backend
from nicprune.runtime.layer_forms import LayerForm, choose_forms

TOLERANCE = 1e-4
"""Largest difference that "float32" may make to a transform's output, relative to its largest
value.
"""


@dataclass(frozen=True)
class Transform:
    """An accelerated transform.

    Attributes:
        name: its dotted name in the codec.
        difference: largest |difference| of its output from PyTorch's, relative to its largest
            value.
        layers: the forms chosen for its layers.
    """

    name: str
    difference: float
    layers: tuple[LayerForm, ...]


@dataclass(frozen=True)
class Acceleration:
    """The result of `accelerate`, and its effect on one image.

    Attributes:
        transforms: the transforms that the backend runs.
        bpp, psnr: bits per pixel and PSNR in dB, by PyTorch and by the backend; None for a codec
            that cannot code.
    """

    backend: str
    precision: str
    transforms: tuple[Transform, ...]
    bpp: tuple[float, float] | None
    psnr: tuple[float, float] | None

    def __str__(self) -> str:
        lines = [f"{self.backend}, {self.precision}"]
        for transform in self.transforms:
            lines.append(f"  {transform.name}: output differs by {transform.difference:.1e}")
            lines += [f"    {layer}" for layer in transform.layers]
        if self.bpp and self.psnr:
            lines.append(
                f"  one image: {self.bpp[0]:.4f} bpp, {self.psnr[0]:.3f} dB by PyTorch;"
                f" {self.bpp[1]:.4f} bpp, {self.psnr[1]:.3f} dB accelerated"
            )
        return "\n".join(lines)


@torch.no_grad()
def accelerate(
    codec: nn.Module,
    backend: str = "torch",
    precision: str = "float32",
    *,
    image: Tensor | str | Path | None = None,
    calibration: Iterable[Tensor | str | Path] = (),
) -> Any:
    """Return a codec that codes the same files, with its transforms run by a backend on the CPU.

    `compress`, `decompress`, `encode`, `decode` and `evaluate` work with it; it cannot be attached
    to, pruned, trained or saved. What was done is its attribute `acceleration`.

    Args:
        codec: a plain `CompressionModel`, pruned or not; it is copied.
        backend: "torch", "openvino" or "onnxruntime". The number of threads is torch's at this
            moment.
        precision: "float32"; "bf16" or "int8" where the backend has it.
        image: uint8 (C, H, W), or a file. Layers are measured and differences found on it; by
            default a smooth random image of 384x256 pixels.
        calibration: images for "int8", which finds ranges of activations by them.

    Raises:
        CodecError: not a plain codec, the backend is not installed or lacks the precision, no
            transform can be accelerated, or a transform compiled in float32 computes something
            else.
        RecipeError: there is no such backend or precision, or "int8" has no images.
    """
    attached = unwrap(codec) is not codec
    if not attached:
        check_codec(codec)
        check_not_replaced(codec)
    if attached or has_hooks(codec):
        raise CodecError(
            "a codec with methods on it is not accelerated: accelerate what harden() or"
            " extract(width) returns"
        )
    if precision not in PRECISIONS:
        raise RecipeError(f"unknown precision {precision!r}; {closest(precision, PRECISIONS)}")
    engine = BACKENDS[backend]()
    engine.check(precision)
    channels, side = image_shape(codec)
    multiple = size_multiple(codec)
    as_read = partial(_image, channels=channels, multiple=multiple)
    ranges = [as_read(one) for one in calibration] if precision == "int8" else []
    if precision == "int8" and not ranges:
        raise RecipeError("precision 'int8' needs images: calibration=[...]")
    fast: Any = copy_codec(codec).cpu().float().eval()
    refresh_tables(fast)
    sample = _smooth_image(channels, multiple) if image is None else as_read(image)
    inputs = _inputs(fast, [sample, *ranges])
    if not inputs:
        raise CodecError(
            f"{type(codec).__name__} has no transform that the encoder alone or the decoder alone"
            " runs from one tensor to one tensor"
        )
    # What a compiler took from the sample's size, a branch or a length, shows at another one.
    sizes = (side, side), (max(side, 320), max(side, 192))
    others = _inputs(fast, [_smooth_image(channels, multiple, size) for size in sizes])
    before = _coded(fast, sample)
    done = []
    for name, (x, *more) in inputs.items():
        module = fast.get_submodule(name)
        expected = [module(one) for one in (x, *others.get(name, ()))]
        function, layers = _compiled(module, name, x, more, engine, precision)
        difference = _difference(expected[0], function(x))
        _check_computes(name, backend, difference, precision)
        for one, right in zip(others.get(name, ()), expected[1:], strict=True):
            _check_computes(name, backend, _tried(function, one, right), precision, one)
        module.forward = ReplacedForward(function)
        done.append(Transform(name, difference, tuple(layers)))
    after = _coded(fast, sample)
    fast.requires_grad_(False).register_load_state_dict_pre_hook(_refuse_weights)
    fast.acceleration = Acceleration(
        backend,
        precision,
        tuple(done),
        (before[0], after[0]) if before and after else None,
        (before[1], after[1]) if before and after else None,
    )
    return fast


def _tried(function: Any, x: Tensor, expected: Tensor) -> float:
    """Return how far a compiled transform is from what it should compute; infinity if it fails."""
    try:
        return _difference(expected, function(x))
    except Exception:  # a backend may raise anything
        return math.inf


def _check_computes(
    name: str, backend: str, difference: float, precision: str, other: Tensor | None = None
) -> None:
    """Raise CodecError where a compiled transform computes something else, on the image that it was
    compiled with or on an `other`. Only float32 is held to a tolerance.
    """
    if difference <= TOLERANCE or precision != "float32" and math.isfinite(difference):
        return
    size = "" if other is None else f" where its input is {tuple(other.shape[-2:])}"
    raise CodecError(
        f"{name} compiled by {backend} does not compute what {name} does{size}: the outputs differ"
        f" by {difference:.1e}"
    )


def _compiled(
    module: nn.Module,
    name: str,
    x: Tensor,
    others: Sequence[Tensor],
    engine: Backend,
    precision: str,
) -> tuple[Any, list[LayerForm]]:
    try:
        rewritten, layers = choose_forms(module, name, x, engine, precision)
        return engine.compile(rewritten, x, precision, others or [x]), layers
    except Exception as error:  # a foreign transform may be anything that a compiler refuses
        raise CodecError(
            f"{name} cannot be compiled by {engine.name}:"
            f" {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error


def _refuse_weights(*_: Any) -> None:
    raise CodecError(ACCELERATED)


def _smooth_image(channels: int, multiple: int, size: tuple[int, int] = (256, 384)) -> Tensor:
    noise = torch.rand(1, channels, 12, 16, generator=torch.Generator().manual_seed(0))
    return pad(F.interpolate(noise, size, mode="bicubic").clamp(0, 1), multiple)[0]


def _image(image: Tensor | str | Path, channels: int, multiple: int) -> Tensor:
    """Return an image as padded floats, (1, C, H, W)."""
    return pad(given_image(image, channels).unsqueeze(0).float().div(255), multiple)[0]


def _inputs(codec: Any, images: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Return the inputs of each transform that may be accelerated, one for each image."""
    sides = sides_of_modules(codec, [name for name, _ in codec.named_modules() if name])
    one_sided = [name for name, (encodes, decodes) in sides.items() if encodes != decodes]
    outermost = [
        name
        for name in one_sided
        if not any(name.startswith(f"{other}.") for other in one_sided)
        and any(True for _ in codec.get_submodule(name).parameters())
    ]
    calls: dict[str, list[Any]] = {name: [] for name in outermost}

    def noting(name: str) -> Any:
        return lambda module, args, output: calls[name].append((args, output))

    handles = [codec.get_submodule(n).register_forward_hook(noting(n)) for n in outermost]
    try:
        for x in images:
            with fast_indexes():
                sent = compress(codec, x)
                decompress(codec, sent["strings"], sent["shape"], x)
    except Exception as error:  # a foreign codec's own code may raise anything
        raise CodecError(
            f"{type(codec).__name__} cannot code an image:"
            f" {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: [args[0].detach().clone() for args, _ in seen]
        for name, seen in calls.items()
        if len(seen) == len(images)
        and all(
            len(args) == 1
            and isinstance(args[0], Tensor)
            and args[0].dim() == 4  # not the modules that only change a vector of step sizes
            and isinstance(out, Tensor)
            for args, out in seen
        )
    }


def _coded(codec: Any, x: Tensor) -> tuple[float, float]:
    """Return bits per pixel and PSNR of an image."""
    with fast_indexes():
        sent = compress(codec, x)
        x_hat = decompress(codec, sent["strings"], sent["shape"], x)["x_hat"].clamp(0, 1)
    pixels = x.shape[-1] * x.shape[-2]
    return 8 * string_bytes(sent["strings"]) / pixels, psnr(x, x_hat)


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return math.inf
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-12)
