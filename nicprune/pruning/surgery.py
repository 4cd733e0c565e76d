"""Keep-lists in, smaller plain codec out, verified on the spot."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from compressai.latent_codecs import ChannelGroupsLatentCodec
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nicprune.channels.find_groups import find_groups
from nicprune.channels.groups import MIN_LATENTS, Attribute, Group, Groups, Norms
from nicprune.channels.known import recall, remember, remember_pruned
from nicprune.codecs.anatomy import forward_for_analysis
from nicprune.codecs.calling import compress, decompress
from nicprune.codecs.cdf import fast_indexes, update_tables
from nicprune.codecs.copying import copy_codec, double_copy, sharing_copy
from nicprune.codecs.example import example_image, module_names
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.layer_kinds.entropy import entropy_models
from nicprune.codecs.layer_kinds.kind import channel_kind, kind_of, nearest_kind, widths_of
from nicprune.codecs.layer_kinds.parameters import holder, layers_of
from nicprune.codecs.layer_operations import remove
from nicprune.codecs.modes import modes_restored
from nicprune.codecs.provenance import provenance, set_provenance
from nicprune.codecs.replaced_forward import check_not_replaced
from nicprune.codecs.trusted import is_trusted
from nicprune.common.errors import CodecError, SurgeryError
from nicprune.pruning.attributes import (
    candidates,
    find_attributes,
    likeness,
    set_attributes,
    values_under,
)
from nicprune.pruning.masks import mask_channels
from nicprune.pruning.trials import Failure, find_failing

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
    _remove_channels(small, checked, groups)
    record = provenance(codec).copy()
    set_provenance(small, record)
    if verify:
        record.verified = str(verify_same(codec, small, checked, groups))
    remember_pruned(codec, small, groups, checked)
    return small


def _remove_channels(codec: nn.Module, keep: Mapping[str, np.ndarray], groups: Groups) -> None:
    """Remove all channels that are not kept, in place."""
    values = values_under(codec, groups, keep)
    modules = layers_of(codec)
    # Indices are those of the original, so all that a layer loses along one axis goes at once.
    losses: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, kept in keep.items():
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
    set_attributes(codec, values)
    follow_widths(codec)


def analyse(codec: nn.Module, norms: Norms = "pinned") -> Groups:
    """Find the channel groups of any codec, and try them: what a foreign codec's own code holds to
    its width is marked unprunable, unless it has the number from an attribute that can follow.

    Tracing sees what happens to channels, not the numbers that code may carry along (`x[:, :32]`,
    `x.view(1, 64, h, w)`). Codecs built of nothing but CompressAI's and torch's own modules are
    known to carry none and are not tried; those of a fork that is called compressai too are. What
    was found is kept as long as the codec is what it is, but for its weights.

    Args:
        norms: "adapt" lets channels go that a norm computes over (LayerNorm, GroupNorm, and the
            like): its statistics are then of the channels that stay.

    Raises:
        CodecError: nothing in the codec can be pruned safely; names the layers that stand in the
            way. Or the codec does not run as it is, before any pruning; says what is missing.
    """
    check_not_replaced(codec)
    if (known := recall(codec, norms)) is not None:
        return known
    groups = find_groups(codec, norms)
    if has_foreign_code(codec):
        groups = _tried(codec, groups)
    remember(codec, groups)
    return groups


def _tried(codec: nn.Module, groups: Groups) -> Groups:
    """Return the groups, with attributes that they have to follow, and those that fail in trials
    marked unprunable.
    """
    trials = _Trials(codec, groups)
    check_runs(codec, trials.double)
    rng = np.random.default_rng(0)
    unsafe: dict[str, str] = {}
    searched: set[str] = set()
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
        for codes in (False, True):  # bitstreams take longest
            while failed := find_failing(
                [name for name in keep if name not in unsafe],
                lambda names, keep=keep, codes=codes: trials.failure(  # type: ignore[misc]
                    {name: keep[name] for name in names}, codes
                ),
            ):
                untried = failed.keys() - searched
                if not untried:
                    unsafe |= failed
                    continue
                trials.groups = groups = _with_attributes(codec, groups, untried, trials)
                searched |= untried
                unsafe |= {name: failed[name] for name in untried if not groups[name].attributes}
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
    changed = [change(group) for group in groups]
    return Groups(changed, groups.products, groups.roles, groups.norms)


def _with_attributes(
    codec: nn.Module, groups: Groups, names: Collection[str], trials: _Trials
) -> Groups:
    """Return the groups, those named with attributes to follow where only then they can shrink.
    What is found for a layer of one module is taken for that of every module of its class.
    """
    rng = np.random.default_rng(1)
    found: dict[object, tuple[Attribute, ...]] = {}
    for group in groups.prunable(latents=True):
        least = MIN_LATENTS if group.latent else 1
        around = candidates(codec, group)
        if group.name not in names or not around or group.width <= least:
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
                return all(trials.holds(tried, {name: keep}) for keep in keeps)

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
        cls: Any = type(module)
        plain = any(
            isinstance(module, container) and cls.forward is container.forward
            for container in CONTAINERS
        )
        if plain or is_trusted(cls):
            continue
        package, kind = cls.__module__, kind_of(module)
        known = kind is not None and not kind.by_trial
        if known and package.partition(".")[0] != "compressai":
            continue
        if package not in PLAIN or any(True for _ in module.parameters()):
            return True
    return False


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


def check_runs(codec: Any, double: nn.Module) -> None:
    """Raise CodecError unless the codec does, as it is, what a pruned one will be tried for: run in
    float64, return what CompressAI's codecs return, and code, if it has `compress`.

    Args:
        double: a copy of it in float64.
    """
    name = type(codec).__name__
    image = example_image(codec, seed=1).cpu().double()
    try:
        found = _apart([_trace(sharing_copy(double), image) for _ in range(2)])
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


class _Trials:
    """Prunings of a foreign codec, as `prune` does and verifies them, in float64 throughout.
    Weights are converted once, and copied only where channels go.
    """

    def __init__(self, codec: nn.Module, groups: Groups):
        self.double, self.groups = double_copy(codec), groups
        self.name = type(codec).__name__
        self.image = example_image(codec, seed=1).cpu().double()

    def failure(self, keep: Mapping[str, list[int]], codes: bool) -> Failure | None:
        """Prune to these keep-lists; return what fails, None if nothing does.

        Args:
            codes: whether a bitstream is written and read, or the forward pass compared.
        """
        checked = self.groups.check(keep)
        small = sharing_copy(self.double)
        places: list[str] = []
        try:
            _remove_channels(small, checked, self.groups)
            if codes:
                round_trip(small)
                return None
            with module_names(small, places):
                mine = _trace(small, self.image)
        except Exception as error:  # a foreign codec's own code may raise anything
            told = (
                str(error).split(";")[0]
                if isinstance(error, SurgeryError)
                else f"the pruned {self.name} does not run: {_first_line(error)}"
            )
            return Failure(_depends(told), self._within(places[-1]) if places else ())
        found = _apart([_trace(self._masked(checked), self.image), mine])
        if not found <= TOLERANCE:
            told = f"the pruned {self.name} is not the masked one: they differ by {found:.1e}"
            return Failure(_depends(told))
        return None

    def holds(self, groups: Groups, keep: Mapping[str, list[int]]) -> bool:
        """Return whether keep-lists of such groups can be had, by the forward pass alone."""
        before, self.groups = self.groups, groups
        try:
            return self.failure(keep, codes=False) is None
        finally:
            self.groups = before

    def _within(self, place: str) -> set[str]:
        """Return the groups that have a layer in a module, or the module itself."""
        return {
            group.name
            for group in self.groups
            for member in group.members
            if f"{member.module}.".startswith(f"{place}.")
        }

    def _masked(self, keep: Mapping[str, np.ndarray]) -> nn.Module:
        modules = layers_of(self.double)
        written = [
            parameter
            for name in keep
            for member in self.groups[name].members
            if channel_kind(modules[member.module]).masked(member.axis)
            for parameter in holder(modules[member.module]).parameters(recurse=False)
        ]
        masked = sharing_copy(self.double, apart=written)
        mask_channels(masked, keep, self.groups)
        return masked


def _depends(told: str) -> str:
    return f"the codec's code depends on this width ({told})"


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
    try:
        with torch.no_grad(), modes_restored(codec):
            forward_for_analysis(codec.eval(), example_image(codec))
    except Exception as error:  # widths do not fit: whoever verifies the codec says which
        logging.getLogger(__name__).debug("widths cannot be followed: %s", error)
    finally:
        for handle in handles:
            handle.remove()


def _latent_width(codec: nn.Module) -> int | None:
    """Return the channels of y: what the synthesis reads."""
    g_s = getattr(codec, "g_s", None)
    if not isinstance(g_s, nn.Module):  # it may be a method
        return None
    return next(
        (
            widths_of(m)[1]
            for m in g_s.modules()
            if (kind := nearest_kind(m)) is not None and kind.convolution
        ),
        None,
    )


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
    return _apart([_trace(double_copy(codec), image) for codec in (first, second)])


def _trace(double: nn.Module, image: Tensor) -> list[Tensor]:
    """Return what `difference` compares of a codec in float64; it is run."""
    trace: list[Tensor] = []
    for model in entropy_models(double):
        model.register_forward_hook(lambda m, args, out: trace.extend(_live_channels(m, args, out)))
    with torch.no_grad(), _SmoothRounding(), _default_dtype(torch.float64):
        out = forward_for_analysis(double, image)
    if not isinstance(out, dict) or not {"x_hat", "likelihoods"} <= out.keys():
        raise SurgeryError(
            f"the forward pass of {type(double).__name__} does not return a dictionary with"
            " x_hat and likelihoods, as those of CompressAI do"
        )
    return [*trace, out["x_hat"]]


def _apart(traces: Sequence[list[Tensor]]) -> float:
    """Return the largest |difference| of two traces."""
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
    try:
        image = example_image(codec, seed=1).cpu().double()
        masked = double_copy(codec)
        mask_channels(masked, keep, groups)
        found = _apart([_trace(masked, image), _trace(double_copy(small), image)])
    except Exception as error:  # a foreign codec's own code may raise anything
        raise SurgeryError(
            f"the pruned {type(codec).__name__} does not run: {_first_line(error)}"
        ) from error
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
        image = example_image(codec, seed=1).cpu().double()
        masked = double_copy(codec)
        mask_channels(masked, keep, groups)
        return _apart([_trace(masked, image), _trace(double_copy(small), image)])
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
            sent = compress(codec, image)
            first, second = (
                decompress(codec, sent["strings"], sent["shape"], image)["x_hat"] for _ in range(2)
            )
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
