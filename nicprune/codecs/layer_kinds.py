"""How each kind of layer gives up channels: torch-pruning's functions, and ours where it has none.

torch-pruning cuts GDN's gamma on one axis only, leaves a masked convolution's mask as it was and
does not know entropy bottlenecks; the three pruners here put that right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from compressai.layers import GDN, GDN1, CheckerboardMaskedConv2d, MaskedConv2d
from compressai.ops.parametrizers import NonNegativeParametrizer
from torch import Tensor, nn

from nicprune.codecs.anatomy import is_bottleneck
from nicprune.codecs.provenance import provenance
from nicprune.codecs.zoo import rebuild
from nicprune.common.errors import CodecError, SurgeryError


def _kept(width: int, removed: Sequence[int]) -> list[int]:
    gone = set(removed)
    return [i for i in range(width) if i not in gone]


class GDNPruner(tp.BasePruningFunc):
    """GDN and GDN1: beta, and both axes of gamma (what is normalised, and what is pooled)."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        kept = _kept(layer.beta.numel(), idxs)
        layer.beta = self._prune_parameter_and_grad(layer.beta, kept, 0)
        layer.gamma = self._prune_parameter_and_grad(layer.gamma, kept, 0)
        layer.gamma = self._prune_parameter_and_grad(layer.gamma, kept, 1)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        return layer.beta.numel()

    get_in_channels = get_out_channels


class MaskedConvPruner(tp.pruner.function.ConvPruner):
    """Masked convolutions: weight, bias, and the mask buffer."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        kept = _kept(layer.out_channels, idxs)
        super().prune_out_channels(layer, idxs)
        layer.mask = layer.mask[kept].clone()
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        kept = _kept(layer.in_channels, idxs)
        super().prune_in_channels(layer, idxs)
        layer.mask = layer.mask[:, kept].clone()
        return layer


class EntropyBottleneckPruner(tp.BasePruningFunc):
    """Entropy bottlenecks: the network of each channel, its quantiles, and its rows of the CDF
    tables.
    """

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        kept = _kept(layer.channels, idxs)
        if hasattr(layer, "matrices"):
            for parameters in (layer.matrices, layer.biases, layer.factors):
                for i in range(len(parameters)):
                    parameters[i] = self._prune_parameter_and_grad(parameters[i], kept, 0)
        else:  # EntropyBottleneckVbr registers them one by one
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if name.startswith(("_matrix", "_factor", "_bias")):
                    setattr(layer, name, self._prune_parameter_and_grad(parameter, kept, 0))
        layer.quantiles = self._prune_parameter_and_grad(layer.quantiles, kept, 0)
        if layer._quantized_cdf.numel():
            for name in ("_quantized_cdf", "_cdf_length", "_offset"):
                setattr(layer, name, getattr(layer, name)[kept].clone())
        layer.channels = len(kept)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        return layer.channels

    get_in_channels = get_out_channels


PRUNERS: dict[type, tp.BasePruningFunc] = {
    nn.Conv2d: tp.pruner.function.ConvPruner(),
    nn.ConvTranspose2d: tp.pruner.function.ConvPruner(),
    nn.Linear: tp.pruner.function.LinearPruner(),
    MaskedConv2d: MaskedConvPruner(),
    CheckerboardMaskedConv2d: MaskedConvPruner(),
    GDN: GDNPruner(),
    GDN1: GDNPruner(),
}
_DEPTHWISE, _BOTTLENECK = tp.pruner.function.DepthwiseConvPruner(), EntropyBottleneckPruner()


def pruner_for(layer: Any) -> tp.BasePruningFunc:
    """Return what removes channels from `layer`.

    Raises:
        SurgeryError: nothing does.
    """
    if is_bottleneck(layer):
        return _BOTTLENECK
    if type(layer) not in PRUNERS:
        raise SurgeryError(f"no channels can be removed from a {type(layer).__name__}")
    return _DEPTHWISE if getattr(layer, "groups", 1) > 1 else PRUNERS[type(layer)]


def remove(layer: Any, axis: str, removed: Sequence[int]) -> None:
    """Remove channels of one axis ("out", "in" or "both") from a layer, in place; requires_grad
    stays as it was.
    """
    needs_grad = {name: p.requires_grad for name, p in layer.named_parameters()}
    pruner_for(layer)(layer, list(removed), to_output=axis != "in")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(needs_grad[name])


def zero(layer: Any, axis: str, channels: Sequence[int]) -> None:
    """Make channels of a producer zero, in place: its rows and bias, or a bottleneck's medians."""
    index = torch.as_tensor(list(channels), dtype=torch.long)
    with torch.no_grad():
        if is_bottleneck(layer):
            layer.quantiles[index, :, 1] = 0.0
        elif axis == "out":
            transposed = isinstance(layer, nn.ConvTranspose2d)
            layer.weight.index_fill_(1 if transposed else 0, index.to(layer.weight.device), 0.0)
            if layer.bias is not None:
                layer.bias.index_fill_(0, index.to(layer.bias.device), 0.0)


def resize(codec: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give every layer of `codec` the shapes that `state` has for it, in place; values are left to
    load_state_dict.
    """
    for prefix, module in codec.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = state.get(dot + name)
            if value is not None and value.shape != parameter.shape:
                fresh = nn.Parameter(
                    torch.empty(value.shape, dtype=parameter.dtype),
                    requires_grad=parameter.requires_grad,
                )
                if isinstance(module, nn.ParameterList):
                    module[int(name)] = fresh
                else:
                    setattr(module, name, fresh)
        for name, buffer in list(module.named_buffers(recurse=False)):
            value = state.get(dot + name)
            if value is not None and value.shape != buffer.shape:
                setattr(module, name, torch.empty(value.shape, dtype=buffer.dtype))
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            # Weight is (out, in / groups, ...), transposed (in, out / groups, ...); depthwise
            # layers have groups = channels.
            first, second = module.weight.shape[:2]
            if module.groups > 1:
                module.groups = module.in_channels = module.out_channels = first
            elif isinstance(module, nn.ConvTranspose2d):
                module.in_channels, module.out_channels = first, second
            else:
                module.out_channels, module.in_channels = first, second
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif is_bottleneck(module):
            module.channels = module.quantiles.shape[0]


def reinitialise(codec: nn.Module) -> None:
    """Give every layer of `codec` weights as its class draws them when it is made, in place: its
    architecture, untrained.

    Raises:
        CodecError: a layer of a kind whose initialisation is not known; names it.
    """
    for name, module in codec.named_modules():
        if isinstance(module, nn.ParameterList) or not list(module.parameters(recurse=False)):
            continue
        made: Any = module
        with torch.no_grad():
            if is_bottleneck(module):
                fresh = type(made)(made.channels, init_scale=made.init_scale, filters=made.filters)
                for parameter, value in zip(module.parameters(), fresh.parameters(), strict=True):
                    parameter.copy_(value)
            elif hasattr(module, "gamma_reparam"):
                # CompressAI's: beta 1, gamma 0.1 on the diagonal.
                made.beta.copy_(made.beta_reparam.init(torch.ones_like(made.beta)))
                made.gamma.copy_(
                    made.gamma_reparam.init(0.1 * torch.eye(len(made.beta)).to(made.gamma))
                )
            elif hasattr(module, "reset_parameters"):
                made.reset_parameters()
            # Parameters of the codec's own, as gains are: those of a new one, where their size is
            # no
            # width.
            else:
                fresh = dict(
                    rebuild(provenance(codec).build)
                    .get_submodule(name)
                    .named_parameters(recurse=False)
                )
                for key, parameter in module.named_parameters(recurse=False):
                    if key not in fresh or fresh[key].shape != parameter.shape:
                        raise CodecError(
                            f"how {key} of a {type(module).__name__} starts is not known here: it"
                            " cannot be trained from scratch"
                        )
                    parameter.copy_(fresh[key])


class Affine(nn.Module):
    """Scale and offset of a GDN's gamma and beta, four numbers, all of them not negative: SlimCAE's
    slim+.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reparam = NonNegativeParametrizer()
        self.scales = nn.Parameter(self.reparam.init(torch.ones(2)))
        self.offsets = nn.Parameter(self.reparam.init(torch.zeros(2)))

    def forward(self, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are at this width, from both as they are in the codec, none of them
        parametrised.
        """
        scales, offsets = self.reparam(self.scales), self.reparam(self.offsets)
        return scales[0] * gamma + offsets[0], scales[1] * beta + offsets[1]
