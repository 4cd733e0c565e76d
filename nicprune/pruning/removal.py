"""Remove channels from the layers of a codec, and let what else knows a width follow."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from compressai.latent_codecs import ChannelGroupsLatentCodec
from torch import nn

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import forward_for_analysis
from nicprune.codecs.example import example_image
from nicprune.codecs.layer_kinds.kind import kind_of, nearest_kind, widths_of
from nicprune.codecs.layer_kinds.parameters import layers_of
from nicprune.codecs.layer_operations import remove
from nicprune.codecs.modes import modes_restored
from nicprune.common.errors import SurgeryError
from nicprune.pruning.attributes import set_attributes, values_under


def remove_channels(codec: nn.Module, keep: Mapping[str, np.ndarray], groups: Groups) -> None:
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
