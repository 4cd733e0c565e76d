"""A codec that computes with some of its channels: the parameters stay whole, layers are given
views of the part that counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from nicprune.channels.groups import Groups, kept_channels
from nicprune.codecs.layer_kinds.kind import Index, channel_kind, index_of
from nicprune.codecs.layer_kinds.parameters import holder, layers_of
from nicprune.codecs.layer_operations import remove
from nicprune.common.errors import CodecError
from nicprune.pruning.attributes import values_under


class Slices:
    """The channels that each layer of a codec has left under keep-lists.

    Attributes:
        keep: the keep-lists.
        layers: (output, input) index of each layer that has less, by module name; for GDN and
            depthwise layers both are the same.
        attributes: numbers of modules that follow the widths, by module name.
    """

    def __init__(self, codec: nn.Module, groups: Groups, keep: Mapping[str, Sequence[int]]):
        self.keep = {name: list(kept) for name, kept in keep.items()}
        modules = layers_of(codec)
        self.attributes = values_under(codec, groups, self.keep)
        self.layers: dict[str, tuple[Index, Index]] = {}
        for name in dict.fromkeys(m.module for group in self.keep for m in groups[group].members):
            layer: Any = modules[name]
            kind = channel_kind(layer)
            if kind.codes:
                continue
            widths = kind.widths(layer)
            if kind.flow in ("dense", "grouped", "attention"):
                found = tuple(
                    index_of(kept_channels(groups, self.keep, name, axis, width), width)
                    for axis, width in zip(("out", "in"), widths, strict=True)
                )
            else:
                both = kept_channels(groups, self.keep, name, "both", widths[0])
                found = (index_of(both, widths[0]),) * 2
            if found != (None, None):
                self.layers[name] = (found[0], found[1])

    def overrides(self, codec: nn.Module) -> list[tuple[Any, dict[str, Any]]]:
        """Return what `override_attributes` is to put in front of a codec's own."""
        modules = layers_of(codec)
        found = [
            (modules[name], self.sliced_parameters(name, modules[name])) for name in self.layers
        ]
        return found + [(modules[name], dict(values)) for name, values in self.attributes.items()]

    def sliced_parameters(self, name: str, layer: Any) -> dict[str, Any]:
        """Return the attributes of a layer as it is when it has these channels alone."""
        return channel_kind(layer).sliced(layer, *self.layers.get(name, (None, None)))


def narrow_copy(
    layer: nn.Module, name: str, groups: Groups, keep: Mapping[str, Sequence[int]]
) -> nn.Module:
    """Return a copy of an entropy bottleneck, by name, with the channels that keep-lists leave."""
    own = copy.deepcopy(layer)
    for group, kept in keep.items():
        for member in groups[group].members:
            if member.module == name:
                gone = np.setdiff1d(np.arange(groups[group].width), kept)
                remove(own, "both", member.index[gone].ravel().tolist())
    return own


@contextmanager
def override_attributes(
    attributes: Sequence[tuple[Any, Mapping[str, Any]]],
) -> Iterator[None]:
    """Let these stand in front of layers' own attributes, parameters, buffers and sub-modules
    inside the block. Modules that torch.compile has compiled run uncompiled in it: a compiler
    would take the layers' own.

    Raises:
        CodecError: the block itself is being compiled.
    """
    before: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = []
    try:
        with _eager():
            for layer, values in attributes:
                own = holder(layer).__dict__
                had = {name: own[name] for name in values if name in own}
                before.append((own, had, list(values)))
                own.update(values)
            yield
    finally:
        for own, had, names in reversed(before):
            for name in names:
                own.pop(name, None)
            own.update(had)


def _eager() -> AbstractContextManager[None]:
    """Return a context in which compiled modules run as they were written."""
    refusal = CodecError(
        "torch.compile does not see what a method puts in front of layers' parameters: compile the"
        " model that attach() returned, not the codec in it"
    )
    if torch.compiler.is_compiling():  # else set_stance fails in torch's own words
        raise refusal
    try:
        stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise refusal from error
    return stance
