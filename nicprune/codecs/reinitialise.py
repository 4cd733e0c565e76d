"""Start all layers of a codec anew, as training from scratch does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import kind_of
from nicprune.codecs.provenance import provenance
from nicprune.codecs.zoo import rebuild
from nicprune.common.errors import CodecError


def reinitialise(codec: nn.Module) -> None:
    """Give every layer of `codec` weights as its class draws them when it is made, in place: its
    architecture, untrained.

    Raises:
        CodecError: a layer of a kind whose initialisation is not known; names it.
    """
    for name, module in codec.named_modules():
        kind = kind_of(module)
        bare = not list(module.parameters(recurse=False)) and (
            kind is None or not kind.has_channels
        )
        if isinstance(module, nn.ParameterList) or bare:
            continue
        with torch.no_grad():
            if kind is not None and kind.starts_anew(module):
                kind.reinitialise(module)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
            else:
                # Parameters of the codec's own, as gains are: those of a new one, where their size
                # is no width.
                fresh = dict(
                    rebuild(provenance(codec).build)
                    .get_submodule(name)
                    .named_parameters(recurse=False)
                )
                for key, parameter in module.named_parameters(recurse=False):
                    value = _narrowed(fresh.get(key), parameter)
                    if value is None:
                        raise CodecError(
                            f"how {key} of a {type(module).__name__} starts is not known here: it"
                            " cannot be trained from scratch"
                        )
                    parameter.copy_(value)


def _narrowed(fresh: Tensor | None, parameter: Tensor) -> Tensor | None:
    """A new parameter for as many channels as there are: the first ones of a value per channel."""
    if fresh is None or fresh.shape == parameter.shape:
        return fresh
    per_channel = fresh.dim() == parameter.dim() and fresh.numel() == max(fresh.shape)
    if not per_channel or parameter.numel() > fresh.numel():
        return None
    return fresh.flatten()[: parameter.numel()].view(parameter.shape)
