"""Keep-lists in, smaller plain codec out, verified on the spot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from nicprune.channels.find_groups import find_groups
from nicprune.channels.groups import Attribute, Group, Groups, Norms
from nicprune.channels.known import recall, remember, remember_pruned
from nicprune.codecs.anatomy import check_codec
from nicprune.codecs.calling import run
from nicprune.codecs.copying import copy_codec, double_copy, sharing_copy
from nicprune.codecs.example import example_image, module_names
from nicprune.codecs.float64_types import float64_throughout
from nicprune.codecs.hooks import has_hooks
from nicprune.codecs.layer_kinds.entropy import entropy_models
from nicprune.codecs.layer_kinds.kind import channel_kind, kind_of
from nicprune.codecs.layer_kinds.parameters import holder, layers_of
from nicprune.codecs.provenance import provenance, set_provenance
from nicprune.codecs.replaced_forward import check_not_replaced
from nicprune.codecs.trusted import is_trusted
from nicprune.common.errors import CodecError, SurgeryError, first_line
from nicprune.pruning.attributes import candidates, find_attributes, likeness
from nicprune.pruning.masks import mask_channels
from nicprune.pruning.removal import remove_channels
from nicprune.pruning.trials import Failure, find_failing
from nicprune.pruning.uncalled import entries_in_place, held_by, in_words
from nicprune.pruning.verification import (
    TOLERANCE,
    apart,
    check_runs,
    difference_in_words,
    round_trip,
    trace,
    verify_same,
)

TRIALS = 3
"""Random prunings that a foreign codec has to stand."""

LARGE = 3, 4
"""Height and width of the larger image of a trial, as multiples of that which is traced: 192 x 256
pixels. Code may take another path by size."""

STAGES = ("forward", "large", "training", "stream")
"""Stages of the trial of a pruned codec, bitstreams last, as they take longest: its forward pass is
compared with the masked codec's; the same on a larger image; it runs in training mode, where code
may use layers that coding does not; a bitstream is written and read. The second and third find code
that takes another path, whatever the widths: one random pruning goes through them."""


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
    check_codec(codec)
    check_not_replaced(codec)
    if has_hooks(codec):
        raise SurgeryError(
            "this codec has a method attached; prune it by masked.harden(), or masked.detach() it"
            " first"
        )
    groups = groups if groups is not None else analyse(codec)
    checked = groups.check(keep)
    small = copy_codec(codec)
    remove_channels(small, checked, groups)
    record = provenance(codec).copy()
    set_provenance(small, record)
    if verify:
        record.verified = str(verify_same(codec, small, checked, groups))
        if checked and groups.uncalled:
            record.verified += f"; never called: {in_words(groups.uncalled)}"
            warnings.warn(
                f"no run of {type(codec).__name__} called {in_words(groups.uncalled)}: which"
                " channels reach them is unknown. If nothing calls them, they do no harm; where the"
                " codec does, it may not run with the channels that were removed. List the groups"
                " that may go by only:, or have example_arguments reach these layers (see"
                " docs/howto/own_codec.md)",
                stacklevel=2,
            )
    remember_pruned(codec, small, groups, checked)
    return small


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
    check_codec(codec)
    check_not_replaced(codec)
    if (known := recall(codec, find_groups, norms)) is not None:
        return known
    groups = find_groups(codec, norms)
    if has_foreign_code(codec):
        with torch.random.fork_rng(devices=[]):
            groups = _tried(codec, groups)
    remember(codec, groups)
    return groups


def _tried(codec: nn.Module, groups: Groups) -> Groups:
    """Return the groups, with attributes that they have to follow, and those that fail in trials
    marked unprunable.
    """
    trials = _Trials(codec, groups)
    check_runs(codec, trials.double)
    _draw_zeros(trials.double)
    rng = np.random.default_rng(0)
    unsafe: dict[str, str] = {}
    searched: set[str] = set()
    for number in range(TRIALS):  # random widths: parts that must stay equally wide do not
        keep = {}
        for group in groups.prunable(latents=True):
            least = group.least
            if group.width > least:
                keep[group.name] = sorted(
                    rng.choice(
                        group.width, int(rng.integers(least, group.width)), replace=False
                    ).tolist()
                )
        for stage in STAGES if number == 0 else ("forward", "stream"):
            if not trials.stands(stage):
                continue
            while failed := find_failing(
                [name for name in keep if name not in unsafe],
                lambda names, keep=keep, stage=stage: trials.failure(  # type: ignore[misc]
                    {name: keep[name] for name in names}, stage
                ),
            ):
                untried = failed.keys() - searched
                if not untried:
                    unsafe |= failed
                    continue
                trials.groups = groups = _with_attributes(codec, groups, untried, trials)
                searched |= untried
                unsafe |= {name: failed[name] for name in untried if not groups[name].attributes}
    uncalled = [name for name in groups.uncalled if name not in trials.called]
    entries = entries_in_place(codec, uncalled)
    unsafe |= held_by(groups, entries)
    groups = Groups(
        groups,
        groups.products,
        groups.roles,
        groups.norms,
        [name for name in uncalled if name not in entries],
    )
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


@torch.no_grad()
def _draw_zeros(codec: nn.Module) -> None:
    """Draw parameters anew that are zero throughout, as those of gates that only training opens:
    what is multiplied by them would not show. Frozen ones too, which may yet be trained. Densities
    of latents stay as they are.
    """
    generator = torch.Generator().manual_seed(0)
    densities = {id(p) for model in entropy_models(codec) for p in model.parameters()}
    for parameter in codec.parameters():
        if id(parameter) not in densities and not parameter.any():
            drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.1 + 0.2 * drawn)


def _replaced(groups: Groups, change: Callable[[Group], Group]) -> Groups:
    changed = [change(group) for group in groups]
    return Groups(changed, groups.products, groups.roles, groups.norms, groups.uncalled)


def _with_attributes(
    codec: nn.Module, groups: Groups, names: Collection[str], trials: _Trials
) -> Groups:
    """Return the groups, those named with attributes to follow where only then they can shrink.
    What is found for a layer of one module is taken for that of every module of its class.
    """
    rng = np.random.default_rng(1)
    found: dict[object, tuple[Attribute, ...]] = {}
    for group in groups.prunable(latents=True):
        least = group.least
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


class _Trials:
    """Prunings of a foreign codec, as `prune` does and verifies them, in float64 throughout.
    Weights are converted once, and copied only where channels go.
    """

    def __init__(self, codec: nn.Module, groups: Groups):
        self.double, self.groups = double_copy(codec), groups
        self.name = type(codec).__name__
        self.image, self.large = (
            example_image(codec, 1, times).cpu().double() for times in ((1, 1), LARGE)
        )
        self.called: set[str] = set()
        self._stands: dict[str, bool] = {}

    def stands(self, stage: str) -> bool:
        """Return whether the codec goes through a stage before any pruning: what it cannot do whole
        is not asked of it pruned. It is known to run on the image that is traced, and to code.
        """
        if stage in ("forward", "stream"):
            return True
        if stage not in self._stands:
            self._stands[stage] = self.failure({}, stage) is None
        return self._stands[stage]

    def failure(self, keep: Mapping[str, list[int]], stage: str) -> Failure | None:
        """Prune to these keep-lists; return what fails at a stage (`STAGES`), None if nothing
        does.
        """
        checked = self.groups.check(keep)
        small = sharing_copy(self.double)
        called: set[str] = set()
        for name in self.groups.uncalled:
            small.get_submodule(name).register_forward_pre_hook(_noting(name, called))
        if (failed := self._failure(small, checked, stage)) is None:
            self.called |= called
        return failed

    def _failure(
        self, small: nn.Module, keep: Mapping[str, np.ndarray], stage: str
    ) -> Failure | None:
        """Prune a copy of the codec; return what fails at a stage."""
        places: list[str] = []
        image = self.large if stage == "large" else self.image
        where = {
            "large": f" on {image.shape[2]} x {image.shape[3]} pixels",
            "training": " in training",
        }.get(stage, "")
        try:
            remove_channels(small, keep, self.groups)
            if stage == "stream":
                round_trip(small)
                return None
            with module_names(small, places):
                if stage == "training":
                    with (
                        torch.no_grad(),
                        float64_throughout(),
                        torch.random.fork_rng(devices=[]),
                    ):
                        run(small.train(), image)
                    return None
                mine = trace(small, image)
        except Exception as error:  # a foreign codec's own code may raise anything
            told = (
                str(error).split(";")[0]
                if isinstance(error, SurgeryError)
                else f"the pruned {self.name} does not run{where}: {first_line(error)}"
            )
            return Failure(_depends(told), self._within(places[-1]) if places else ())
        found = apart([trace(self._masked(keep), image), mine])
        if not found <= TOLERANCE:
            told = (
                f"the pruned {self.name} is not the masked one{where}: {difference_in_words(found)}"
            )
            return Failure(_depends(told))
        return None

    def holds(self, groups: Groups, keep: Mapping[str, list[int]]) -> bool:
        """Return whether keep-lists of such groups can be had, by the forward pass alone."""
        before, self.groups = self.groups, groups
        try:
            return self.failure(keep, "forward") is None
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


def _noting(name: str, called: set[str]) -> Callable[..., None]:
    return lambda module, args: called.add(name)


def _depends(told: str) -> str:
    return f"the codec's code depends on this width ({told})"
