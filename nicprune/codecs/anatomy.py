"""Anatomy of a CompressAI model: its transforms, the sides on which they run, its entropy
models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from compressai.losses import RateDistortionLoss
from compressai.models import CompressionModel
from compressai.models.vbr import JointAutoregressiveHierarchicalPriorsVbr, ScaleHyperpriorVbr
from torch import Tensor, nn

from nicprune.codecs.calling import WRAPS, run
from nicprune.common.errors import CodecError

TRANSFORMS = (
    "g_a",
    "h_a",
    "entropy_bottleneck",
    "h_s",
    "temporal_prior",
    "prior_fusion",
    "spatial_prior",
    "context_prediction",
    "channel_context",
    "entropy_parameters",
    "g_s",
)
"""Names of transforms, in the order in which they run."""

ENCODER_ONLY, DECODER_ONLY = ("g_a", "h_a"), ("g_s",)

SIDES = {"encoder": ENCODER_ONLY, "decoder": DECODER_ONLY}
"""Transforms that run on one side alone."""

CDF_BUFFERS = {"_offset", "_quantized_cdf", "_cdf_length", "scale_table"}
"""Buffers of entropy models that `update()` creates; their sizes depend on the weights."""

SIZE_MULTIPLE = 64
"""Images are padded to a multiple of this many pixels at least: the largest total stride among
CompressAI's codecs. See `example.size_multiple`.
"""


def check_codec(codec: object) -> None:
    """Raise CodecError unless `codec` is a CompressAI `CompressionModel`."""
    if hasattr(codec, "_orig_mod"):
        raise CodecError(COMPILED.format("the codec"))
    if not isinstance(codec, CompressionModel):
        raise CodecError(f"expected a compressai CompressionModel, got {type(codec).__name__}")


COMPILED = (
    "{} is compiled, which hides its layers: give the codec as it was before torch.compile (attach"
    " first, then compile what attach returned)"
)


def check_not_compiled(codec: nn.Module) -> None:
    """Raise CodecError where a codec or a part of it is compiled: names the first."""
    for name, module in codec.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise CodecError(COMPILED.format(name.replace("._orig_mod", "") or "the codec"))


def check_finite(model: nn.Module) -> None:
    """Raise CodecError where a weight is NaN or infinite, or a buffer NaN; names the first.

    With such weights CompressAI's coder never ends.
    """
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise CodecError(f"{name} holds values that are not finite: the weights are damaged")
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise CodecError(f"{name} holds values that are not finite: the weights are damaged")


def rate_distortion_loss(lmbda: float, metric: str) -> nn.Module:
    """Return CompressAI's loss: lmbda * 255^2 * MSE + bpp, or lmbda * (1 - MS-SSIM) + bpp."""
    loss: nn.Module = RateDistortionLoss(lmbda=lmbda, metric=metric)
    return loss


def unwrap(model: nn.Module) -> Any:
    """Return the codec inside an attached model, or the model itself. A codec of one's own may keep
    another as its attribute `codec`, of which it is more than the wrapper.
    """
    return model.codec if getattr(type(model), WRAPS, False) else model


def transform_of(module_name: str) -> str:
    """Return the transform that a module belongs to; "other" if its path names none."""
    return next((part for part in module_name.split(".") if part in TRANSFORMS), "other")


def role_of(transforms: Mapping[str, str], name: str) -> str:
    """Return the transform of a module or parameter by name, or by the module that it is part of;
    "other" if there is none.
    """
    while name:
        if name in transforms:
            return transforms[name]
        name = name.rpartition(".")[0]
    return "other"


def sides_of(transform: str) -> tuple[bool, bool]:
    """Return whether a transform runs (when encoding, when decoding).

    A transform that is not known to be one-sided runs on both sides.
    """
    return transform not in DECODER_ONLY, transform not in ENCODER_ONLY


def forward_for_analysis(codec: nn.Module, x: Tensor) -> dict[str, Any]:
    """Run the forward pass that is traced and counted.

    The variable-rate models run their first stage. In the second, mbt2018-vbr evaluates its context
    model pixel by pixel on raw weights. The output of its `scale_to_context`, which enters the
    context model there, is added in the first stage instead.

    Raises:
        CodecError: the codec is compiled, or needs an argument that is not known.
    """
    check_not_compiled(codec)
    out: dict[str, Any]
    if not isinstance(codec, ScaleHyperpriorVbr):
        out = run(codec, x)
        return out
    with _scale_to_context(codec):
        out = codec(x, stage=1)
        return out


def check_output(codec: nn.Module, out: Any) -> None:
    """Raise CodecError unless this is what CompressAI's forward passes return."""
    likelihoods = out.get("likelihoods") if isinstance(out, Mapping) else None
    if (
        not isinstance(likelihoods, Mapping)
        or not all(isinstance(value, Tensor) for value in likelihoods.values())
        or not isinstance(out.get("x_hat"), Tensor)
    ):
        raise CodecError(
            f"the forward pass of {type(codec).__name__} does not return a dictionary with x_hat, a"
            " tensor, and likelihoods, a dictionary of tensors, as those of CompressAI do"
        )


@contextmanager
def _scale_to_context(codec: nn.Module) -> Iterator[None]:
    if not isinstance(codec, JointAutoregressiveHierarchicalPriorsVbr):
        yield
        return
    linear = codec.scale_to_context

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        one = torch.ones(1, 1, dtype=output.dtype, device=output.device)
        added: Tensor = linear(one)
        return output + added.view(1, -1, 1, 1)

    handle = codec.context_prediction.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
