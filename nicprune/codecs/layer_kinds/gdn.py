"""Generalised divisive normalisation: GDN and GDN1, and their inverses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from compressai.layers import GDN, GDN1
from compressai.ops.parametrizers import NonNegativeParametrizer
from torch import Tensor, nn

from nicprune.codecs.layer_kinds.kind import KINDS, Index, LayerKind, cut, kept_indices, take
from nicprune.codecs.layer_kinds.layout import Layout


class GDNPruner(tp.BasePruningFunc):
    """GDN and GDN1: beta, and both axes of gamma (what is normalised, and what is pooled), of which
    torch-pruning cuts one.
    """

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        kept = kept_indices(layer.beta.numel(), idxs)
        layer.beta = self._prune_parameter_and_grad(layer.beta, kept, 0)
        layer.gamma = self._prune_parameter_and_grad(layer.gamma, kept, 0)
        layer.gamma = self._prune_parameter_and_grad(layer.gamma, kept, 1)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        return layer.beta.numel()

    get_in_channels = get_out_channels


class Normalisation(LayerKind):
    """GDN: x / sqrt(beta + gamma x^2), over the channels at each place (Ballé et al., 2016); GDN1:
    x / (beta + gamma |x|). A channel that is zero adds nothing to what is pooled, and stays zero.
    """

    flow = "coupled"
    pools = True
    pruner = GDNPruner()

    def __init__(self, simple: bool):
        self.simple = simple

    def widths(self, layer: Any) -> tuple[int, int]:
        return layer.beta.numel(), layer.beta.numel()

    def masked(self, axis: str) -> bool:
        return False

    def parameter_terms(self, layer: Any) -> tuple[int, int]:
        return 1, 1

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        self.pruner(layer, list(removed), to_output=axis != "in")

    def sliced(self, layer: Any, out: Index, inn: Index) -> dict[str, Any]:
        gamma = take(take(layer.gamma, 0, out), 1, inn)
        return {"gamma": gamma, "beta": take(layer.beta, 0, out)}

    def norms(self, layer: Any, axis: str) -> Tensor:
        gamma, beta = self.pool_weights(layer)
        return gamma.square().sum(0) + gamma.square().sum(1) + beta.square()

    def reinitialise(self, layer: Any) -> None:
        # CompressAI's: beta 1, gamma 0.1 on the diagonal.
        layer.beta.copy_(layer.beta_reparam.init(torch.ones_like(layer.beta)))
        eye = torch.eye(len(layer.beta)).to(layer.gamma)
        layer.gamma.copy_(layer.gamma_reparam.init(0.1 * eye))

    @torch.no_grad()
    def fixed(self, layer: Any) -> nn.Module:
        gamma, beta = self.pool_weights(layer)
        return FixedNormalisation(gamma, beta, inverse=layer.inverse, simple=self.simple)

    def grown(self, layer: Any, inputs: int, outputs: int) -> nn.Module | None:
        made = GrownNormalisation(inputs, outputs, inverse=layer.inverse, simple=self.simple)
        return made.to(layer.beta.device, layer.beta.dtype)

    def copy_rows(self, layer: Any, new: Any, rows: Tensor, inputs: Layout) -> None:
        new.beta.copy_(layer.beta[rows])
        none = new.gamma_reparam.init(new.gamma.new_zeros(len(rows), inputs.added))
        new.gamma.copy_(torch.cat([layer.gamma[rows], none], 1))

    # -- pooling ----------------------------------------------------------------------------------

    def pool_weights(
        self, layer: Any, values: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        gamma, beta = (
            (values or {}).get("gamma", layer.gamma),
            (values or {}).get("beta", layer.beta),
        )
        return layer.gamma_reparam(gamma), layer.beta_reparam(beta)

    def with_pool_weights(self, gamma: Tensor, beta: Tensor) -> dict[str, Any]:
        return {"gamma": gamma, "beta": beta, "gamma_reparam": _same, "beta_reparam": _same}

    def add_to_pool(self, layer: Any, added: Tensor) -> None:
        _, beta = self.pool_weights(layer)
        layer.beta.copy_(layer.beta_reparam.init(beta + added))

    def pooled(self, x: Tensor) -> Tensor:
        return x.abs() if self.simple else x.square()

    def normalise_some(
        self, layer: Any, x: Tensor, index: Tensor, gather: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        gamma, beta = (weights[index] for weights in self.pool_weights(layer))
        pooled = F.conv2d(self.pooled(x), gamma[..., None, None], beta)
        norm = pooled if self.simple else pooled.sqrt_()
        x = gather(x, index)
        return x.mul_(norm) if layer.inverse else x.div_(norm)


class FixedNormalisation(nn.Module):
    """GDN or GDN1, of gamma (C, C) and beta (C,) as they are, not parametrised. It is not trained:
    it computes in place, as new memory costs as much as arithmetic.
    """

    def __init__(self, gamma: Tensor, beta: Tensor, *, inverse: bool, simple: bool):
        super().__init__()
        self.gamma = nn.Parameter(gamma[..., None, None].clone())
        self.beta = nn.Parameter(beta.clone())
        self.inverse, self.simple = inverse, simple

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.conv2d(x.abs() if self.simple else x.square(), self.gamma, self.beta)
        if self.simple:
            norm = pooled if self.inverse else pooled.reciprocal_()
        else:
            norm = pooled.sqrt_() if self.inverse else pooled.rsqrt_()
        return norm.mul_(x)


class GrownNormalisation(nn.Module):
    """GDN or GDN1 of new channels, over all channels: those of a source codec, and their own.

    It starts as GDN does, with its own channels alone: gamma 0.1 for each itself, beta 1.
    """

    def __init__(self, inputs: int, outputs: int, *, inverse: bool, simple: bool):
        super().__init__()
        self.inverse, self.simple = inverse, simple
        self.beta_reparam = NonNegativeParametrizer(minimum=1e-6)
        self.gamma_reparam = NonNegativeParametrizer()
        # What is not its own stands first here, whatever the order of the input is.
        own = torch.cat([torch.zeros(outputs, inputs - outputs), 0.1 * torch.eye(outputs)], 1)
        self.beta = nn.Parameter(self.beta_reparam.init(torch.ones(outputs)))
        self.gamma = nn.Parameter(self.gamma_reparam.init(own))

    def forward(self, old: Tensor, x: Tensor) -> Tensor:
        """Normalise new channels, (B, N, H, W).

        Args:
            old: channels of the source codec, (B, C, H, W).
            x: the new channels, (B, N, H, W).
        """
        gamma, beta = self.gamma_reparam(self.gamma), self.beta_reparam(self.beta)
        both = torch.cat([old, x], 1)
        pooled = F.conv2d(
            both.abs() if self.simple else both.square(), gamma[..., None, None], beta
        )
        norm = pooled if self.simple else pooled.sqrt()
        return x * norm if self.inverse else x / norm


class NewNormalisation(LayerKind):
    """`GrownNormalisation`: its channels are the new ones; the source codec's, which it pools too,
    always stay.
    """

    flow = "coupled"

    def widths(self, layer: Any) -> tuple[int, int]:
        return layer.beta.numel(), layer.beta.numel()

    def masked(self, axis: str) -> bool:
        return False

    def remove(self, layer: Any, axis: str, removed: Sequence[int]) -> None:
        outputs, inputs = layer.gamma.shape
        kept = kept_indices(outputs, removed)
        others = inputs - outputs
        cut(layer, "beta", kept)
        cut(layer, "gamma", kept, 0)
        cut(layer, "gamma", [*range(others), *(others + i for i in kept)], 1)

    def norms(self, layer: Any, axis: str) -> Tensor:
        gamma, beta = layer.gamma_reparam(layer.gamma), layer.beta_reparam(layer.beta)
        own = gamma[:, gamma.shape[1] - gamma.shape[0] :]
        return gamma.square().sum(1) + own.square().sum(0) + beta.square()


def _same(x: Tensor) -> Tensor:
    return x


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


KINDS[GDN], KINDS[GDN1] = Normalisation(simple=False), Normalisation(simple=True)
KINDS[GrownNormalisation] = NewNormalisation()
