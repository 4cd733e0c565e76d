"""Keep-lists in, smaller plain codec out, verified on the spot."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from compressai.latent_codecs import ChannelGroupsLatentCodec
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nicprune.channels import Groups, find_groups
from nicprune.codecs import FACTOR, forward_for_analysis, is_bottleneck, provenance, set_provenance
from nicprune.errors import SurgeryError
from nicprune.layers import remove, zero

TOLERANCE = 1e-10
"""Largest difference between masked and pruned codec in float64, relative to the output's largest value."""


@dataclass(frozen=True)
class Verification:
    """What was checked: the largest |masked - pruned| in float64, and how many bytes went through the bitstream."""

    max_difference: float
    stream_bytes: int

    def __str__(self) -> str:
        return f"masked = pruned to {self.max_difference:.1e} (float64), {self.stream_bytes} bytes written and read back"


def prune(codec: nn.Module, keep: Mapping[str, Sequence[int]], groups: Groups | None = None, *, verify: bool = True) -> nn.Module:
    """Return a smaller plain codec that keeps the given channels; the codec given is left as it was.

    Args:
        codec: any `CompressionModel`.
        keep: for each channel group by name, the increasing indices that stay; groups not named keep everything.
        groups: what `find_groups(codec)` returned, to save finding them again.
        verify: check that the result is the same function as the codec with the removed channels masked, and that its
            bitstream decodes.

    Raises:
        RecipeError: a keep-list does not fit.
        SurgeryError: the result failed its verification.
    """
    groups = groups if groups is not None else find_groups(codec)
    checked = groups.check(keep)
    small = copy.deepcopy(codec)
    modules = dict(small.named_modules())
    # Indices are those of the original, so all that a layer loses along one axis goes at once.
    losses: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, kept in checked.items():
        gone = np.setdiff1d(np.arange(groups[name].width), kept)
        for member in groups[name].members:
            losses[member.module, member.axis] += member.index[gone].ravel().tolist()
    for (name, axis), indices in losses.items():
        remove(modules[name], axis, sorted(set(indices)))
    follow_widths(small)
    set_provenance(small, provenance(codec).copy())
    if verify:
        verify_same(codec, small, checked, groups)
    return small


def follow_widths(codec: nn.Module) -> None:
    """Set the Python attributes that CompressAI's codecs keep of their widths to what their layers have now."""
    for module in codec.modules():
        if isinstance(module, ChannelGroupsLatentCodec):
            widths = [module.latent_codec[f"y{k}"].context_prediction.in_channels for k in range(len(module.groups))]
            module.groups = widths
            module.groups_acc = [0, *np.cumsum(widths).tolist()]
            if isinstance(getattr(codec, "groups", None), list):
                codec.groups = list(widths)
    if isinstance(getattr(codec, "M", None), int):
        width = _latent_width(codec)
        if width is not None:
            codec.M = width


def _latent_width(codec: nn.Module) -> int | None:
    """Channels of y: what the synthesis reads."""
    g_s = getattr(codec, "g_s", None)
    if g_s is None:
        return None
    return next((m.in_channels for m in g_s.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))), None)


def masked_copy(codec: nn.Module, keep: Mapping[str, np.ndarray], groups: Groups) -> nn.Module:
    """Return a copy of full size whose removed channels are zero at every producer."""
    masked = copy.deepcopy(codec)
    modules = dict(masked.named_modules())
    for name, kept in keep.items():
        gone = np.setdiff1d(np.arange(groups[name].width), kept)
        for member in groups[name].members:
            if member.axis == "out" or is_bottleneck(modules[member.module]):
                zero(modules[member.module], member.axis, member.index[gone].ravel().tolist())
    return masked


class _NoRounding(TorchFunctionMode):
    """Lets values through unrounded: so a small difference cannot hide below a rounding step, nor grow by tipping one,
    and the synthesis of an untrained codec, whose latents all round to zero, is exercised too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "round":
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def difference(first: nn.Module, second: nn.Module, size: int = FACTOR) -> float:
    """Largest |difference| of two codecs' outputs in float64 without rounding, relative to the largest output."""
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs: list[Tensor] = []
    with torch.no_grad(), _NoRounding():
        for codec in (first, second):
            double = copy.deepcopy(codec).cpu().double().eval()
            outputs.append(forward_for_analysis(double, image)["x_hat"])
    scale = max(float(outputs[0].abs().max()), 1e-12)
    return float((outputs[0] - outputs[1]).abs().max()) / scale


def verify_same(codec: nn.Module, small: nn.Module, keep: Mapping[str, np.ndarray], groups: Groups) -> Verification:
    """Check that `small` equals `codec` with the removed channels masked, and that its bitstream decodes.

    Raises:
        SurgeryError: it does not, or it does not run.
    """
    try:
        found = difference(masked_copy(codec, keep, groups), small)
    except (RuntimeError, ValueError, IndexError) as error:
        raise SurgeryError(f"the pruned {type(codec).__name__} does not run: {str(error).splitlines()[0]}") from error
    if not found <= TOLERANCE:
        raise SurgeryError(
            f"the pruned {type(codec).__name__} is not the masked one: they differ by {found:.1e} (at most {TOLERANCE:.0e} "
            "is allowed); the codec's layers are not what their channels say. Nothing was changed"
        )
    return Verification(found, round_trip(small))


def round_trip(codec: nn.Module, size: int = FACTOR) -> int:
    """Write and read a bitstream; return its length in bytes. A copy is used: CDF tables of the codec stay as they are.

    Raises:
        SurgeryError: it does not decode, to something finite, twice the same.
    """
    codec = copy.deepcopy(codec).cpu().float().eval()
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad():
            codec.update(force=True)
            sent = codec.compress(image)
            first = codec.decompress(sent["strings"], sent["shape"])["x_hat"]
            second = codec.decompress(sent["strings"], sent["shape"])["x_hat"]
    except Exception as error:
        raise SurgeryError(f"the bitstream of {type(codec).__name__} does not decode: {type(error).__name__}: {error}") from error
    if first.shape != image.shape or not bool(torch.isfinite(first).all()) or not torch.equal(first, second):
        raise SurgeryError(f"the bitstream of {type(codec).__name__} decodes to something else each time")
    return sum(len(s) for s in _byte_strings(sent["strings"]))


def _byte_strings(value: Any) -> list[bytes]:
    return [value] if isinstance(value, bytes) else [s for item in value for s in _byte_strings(item)]
