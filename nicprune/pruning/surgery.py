"""Keep-lists in, smaller plain codec out, verified on the spot."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from compressai.latent_codecs import ChannelGroupsLatentCodec
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nicprune.channels.groups import (
    MIN_LATENTS,
    Attribute,
    Group,
    Groups,
    Norms,
    find_groups,
)
from nicprune.codecs.anatomy import forward_for_analysis
from nicprune.codecs.cdf import fast_indexes, update_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.example import example_image
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.layer_kinds import entropy_models, layers_of, widths_of
from nicprune.codecs.layer_kinds.kind import kind_of, nearest_kind
from nicprune.codecs.layer_operations import remove, zero
from nicprune.codecs.provenance import provenance, set_provenance
from nicprune.codecs.replaced_forward import check_not_replaced
from nicprune.common.errors import CodecError, SurgeryError
from nicprune.pruning.attributes import (
    candidates,
    find_attributes,
    likeness,
    set_attributes,
    values_under,
)

TOLERANCE = 1e-10
"""Largest difference between masked and pruned codec in float64, relative to the output's largest
value.
"""

TRIALS = 3
"""Random prunings that a foreign codec has to stand."""


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


def prune(
    codec: nn.Module,
    keep: Mapping[str, Sequence[int]],
    groups: Groups | None = None,
    *,
    verify: bool = True,
) -> nn.Module:
    """Return a smaller plain codec that keeps the given channels; the codec given is left as it
    was.

    Args:
        codec: any `CompressionModel`.
        keep: for each channel group by name, the increasing indices that stay; groups not named
            keep everything.
        groups: what `analyse(codec)` returned, to save finding them again.
        verify: check that the result is the same function as the codec with the removed channels
            masked, and that its bitstream decodes.

    Raises:
        RecipeError: a keep-list does not fit.
        SurgeryError: the result failed its verification.
    """
    check_not_replaced(codec)
    if has_hooks(codec):
        raise SurgeryError(
            "this codec has a method attached; prune it by masked.harden(), or masked.detach() it"
            " first"
        )
    groups = groups if groups is not None else analyse(codec)
    checked = groups.check(keep)
    small = copy_codec(codec)
    modules = layers_of(small)
    # Indices are those of the original, so all that a layer loses along one axis goes at once.
    losses: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, kept in checked.items():
        gone = np.setdiff1d(np.arange(groups[name].width), kept)
        for member in groups[name].members:
            losses[member.module, member.axis] += member.index[gone].ravel().tolist()
    kinds = {name: kind_of(modules[name]) for name, _ in losses}
    try:
        for (name, axis), indices in losses.items():
            remove(modules[name], axis, sorted(set(indices)), kinds[name])
    except Exception as error:
        raise SurgeryError(
            f"channels of {name} ({type(modules[name]).__name__}) cannot be removed: {error}"
        ) from error
    set_attributes(small, values_under(codec, groups, checked))
    follow_widths(small)
    record = provenance(codec).copy()
    set_provenance(small, record)
    if verify:
        record.verified = str(verify_same(codec, small, checked, groups))
    return small


def analyse(codec: nn.Module, norms: Norms = "pinned") -> Groups:
    """Find the channel groups of any codec, and try them: what a foreign codec's own code holds to
    its width is marked unprunable, unless it has the number from an attribute that can follow.

    Tracing sees what happens to channels, not the numbers that code may carry along (`x[:, :32]`,
    `x.view(1, 64, h, w)`). Codecs built of nothing but CompressAI's and torch's own modules are
    known to carry none and are not tried.

    Args:
        norms: "adapt" lets channels go that a norm computes over (LayerNorm, GroupNorm, and the
            like): its statistics are then of the channels that stay.

    Raises:
        CodecError: nothing in the codec can be pruned safely; names the layers that stand in the
            way. Or the codec does not run as it is, before any pruning; says what is missing.
    """
    check_not_replaced(codec)
    groups = find_groups(codec, norms)
    if not has_foreign_code(codec):
        return groups
    check_runs(codec)
    rng = np.random.default_rng(0)
    unsafe: dict[str, str] = {}
    searched = False
    for _ in range(TRIALS):  # random widths: parts that must stay equally wide do not
        keep = {}
        for group in groups.prunable(latents=True):
            least = MIN_LATENTS if group.latent else 1
            if group.width > least:
                keep[group.name] = sorted(
                    rng.choice(
                        group.width, int(rng.integers(least, group.width)), replace=False
                    ).tolist()
                )
        while _reason(codec, groups, left := {n: k for n, k in keep.items() if n not in unsafe}):
            if searched:
                unsafe |= _failing(codec, groups, left)
            else:
                groups, searched = _with_attributes(codec, groups), True
    if not unsafe:
        return groups
    found = _replaced(
        groups,
        lambda g: replace(g, pinned=unsafe[g.name], attributes=()) if g.name in unsafe else g,
    )
    if not found.prunable():
        raise CodecError(
            f"nothing in {type(codec).__name__} can be pruned safely:"
            f" {'; '.join(f'{n}: {r}' for n, r in list(unsafe.items())[:4])}"
        )
    return found


def _replaced(groups: Groups, change: Callable[[Group], Group]) -> Groups:
    return Groups([change(group) for group in groups], groups.products)


def _with_attributes(codec: nn.Module, groups: Groups) -> Groups:
    """Return the groups with attributes to follow, where only then they can shrink. What is found
    for a layer of one module is taken for that of every module of its class.
    """
    rng = np.random.default_rng(1)
    found: dict[object, tuple[Attribute, ...]] = {}
    for group in groups.prunable(latents=True):
        least = MIN_LATENTS if group.latent else 1
        around = candidates(codec, group)
        if not around or group.width <= least:
            continue
        alike = likeness(codec, group, around)
        if alike not in found:
            widths = (least, max(least, group.width - 1))
            keeps = [sorted(rng.choice(group.width, w, replace=False).tolist()) for w in widths]

            def holds(
                chosen: Sequence[Attribute],
                known: Groups = groups,
                name: str = group.name,
                keeps: Any = keeps,
            ) -> bool:
                tried = _attributed(known, name, chosen)
                return not any(_reason(codec, tried, {name: keep}, brief=True) for keep in keeps)

            # By itself it may hold: then it needs none, or fails together with others.
            found[alike] = () if holds(()) else find_attributes(around, holds)
        numbers = [
            a for a in around if (a.name, a.times) in {(f.name, f.times) for f in found[alike]}
        ]
        groups = _attributed(groups, group.name, numbers)
    return groups


def _attributed(groups: Groups, name: str, chosen: Sequence[Attribute]) -> Groups:
    """Return the groups with attributes that one of them has to follow."""
    return _replaced(
        groups, lambda g: replace(g, attributes=tuple(chosen)) if g.name == name else g
    )


def has_foreign_code(codec: nn.Module) -> bool:
    """Return whether a codec runs code that is neither CompressAI's nor nicprune's, nor a layer of
    a known kind, nor a container or activation of torch.
    """
    for module in codec.modules():
        if "forward" in module.__dict__:
            return True
        package = type(module).__module__
        kind = kind_of(module)
        if package.startswith(OWN) or kind is not None and not kind.by_trial:
            continue
        if isinstance(module, CONTAINERS):
            continue
        if package not in PLAIN or any(True for _ in module.parameters()):
            return True
    return False


OWN = ("compressai.", "nicprune.codecs.")
"""Packages whose architectures hold no number of channels in code; tests try each of them."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

PLAIN = {
    f"torch.nn.modules.{name}"
    for name in (
        "activation",
        "channelshuffle",
        "dropout",
        "linear",
        "padding",
        "pixelshuffle",
        "pooling",
        "upsampling",
    )
}
"""Modules of torch that hold no number of channels, unless they have parameters."""


def check_runs(codec: Any) -> None:
    """Raise CodecError unless the codec does, as it is, what a pruned one will be tried for: run in
    float64, return what CompressAI's codecs return, and code, if it has `compress`.
    """
    name = type(codec).__name__
    try:
        found = difference(codec, codec)
    except Exception as error:  # a foreign codec's own code may raise anything
        raise CodecError(
            f"{name} does not run in float64 as it is, before any pruning: {_first_line(error)}"
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


def _first_line(error: Exception) -> str:
    told = str(error).splitlines()
    return f"{type(error).__name__}: {told[0]}" if told else type(error).__name__


def _failing(codec: nn.Module, groups: Groups, keep: Mapping[str, list[int]]) -> dict[str, str]:
    """Return the groups that cannot be pruned, and why, by halving; those that fail only together
    all count.
    """
    reason = _reason(codec, groups, keep)
    if not reason:
        return {}
    names = list(keep)
    half = len(names) // 2
    found: dict[str, str] = {}
    if half:
        for part in (names[:half], names[half:]):
            found |= _failing(codec, groups, {name: keep[name] for name in part})
    return found or dict.fromkeys(names, reason)


def _reason(
    codec: nn.Module, groups: Groups, keep: Mapping[str, list[int]], *, brief: bool = False
) -> str:
    """Return why keep-lists cannot be had, nothing if they can.

    Args:
        brief: compare outputs alone, without a bitstream.
    """
    if not keep:
        return ""
    try:
        if not brief:
            prune(codec, keep, groups)
            return ""
        checked = groups.check(keep)
        small = prune(codec, keep, groups, verify=False)
        return "" if _gap(codec, small, checked, groups) <= TOLERANCE else "another function"
    except SurgeryError as error:
        return f"the codec's code depends on this width ({str(error).split(';')[0]})"


def follow_widths(codec: Any) -> None:
    """Set the Python attributes that CompressAI's codecs and torch's layers keep of their widths to
    what their parameters and inputs have now.
    """
    for module in codec.modules():
        if isinstance(module, ChannelGroupsLatentCodec):
            widths = [
                widths_of(module.latent_codec[f"y{k}"].context_prediction)[1]
                for k in range(len(module.groups))
            ]
            module.groups = widths
            module.groups_acc = [0, *np.cumsum(widths).tolist()]
            if isinstance(getattr(codec, "groups", None), list):
                codec.groups = list(widths)
    if isinstance(getattr(codec, "M", None), int):
        width = _latent_width(codec)
        if width is not None:
            codec.M = width
    _follow_inputs(codec)


def _follow_inputs(codec: nn.Module) -> None:
    """Let layers whose parameters do not show their width take it from what they are given."""
    layers = [(m, kind) for m in codec.modules() if (kind := kind_of(m)) and kind.reads_width(m)]
    if not layers:
        return
    handles = []
    for layer, kind in layers:

        def follow(layer: Any, args: Any, kind: Any = kind) -> None:
            kind.follow_input(layer, args[0])

        handles.append(layer.register_forward_pre_hook(follow))
    training = {module: module.training for module in codec.modules()}
    try:
        with torch.no_grad():
            forward_for_analysis(codec.eval(), example_image(codec))
    except Exception as error:  # widths do not fit: whoever verifies the codec says which
        logging.getLogger(__name__).debug("widths cannot be followed: %s", error)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode


def _latent_width(codec: nn.Module) -> int | None:
    """Return the channels of y: what the synthesis reads."""
    g_s = getattr(codec, "g_s", None)
    if g_s is None:
        return None
    return next(
        (
            widths_of(m)[1]
            for m in g_s.modules()
            if (kind := nearest_kind(m)) is not None and kind.convolution
        ),
        None,
    )


def masked_copy(codec: nn.Module, keep: Mapping[str, np.ndarray], groups: Groups) -> nn.Module:
    """Return a copy of full size whose removed channels are zero at every producer."""
    masked = copy_codec(codec)
    modules = layers_of(masked)
    for name, kept in keep.items():
        gone = np.setdiff1d(np.arange(groups[name].width), kept)
        for member in groups[name].members:
            zero(modules[member.module], member.axis, member.index[gone].ravel().tolist())
    return masked


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
    traces: list[list[Tensor]] = []
    with torch.no_grad(), _SmoothRounding(), _default_dtype(torch.float64):
        for codec in (first, second):
            double = copy_codec(codec).cpu().double().eval()
            trace: list[Tensor] = []
            for model in entropy_models(double):
                model.register_forward_hook(
                    lambda m, args, out, trace=trace: trace.extend(_live_channels(m, args, out))
                )
            out = forward_for_analysis(double, image)
            if not isinstance(out, dict) or not {"x_hat", "likelihoods"} <= out.keys():
                raise SurgeryError(
                    f"the forward pass of {type(codec).__name__} does not return a dictionary with"
                    " x_hat and likelihoods, as those of CompressAI do"
                )
            trace.append(out["x_hat"])
            traces.append(trace)
    if [t.shape for t in traces[0]] != [t.shape for t in traces[1]]:
        return float("inf")
    found = [
        float((a - b).abs().max()) / max(float(a.abs().max()), 1e-12)
        for a, b in zip(*traces, strict=True)
        if a.numel()
    ]
    return max(found) if not any(f != f for f in found) else float("nan")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let code that makes tensors make them of this type inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
    found = _gap(codec, small, keep, groups)
    if not found <= TOLERANCE:
        raise SurgeryError(
            f"the pruned {type(codec).__name__} is not the masked one: they differ by {found:.1e}"
            f" (at most {TOLERANCE:.0e} is allowed); the codec's layers are not what their channels"
            " say. Nothing was changed"
        )
    return Verification(found, round_trip(small))


def _gap(
    codec: nn.Module, small: nn.Module, keep: Mapping[str, np.ndarray], groups: Groups
) -> float:
    """Return the largest difference of a pruned codec from the masked one.

    Raises:
        SurgeryError: it does not run.
    """
    try:
        return difference(masked_copy(codec, keep, groups), small)
    except Exception as error:  # a foreign codec's own code may raise anything
        raise SurgeryError(
            f"the pruned {type(codec).__name__} does not run: {_first_line(error)}"
        ) from error


def round_trip(codec: Any) -> int | None:
    """Write and read a bitstream; return its length in bytes, None if the codec has no `compress`
    and `decompress`. A copy is used: CDF tables of the codec stay as they are.

    Raises:
        SurgeryError: it does not decode, to something finite, twice the same.
    """
    if not (hasattr(codec, "compress") and hasattr(codec, "decompress")):
        return None
    image = example_image(codec, seed=1).cpu().float()
    codec = copy_codec(codec).cpu().float().eval()
    try:
        with torch.no_grad(), fast_indexes():
            update_tables(codec)
            sent = codec.compress(image)
            first = codec.decompress(sent["strings"], sent["shape"])["x_hat"]
            second = codec.decompress(sent["strings"], sent["shape"])["x_hat"]
    except Exception as error:  # a foreign codec's own code may raise anything
        raise SurgeryError(
            f"the bitstream of {type(codec).__name__} does not decode: {type(error).__name__}:"
            f" {error}"
        ) from error
    if (
        first.shape != image.shape
        or not bool(torch.isfinite(first).all())
        or not torch.equal(first, second)
    ):
        raise SurgeryError(
            f"the bitstream of {type(codec).__name__} decodes to something else each time"
        )
    return sum(len(s) for s in _byte_strings(sent["strings"]))


def _byte_strings(value: Any) -> list[bytes]:
    return (
        [value] if isinstance(value, bytes) else [s for item in value for s in _byte_strings(item)]
    )
