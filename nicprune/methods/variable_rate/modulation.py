"""One codec, many rates: modulators scale the latents (or more) as the lambda asks, as plug-ins on
any codec.

- `bit_rate_modulator`: two fully connected layers from lambda to a value per latent channel, and
  their inverse at the decoder (Yin et al., "Universal Efficient Variable-rate Neural Image
  Compression", ICASSP 2022).
- `bottleneck_scaling`: a value per latent channel and trained rate, the codec frozen (Theis et al.,
  "Lossy Image Compression with Compressive Autoencoders", ICLR 2017).
- `modulated_autoencoder`: a small network per convolution of g_a and g_s (Yang et al., "Variable
  Rate Deep Image Compression With Modulated Autoencoder", IEEE SPL 2020; its entropy model per rate
  is one for all here).
- `conditional_autoencoder`: scale and bias of every convolution by a table over the trained rates,
  and a step size in between (Choi et al., "Variable Rate Deep Image Compression With a Conditional
  Autoencoder", ICCV 2019).
- `quantisation_steps`: one step per latent channel times one per rate (Wang et al., "EVC", ICLR
  2023).

All start where theory puts them: the step that suits lambda grows as lambda^(-1/2), so latents are
scaled by (lambda / highest)^(1/2) and back, and at the highest rate the codec is what it was. Each
training image has a rate of its own, drawn evenly over all of them. A modulator multiplies
activations; fvcore counts no such products, and neither do we.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nicprune.channels.groups import kept_channels
from nicprune.codecs.anatomy import rate_distortion_loss
from nicprune.codecs.hooks import Hook, remove_hooks
from nicprune.codecs.layer_kinds.kind import kind_of, kinds_in, widths_of
from nicprune.codecs.provenance import provenance
from nicprune.codecs.roles import roles_of, transform_in
from nicprune.codecs.zoo import lmbda_for
from nicprune.common.config import StrictConfig
from nicprune.common.errors import CodecError
from nicprune.methods.contract import Method, RateModulator
from nicprune.methods.levels import Levels


class ModulationConfig(StrictConfig):
    """The rates; exactly one of the two.

    Attributes:
        lambdas: increasing trade-offs, at least two.
        qualities: the same by CompressAI's quality levels.
    """

    lambdas: tuple[float, ...] | None = None
    qualities: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _increasing(self) -> ModulationConfig:
        given = self.lambdas if self.lambdas is not None else self.qualities
        if given is None or (self.lambdas is not None and self.qualities is not None):
            raise ValueError("give either lambdas: [0.0018, 0.0067] or qualities: [1, 3]")
        if (
            len(given) < 2
            or list(given) != sorted(set(given))
            or given[0] <= 0
            or (self.qualities is not None and given[-1] > 8)
        ):
            raise ValueError(
                "rates must be two or more, increasing, positive (qualities 1 to 8); got"
                f" {list(given)}"
            )
        return self


class NetworkConfig(ModulationConfig):
    """Rates, and the width of the hidden layer.

    Attributes:
        hidden: units of the hidden layer.
    """

    hidden: int = Field(default=50, ge=1)


class Site(Hook):
    """One place where activations are scaled: before or after a module.

    Attributes:
        name, side: the module, and "in" or "out".
        dim: the dimension of its output or input that holds channels.
        layer, axis: the convolution, and its axis, with these channels: what pruning removes there,
            the site loses too.
        width: channels.
    """

    def __init__(
        self,
        owner: Modulation,
        name: str,
        side: str,
        layer: str,
        axis: str,
        width: int,
        dim: int = 1,
    ):
        self.owner, self.method, self.dim = owner, owner, dim
        self.name, self.side, self.layer, self.axis, self.width = name, side, layer, axis, width
        self.scales = side == "in"

    def _apply(self, x: Tensor, module: nn.Module | None = None) -> Tensor:
        scale, bias = self.method.factors(self)
        x = x * self._spread(scale, x)
        if bias is None or module is None:
            return x
        # A channel that is masked away must not come back by the bias that it is given here; see
        # also `on_rescale`.
        for hook in module._forward_hooks.values():
            if isinstance(hook, Hook) and (share := hook.share()) is not None:
                bias = bias * share.to(bias)
        return x + self._spread(bias, x)

    def _spread(self, value: Tensor, x: Tensor) -> Tensor:
        """Shape values (images or 1, channels) to go with a tensor."""
        shape = [1] * x.dim()
        shape[0], shape[self.dim] = value.shape
        return value.view(shape).to(x)

    def before(self, module: nn.Module, args: Any) -> Any:
        """Scale the input."""
        return (self._apply(args[0]), *args[1:])

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._apply(output, module)


class Modulation(RateModulator):
    """Base of all modulators: rates, the loss over them, hooks, and folding one rate into the
    weights.
    """

    Config = ModulationConfig
    config: ModulationConfig
    levels: Levels

    def __init__(self, *args: Any):
        super().__init__(*args)
        metric = provenance(self.codec).metric
        self.levels = Levels(
            self.config.lambdas or [lmbda_for(q, metric) for q in self.config.qualities or ()]
        )
        self.sites = self.places()
        self.build()

    def validate(self) -> None:
        self.places()

    def places(self) -> list[Site]:
        """Return the sites where activations are scaled: the output of g_a and the input of g_s, or
        of the modules that do their work, unless a modulator has more.

        Raises:
            CodecError: where they are is not known.
        """
        codec: Any = self.codec
        roles, sites = roles_of(codec), []
        for end, transform, axis in (
            (roles.analysis, "g_a", "out"),
            (roles.synthesis, "g_s", "in"),
        ):
            layer = self._latent_layer(transform, axis)
            if end is None or layer is None:
                reason = roles.reason or f"no layer of {transform} has y for its {axis}put"
                raise CodecError(
                    f"a modulator scales what the analysis gives and the synthesis is given, and"
                    f" {reason}"
                )
            width = widths_of(codec.get_submodule(layer))[axis == "in"]
            sites.append(Site(self, end.module, axis, layer, axis, width, end.dim))
        return sites

    def _latent_layer(self, transform: str, axis: str) -> str | None:
        """Return a layer of a transform whose outputs or inputs are all of y, and nothing else."""
        modules, counts = dict(self.codec.named_modules()), Counter[str]()
        for group in self.groups:
            for member in group.members if group.latent == "y" else ():
                if member.axis == axis and self.groups.transform(member.module) == transform:
                    counts[member.module] += member.index.size
        found = [
            name
            for name, kind in kinds_in(self.codec).items()
            if name in counts and counts[name] == kind.widths(modules[name])[axis == "in"]
        ]
        return found[-1 if axis == "out" else 0] if found else None

    def build(self) -> None:
        """Create the parameters."""
        raise NotImplementedError

    def factors(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """Return scale and bias at a site for the levels that are set, shape (images or 1,
        channels) each.
        """
        raise NotImplementedError

    @classmethod
    def stays_with(cls, config: Any) -> bool:
        return True

    @property
    def _place(self) -> torch.device:
        return next(self.parameters()).device

    def _now(self) -> Tensor:
        return self.levels.now.to(self._place)

    def _prior(self, levels: Tensor) -> Tensor:
        """Return the logarithm of (lambda / highest)^(1/2), exactly 0 at the highest."""
        return (
            0.5
            * (self.levels.lmbda(levels).log() - math.log(self.levels.lambdas[-1]))
            * (levels < self.levels.top)
        )

    def _step(self, site: Site, levels: Tensor) -> Tensor:
        """Return the scale of a site by the prior alone, shape (levels, channels)."""
        factor = self._prior(levels).exp()[:, None].expand(-1, site.width)
        return factor if site.side == "out" else 1 / factor

    def _between(self, table: Tensor) -> Tensor:
        """Return rows of a (rates, channels) table for the levels that are set, interpolated."""
        now = self._now()
        below = now.floor().clamp(0, len(self.levels) - 2).long()
        return torch.lerp(table[below], table[below + 1], (now - below)[:, None].to(table))

    def attach(self, codec: nn.Module) -> None:
        for site in self.sites:
            module = codec.get_submodule(site.name)
            if site.side == "in":
                module.register_forward_pre_hook(site.before)
            else:
                module.register_forward_hook(site)

    def detach(self, codec: nn.Module) -> None:
        remove_hooks(codec, lambda hook: hook.owner is self)

    def objective(self, out: Mapping[str, Any], x: Tensor, metric: str) -> dict[str, Tensor] | None:
        lambdas = self.levels.lmbda(self.levels.now.to(x.device)).expand(x.shape[0])
        parts = []
        for i, lmbda in enumerate(lambdas.tolist()):
            one = {
                "x_hat": out["x_hat"][i : i + 1],
                "likelihoods": {k: v[i : i + 1] for k, v in out["likelihoods"].items()},
            }
            parts.append(rate_distortion_loss(lmbda, metric)(one, x[i : i + 1]))
        return {
            key: torch.stack([part[key] for part in parts]).mean()
            for key, value in parts[0].items()
            if value is not None
        }

    @torch.no_grad()
    def weight_factors(self, codec: nn.Module) -> dict[tuple[str, str], Tensor]:
        found: dict[tuple[str, str], Tensor] = {}
        for site in self.sites:
            if site.side == "in":
                found[site.layer, "in"] = (
                    found.get((site.layer, "in"), 1) * self.factors(site)[0][0]
                )
        return found

    @torch.no_grad()
    def fold(self, codec: nn.Module) -> None:
        for site in self.sites:
            layer: Any = codec.get_submodule(site.name)
            while type(layer) is nn.Sequential and len(layer):
                layer = layer[-1 if site.side == "out" else 0]
            kind = kind_of(layer)
            if kind is None or not (kind.convolution and kind.mask_on_weight):
                raise CodecError(
                    f"one rate of {type(codec).__name__} cannot be written into its weights: a"
                    f" {type(layer).__name__} stands at the"
                    f" {'end' if site.side == 'out' else 'start'} of {site.name}; save the codec"
                    " with its modulator on"
                )
            scale, bias = self.factors(site)
            factor = scale[0].to(layer.weight)
            layer.weight.mul_(kind.along(layer, site.side, factor))
            if site.side == "out" and layer.bias is not None:
                layer.bias.mul_(factor)
            if bias is not None:
                if layer.bias is None:
                    raise CodecError(
                        f"one rate cannot be written into the weights: {site.name} has no bias"
                    )
                layer.bias.add_(bias[0].to(layer.bias))

    def transfer_to(self, other: Method, keep: Mapping[str, Sequence[int]]) -> None:
        assert isinstance(other, Modulation)
        own, theirs = dict(self.named_parameters()), dict(other.named_parameters())
        for number, site in enumerate(self.sites):
            kept = torch.from_numpy(
                kept_channels(self.groups, keep, site.layer, site.axis, site.width)
            )
            for name, dim in self.per_channel(number).items():
                theirs[name].data.copy_(own[name].data.index_select(dim, kept.to(own[name].device)))
        sliced = {name for number in range(len(self.sites)) for name in self.per_channel(number)}
        for name in own:
            if name not in sliced:
                theirs[name].data.copy_(own[name].data)
        other.levels.now = self.levels.now.clone()

    def per_channel(self, site: int) -> dict[str, int]:
        """Return the names of parameters with a value for each channel of a site, with the
        dimension of the channels.
        """
        raise NotImplementedError


class Network(nn.Module):
    """Two fully connected layers from a number to a value per channel, initialised to return 0."""

    def __init__(self, hidden: int, channels: int, activation: Any):
        super().__init__()
        self.first, self.second = nn.Linear(1, hidden), nn.Linear(hidden, channels)
        self.activation = activation
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Map (n,) to (n, channels), in float32 whatever the autocast precision."""
        with torch.autocast(t.device.type, enabled=False):
            weight = self.first.weight
            return self.second(self.activation(self.first(t.to(weight)[:, None])))


ZERO = math.log(math.e - 1)
"""softplus(ZERO) = 1: tables hold differences from it, so that a scale of 1 is exactly that."""


def convolutions_in(codec: nn.Module, transforms: Sequence[str]) -> list[str]:
    """Return the names of the convolutions in these transforms, in order."""
    return [
        name
        for name, kind in kinds_in(codec).items()
        if kind.convolution
        and (kind.mask_on_weight or kind.flow == "grouped")
        and transform_in(codec, name) in transforms
    ]
