"""Checks of pruned codecs: the same function as the masked one in float64, and a bitstream that
decodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import check_output, forward_for_analysis
from nicprune.codecs.calling import compress, decompress
from nicprune.codecs.cdf import update_tables
from nicprune.codecs.copying import copy_codec, double_copy, sharing_copy
from nicprune.codecs.example import example_image
from nicprune.codecs.fast_coding import fast_indexes
from nicprune.codecs.float64_types import float64_throughout, to_precision
from nicprune.codecs.layer_kinds.entropy import entropy_models
from nicprune.common.errors import CodecError, SurgeryError, first_line
from nicprune.pruning.masks import mask_channels

TOLERANCE = 1e-10
"""Largest difference between masked and pruned codec in float64, relative to the output's largest
value.
"""


@dataclass(frozen=True)
class Verification:
    """The checks of a pruned codec: the largest |masked - pruned| in float64, and how many bytes
    went through the bitstream, None for a codec that writes none.
    """

    max_difference: float
    stream_bytes: int | None

    def __str__(self) -> str:
        coded = (
            f"{self.stream_bytes} bytes written and read back"
            if self.stream_bytes is not None
            else "no bitstream: the codec has no compress"
        )
        return f"masked = pruned to {self.max_difference:.1e} (float64), {coded}"


class _SmoothRounding(TorchFunctionMode):
    """Replaces rounding by something smooth that is zero at zero: so a small difference cannot hide
    below a rounding step, nor grow by tipping one; means and medians still matter; and an untrained
    codec's latents do not all become zero.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "round":
            return args[0] + 0.25 * torch.sin(args[0])
        return func(*args, **(kwargs or {}))


def difference(first: nn.Module, second: nn.Module) -> float:
    """Return the largest |difference| of two codecs in float64, rounding made smooth, each tensor
    relative to its largest value.

    Compared are the image and all that entropy models are given and return. Channels that are zero
    throughout are left out there: the bitstream of the one codec may carry removed latents, that of
    the other does not.
    """
    image = example_image(first, seed=1).cpu().double()
    return apart([trace(double_copy(codec), image) for codec in (first, second)])


def trace(double: nn.Module, image: Tensor) -> list[Tensor]:
    """Return what `difference` compares of a codec in float64; it is run."""
    trace: list[Tensor] = []
    for model in entropy_models(double):
        model.register_forward_hook(lambda m, args, out: trace.extend(_live_channels(m, args, out)))
    with torch.no_grad(), float64_throughout(), _SmoothRounding():
        out = forward_for_analysis(double, image)
    check_output(double, out)
    return [*trace, out["x_hat"]]


def apart(traces: Sequence[list[Tensor]]) -> float:
    """Return the largest |difference| of two traces."""
    if [t.shape for t in traces[0]] != [t.shape for t in traces[1]]:
        return float("inf")
    found = [
        float((a - b).abs().max()) / max(float(a.abs().max()), 1e-12)
        for a, b in zip(*traces, strict=True)
        if a.numel()
    ]
    return max(found) if not any(f != f for f in found) else float("nan")


def difference_in_words(found: float) -> str:
    """Return in words what `apart` found."""
    if found == float("inf"):
        return (
            "their entropy models are given different channels. Of a latent that is zero, the scale"
            " must be zero too, and softplus or exp never is"
        )
    return f"they differ by {found:.1e}"


def _live_channels(model: nn.Module, args: Sequence[Any], out: Any) -> list[Tensor]:
    given = [a for a in args if isinstance(a, Tensor) and a.dim() == 4]
    if not given or any(a.shape[1] != given[0].shape[1] for a in given):
        return given
    live = torch.stack([a.abs().amax((0, 2, 3)) > 0 for a in given]).any(0)
    returned = [
        t
        for t in (out if isinstance(out, tuple) else (out,))
        if isinstance(t, Tensor) and t.dim() == 4 and t.shape[1] == len(live)
    ]
    return [t[:, live] for t in (*given, *returned)]


def verify_same(
    codec: nn.Module, small: nn.Module, keep: Mapping[str, np.ndarray], groups: Groups
) -> Verification:
    """Check that `small` equals `codec` with the removed channels masked, and that its bitstream
    decodes.

    Raises:
        SurgeryError: it does not, or it does not run.
    """
    try:
        image = example_image(codec, seed=1).cpu().double()
        masked = double_copy(codec)
        mask_channels(masked, keep, groups)
        found = apart([trace(masked, image), trace(double_copy(small), image)])
    except Exception as error:  # a foreign codec's own code may raise anything
        raise SurgeryError(
            f"the pruned {type(codec).__name__} does not run: {first_line(error)}"
        ) from error
    if not found <= TOLERANCE:
        raise SurgeryError(
            f"the pruned {type(codec).__name__} is not the masked one: {difference_in_words(found)}"
            f" (at most {TOLERANCE:.0e} is allowed); the codec's layers are not what their channels"
            " say. Nothing was changed"
        )
    return Verification(found, round_trip(small))


def round_trip(codec: Any) -> int | None:
    """Write and read a bitstream; return its length in bytes, None if the codec has no `compress`
    and `decompress`. A copy is used: CDF tables of the codec stay as they are.

    Raises:
        SurgeryError: it does not decode, to something finite, twice the same.
    """
    if not (hasattr(codec, "compress") and hasattr(codec, "decompress")):
        return None
    image = example_image(codec, seed=1).cpu().float()
    codec = to_precision(torch.float32, copy_codec(codec).cpu()).eval()
    try:
        with torch.no_grad(), fast_indexes():
            update_tables(codec)
            sent = compress(codec, image)
            first, second = (
                decompress(codec, sent["strings"], sent["shape"], image)["x_hat"] for _ in range(2)
            )
    except Exception as error:  # a foreign codec's own code may raise anything
        raise SurgeryError(
            f"the bitstream of {type(codec).__name__} does not decode: {first_line(error)}"
        ) from error
    if first.shape != image.shape:
        problem = f"shape {tuple(first.shape)}, not {tuple(image.shape)}"
    elif not bool(torch.isfinite(first).all()):
        problem = "values that are not finite"
    elif not torch.equal(first, second):
        problem = "something else each time"
    else:
        return sum(len(s) for s in _byte_strings(sent["strings"]))
    raise SurgeryError(f"the bitstream of {type(codec).__name__} decodes to {problem}")


def _byte_strings(value: Any) -> list[bytes]:
    return (
        [value] if isinstance(value, bytes) else [s for item in value for s in _byte_strings(item)]
    )


def check_runs(codec: Any, double: nn.Module) -> None:
    """Raise CodecError unless the codec does, as it is, what a pruned one will be tried for: run in
    float64, return what CompressAI's codecs return, and code, if it has `compress`.

    Args:
        double: a copy of it in float64.
    """
    name = type(codec).__name__
    image = example_image(codec, seed=1).cpu().double()
    try:
        found = apart([trace(sharing_copy(double), image) for _ in range(2)])
    except CodecError:
        raise
    except Exception as error:  # a foreign codec's own code may raise anything
        raise CodecError(
            f"{name} does not run in float64 as it is, before any pruning: {first_line(error)}"
        ) from error
    if not np.isfinite(found):
        raise CodecError(
            f"{name} returns values that are not finite, before any pruning, or nothing that can be"
            " compared"
        )
    if found > TOLERANCE:
        raise CodecError(
            f"{name} returns something else each time, before any pruning: its forward pass in"
            " evaluation mode is random, or changes the codec"
        )
    try:
        round_trip(codec)
    except SurgeryError as error:
        raise CodecError(f"before any pruning, {error}") from error
