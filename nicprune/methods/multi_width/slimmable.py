"""Slimmable codecs: one set of parameters, several widths, each a complete codec (Yang et al.,
"Slimmable Compressive Autoencoders for Practical Neural Image Compression", CVPR 2021).

Width i keeps the leading channels of every channel group; layers compute with views of their
parameters, nothing is padded. A training step runs all widths, each with its own lambda: the loss
is the sum over widths, and gradients are added up width by width.

*GDN* sums over different channels at each width. `switch`: beta and gamma for each width. `slim`:
the leading part of one. `slim+`: the leading part, with a scale and an offset for each width,

    gamma_i = s_i * gamma[:w, :w] + t_i,    beta_i = u_i * beta[:w] + v_i,

of the values before the non-negative parametrisation, with scales and offsets parametrised in the
same way (the authors' gdn_slim_plus.py). The widest width has neither: it is the codec.

*Latents* have full width at each width (`fixed`: one entropy model for all), or are narrow too
(`slim`: an entropy bottleneck for each).

*Lambdas* start as given; `schedule` lowers those of narrow widths: see `lambda_schedule.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nicprune.channels.groups import Norms
from nicprune.codecs.anatomy import rate_distortion_loss
from nicprune.codecs.hooks import NarrowHook, remove_hooks
from nicprune.codecs.layer_kinds.entropy import is_bottleneck
from nicprune.codecs.layer_kinds.gdn import Affine
from nicprune.codecs.layer_kinds.kind import channel_kind
from nicprune.codecs.layer_kinds.parameters import layers_of
from nicprune.codecs.layer_operations import resize
from nicprune.codecs.provenance import provenance
from nicprune.codecs.zoo import lmbda_for, lmbda_of
from nicprune.common.config import StrictConfig
from nicprune.common.errors import BudgetError, CodecError, RecipeError, TrainingError
from nicprune.methods.contract import METHODS, Method, MultiWidth
from nicprune.methods.multi_width.lambda_schedule import LambdaSchedule, ScheduleConfig
from nicprune.methods.widths import Widths
from nicprune.pruning.budget import ROUND_TO
from nicprune.pruning.masks import importance
from nicprune.pruning.totals import Totals
from nicprune.pruning.views import Slices, narrow_copy, override_attributes


class SlimmableConfig(StrictConfig):
    """Settings of slimmable codecs; exactly one of `widths` and `macs`.

    Attributes:
        widths: widest first, which is the codec itself: fractions of each group's width (1.0, 0.5),
            or channels of the widest group of g_a.
        macs: the same by cost: the largest uniform widths that need at most these fractions of the
            codec's MACs.
        gdn: "switch", "slim" or "slim+".
        latents: y and z are "fixed", or "slim" like the rest.
        order: the channels that come first: as they are numbered ("index"), or the most important
            ones ("importance", measured by `prepare`).
        round_to: widths are multiples of this.
        lambdas, qualities: the trade-off of each width, widest first; without either, all have that
            of the training.
        sandwich: train the widest, the narrowest and so many random ones in between in each step;
            None: all.
        distill: weight of the distance from the image of the widest, relative to the distortion.
        schedule: settings of the lambda schedule: {first: 1000, every: 200}.
        norms: whether channels that a norm computes over are "pinned", or may go ("adapt"), as for
            pruning.
    """

    widths: tuple[float, ...] | None = None
    macs: tuple[float, ...] | None = None
    gdn: Literal["switch", "slim", "slim+"] = "switch"
    latents: Literal["fixed", "slim"] = "fixed"
    order: Literal["index", "importance"] = "index"
    round_to: int = Field(default=ROUND_TO, ge=1, le=64)
    lambdas: tuple[float, ...] | None = None
    qualities: tuple[int, ...] | None = None
    sandwich: int | None = Field(default=None, ge=0)
    distill: float = Field(default=0.0, ge=0)
    schedule: ScheduleConfig | None = None
    norms: Norms = "pinned"

    @model_validator(mode="after")
    def _consistent(self) -> SlimmableConfig:
        if (self.widths is None) == (self.macs is None):
            raise ValueError("give either widths: [1.0, 0.5, 0.25] or macs: [1.0, 0.5, 0.25]")
        given = self.widths if self.widths is not None else self.macs or ()
        if len(given) < 2 or list(given) != sorted(set(given), reverse=True) or given[-1] <= 0:
            raise ValueError(
                f"widths must be two or more, each narrower than the one before; got {list(given)}"
            )
        if given[0] != 1 and (self.macs is not None or given[0] < 1):
            raise ValueError(
                "the widest is the codec itself: start with 1.0, or with its channels (got"
                f" {given[0]:g})"
            )
        if self.lambdas is not None and self.qualities is not None:
            raise ValueError("give lambdas or qualities, not both")
        for what, values in (("lambdas", self.lambdas), ("qualities", self.qualities)):
            if values is not None and (len(values) != len(given) or min(values) <= 0):
                raise ValueError(
                    f"{what}: one for each of {len(given)} widths, positive (got {list(values)})"
                )
        if self.schedule is not None and self.lambdas is None and self.qualities is None:
            raise ValueError(
                "schedule: say what lambdas start with, for example lambdas: [0.0067, 0.0067]"
            )
        return self


HARDLY = 0.25
"""Widths do little where they save less than this fraction of what a width in proportion would."""


@METHODS.register("slimmable")
class Slimmable(MultiWidth):
    """Several widths made of leading channels; no channel is removed."""

    name = "slimmable"
    summary = (
        "one file, several widths, each a whole codec (SlimCAE): leading channels, GDN by width"
    )
    Config = SlimmableConfig
    covers_all_rates = True
    goes_with = frozenset({"Temporal"})
    widths: Widths
    config: SlimmableConfig

    def __init__(self, *args: Any):
        super().__init__(*args)
        codec = self.codec
        self._free = self.groups.prunable(latents=self.config.latents == "slim")
        for group in self._free:
            self.register_buffer(_key("order", group.name), torch.arange(group.width))
        self._table = self._solve()
        count = len(self._table)
        self.widths = Widths(
            count, [float(w) for w in self.config.widths or self.config.macs or ()]
        )
        self._ordered = self.config.order == "index"
        # Images, and what the widest makes of them.
        self._teacher: tuple[Tensor, Tensor] | None = None
        self._lmbda = lmbda_of(self.codec)
        self._slice()
        given = self.config.lambdas or [
            lmbda_for(q, provenance(codec).metric) for q in self.config.qualities or ()
        ]
        self.schedule = LambdaSchedule(count, given or [0.0] * count, self.config.schedule)
        modules = layers_of(codec)
        self._norms = [
            name for name in self._slices[-1].layers if channel_kind(modules[name]).pools
        ]
        own = self._norms if self.config.gdn != "slim" else []
        self.norms = nn.ModuleDict(
            {
                _key(str(i), name): self._norm(modules[name], name, i)
                for i in range(1, count)
                for name in own
            }
        )
        self._bottlenecks = (
            [name for name, m in modules.items() if is_bottleneck(m)]
            if self.config.latents == "slim"
            else []
        )
        self.bottlenecks = nn.ModuleDict(
            {
                _key(str(i), n): self._bottleneck(modules[n], n, i)
                for i in range(1, count)
                for n in self._bottlenecks
            }
        )

    def validate(self) -> None:
        _check_distill(self.config, provenance(self.codec).metric)
        if not self.groups.prunable():
            raise CodecError(
                f"{type(self.codec).__name__} has no channel group that can be narrower"
            )
        if self.config.latents == "slim":
            nested = [
                name for name, m in self.codec.named_modules() if is_bottleneck(m) and "." in name
            ]
            if nested:
                raise CodecError(
                    "latents: slim needs entropy bottlenecks that are the codec's own attributes;"
                    f" {nested[0]} is not: take latents: fixed"
                )

    # -- widths -----------------------------------------------------------------------------------

    def _solve(self) -> list[dict[str, int]]:
        """Return the number of channels of each group at each width."""
        if self.config.macs is not None:
            shares = [self._share(budget) for budget in self.config.macs]
        else:
            assert self.config.widths is not None
            first = self.config.widths[0]
            if first > 1:
                whole = max(
                    (
                        g.width
                        for g in self._free
                        if any(self.groups.transform(m.module) == "g_a" for m in g.members)
                    ),
                    default=0,
                )
                if first != whole:
                    raise RecipeError(
                        f"widths: the widest group of g_a has {whole} channels, and the widest is"
                        f" the codec itself; got {first:g}"
                    )
            shares = [width / first for width in self.config.widths]
        self._shares = shares
        found = [self._at(share) for share in shares]
        for wider, narrower, number in zip(found, found[1:], range(1, len(found)), strict=False):
            if wider == narrower:
                raise RecipeError(
                    f"widths {number - 1} and {number} are the same in multiples of"
                    f" {self.config.round_to}: set them further apart, or round_to lower"
                )
        self._warn_if_widths_do_little(shares[-1], found[-1])
        return found

    def _warn_if_widths_do_little(self, share: float, widths: dict[str, int]) -> None:
        """Warn where most of the codec stays as it is at the narrowest width."""
        left = self.cost.totals(widths).macs / self.cost.totals().macs
        if 1 - left < HARDLY * (1 - share):
            fixed = sum(1 for g in self.groups if g.pinned)
            warnings.warn(
                f"slimmable: at width {share:.3g}, {type(self.codec).__name__} still needs"
                f" {left:.0%} of its MACs: {fixed} of its {len(self.groups)} channel groups cannot"
                " be narrower (nicprune profile gives the reasons)",
                stacklevel=5,
            )

    def _at(self, share: float) -> dict[str, int]:
        found = {}
        for group in self._free:
            step = group.step(self.config.round_to)
            least = max(min(step, group.width), group.least)
            found[group.name] = (
                group.width
                if share == 1
                else min(group.width, max(least, round(share * group.width / step) * step))
            )
        return found

    def _share(self, budget: float) -> float:
        if budget == 1:
            return 1.0
        limit = budget * self.cost.totals().macs
        share = next(
            (
                s
                for s in np.arange(1.0, 0.0, -0.002)
                if self.cost.totals(self._at(float(s))).macs <= limit
            ),
            None,
        )
        if share is None:
            raise BudgetError(
                f"macs: {budget:g} cannot be met by uniform widths in multiples of"
                f" {self.config.round_to}"
            )
        return float(share)

    def _slice(self) -> None:
        """Compute the slices of each layer's parameters at each width."""
        keeps = []
        for table in self._table:
            orders = {
                name: getattr(self, _key("order", name))[:width].tolist()
                for name, width in table.items()
            }
            keeps.append(
                {
                    name: sorted(kept)
                    for name, kept in orders.items()
                    if len(kept) < self.groups[name].width
                }
            )
        self._slices = [Slices(self.codec, self.groups, keep) for keep in keeps]

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        for (
            key,
            bottleneck,
        ) in self.bottlenecks.items():  # CDF tables are as long as their widest channel wants
            start = f"{prefix}bottlenecks.{key}."
            resize(
                bottleneck,
                {
                    name.removeprefix(start): value
                    for name, value in state.items()
                    if name.startswith(start)
                },
            )
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[arg-type]
        self._ordered = True  # the order is part of what was saved
        self._slice()

    def _norm(self, layer: Any, name: str, i: int) -> nn.Module:
        if self.config.gdn == "slim+":
            return Affine()
        parts = self._slices[i].sliced_parameters(name, layer)
        return nn.ParameterDict(
            {what: nn.Parameter(value.detach().clone()) for what, value in parts.items()}
        )

    def _bottleneck(self, layer: nn.Module, name: str, i: int) -> nn.Module:
        return narrow_copy(layer, name, self.groups, self._slices[i].keep)

    @torch.no_grad()
    def prepare(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        if self.config.order == "index":
            return
        lmbda = float(self.schedule.lambdas[0]) or self._lmbda
        for name, scores in importance(
            self.codec,
            self.groups,
            self._free,
            images,
            lmbda,
            provenance(self.codec).metric,
        ).items():
            getattr(self, _key("order", name)).copy_(
                torch.argsort(scores, descending=True, stable=True)
            )
        self._ordered = True
        self._slice()
        # What was cut from the codec for each width was cut in the old order.
        modules = dict(self.codec.named_modules())
        for i in range(1, len(self._slices)):
            for kind, names, make in (
                (self.norms, self._norms, self._norm),
                (self.bottlenecks, self._bottlenecks, self._bottleneck),
            ):
                for name in names:
                    if _key(str(i), name) in kind:
                        kind[_key(str(i), name)].load_state_dict(
                            make(modules[name], name, i).state_dict()
                        )

    # -- computing at a width ---------------------------------------------------------------------

    @contextmanager
    def active(self, codec: nn.Module) -> Iterator[None]:
        """Run the codec at the width that is set, inside the block."""
        i = self.widths.now or 0
        modules = layers_of(codec)
        attributes = self._slices[i].overrides(codec)
        if i:
            attributes += [
                (modules[name], self._norm_at(i, name, modules[name])) for name in self._norms
            ]
            attributes += [
                (codec, {name: self.bottlenecks[_key(str(i), name)]}) for name in self._bottlenecks
            ]
            if isinstance(getattr(codec, "M", None), int) and self._bottlenecks:
                attributes.append((codec, {"M": self._latent_width(i)}))
        with override_attributes(attributes):
            yield

    def _latent_width(self, i: int) -> int:
        return next(self._table[i][g.name] for g in self._free if g.latent == "y")

    def _norm_at(self, i: int, name: str, layer: Any) -> dict[str, Any]:
        """Return the parameters that replace a GDN's own at a width."""
        sliced = self._slices[i].sliced_parameters(name, layer)
        if self.config.gdn == "slim":
            return sliced
        own: Any = self.norms[_key(str(i), name)]
        if self.config.gdn == "switch":
            return {name: own[name] for name in sliced}
        kind = channel_kind(layer)
        return kind.with_pool_weights(*own(*kind.pool_weights(layer, sliced)))

    def attach(self, codec: nn.Module) -> None:
        hook = NarrowHook(self)
        codec.register_forward_pre_hook(hook.before)
        codec.register_forward_hook(hook, always_call=True)

    def detach(self, codec: nn.Module) -> None:
        remove_hooks(codec, lambda hook: hook.owner is self)

    @classmethod
    def stays_with(cls, config: Any) -> bool:
        return True

    def totals(self) -> Totals:
        return self.cost.totals(self._slices[self.widths.now or 0].keep)

    def by_transform(self) -> dict[str, tuple[int, int]]:
        return self.cost.by_transform(self._slices[self.widths.now or 0].keep)

    def share_at(self, width: int) -> float:
        return float(self._shares[width])

    def keep_at(self, width: int) -> dict[str, list[int]]:
        return self._slices[width].keep

    # -- learning ---------------------------------------------------------------------------------

    def lmbda_at(self, value: int) -> float | None:
        return float(self.schedule.lambdas[value]) or None

    def lambda_history(self) -> list[Any]:
        return self.schedule.history()

    def widths_per_step(self) -> list[int]:
        if not self._ordered:
            raise TrainingError(
                "order: importance is measured on photographs: call prepare(images) on what attach"
                " returned before training"
            )
        count = len(self._slices)
        if self.config.sandwich is None or self.config.sandwich >= count - 2:
            return list(range(count))
        drawn = (torch.randperm(count - 2)[: self.config.sandwich] + 1).tolist()
        return [0, *sorted(drawn), count - 1]

    def objective(self, out: Mapping[str, Any], x: Tensor, metric: str) -> dict[str, Tensor] | None:
        if not self.own_lambdas:
            return None
        found = rate_distortion_loss(float(self.schedule.lambdas[self.widths.now or 0]), metric)(
            out, x
        )
        return {key: value for key, value in found.items() if value is not None}

    @property
    def own_lambdas(self) -> bool:
        return self.config.lambdas is not None or self.config.qualities is not None

    def set_objective(self, lmbda: float, metric: str) -> None:
        _check_distill(self.config, metric)
        self._lmbda = lmbda

    def loss(self, out: Mapping[str, Any], x: Tensor) -> Tensor:
        if not self.config.distill:
            return x.new_zeros(())
        if self.widths.now == 0:
            self._teacher = x.detach(), out["x_hat"].detach()
            return x.new_zeros(())
        if self._teacher is None:
            return x.new_zeros(())
        images, target = self._teacher
        if not torch.equal(images, x):
            if not self.training:
                return x.new_zeros(())
            raise TrainingError(
                f"{self.name} with distill compares each width with the widest on the same images:"
                " run every width of model.widths_per_step() on one batch before the next batch"
            )
        lmbda = float(self.schedule.lambdas[self.widths.now or 0]) or self._lmbda
        return self.config.distill * lmbda * 255**2 * (out["x_hat"] - target).square().mean()

    def aux_loss(self) -> Tensor | None:
        losses = [m.loss() for m in self.bottlenecks.values()]  # type: ignore[operator]
        return torch.stack(losses).sum() if losses else None

    def update(self, force: bool = False) -> None:
        for bottleneck in self.bottlenecks.values():
            bottleneck.update(force=force)  # type: ignore[operator]

    @torch.no_grad()
    def after_step(self) -> None:
        self.schedule.advance()
        self._teacher = None

    @property
    def scheduled(self) -> bool:
        return self.schedule.config is not None

    @property
    def wants_validation(self) -> bool:
        return self.schedule.wants_validation

    def on_validation(self, figures: Sequence[tuple[float, float]]) -> None:
        self.schedule.observe([bpp for bpp, _ in figures], [psnr for _, psnr in figures])

    @property
    def steps_left(self) -> int:
        return self.schedule.steps_left

    @property
    def done(self) -> bool:
        return self.steps_left == 0

    def metrics(self) -> dict[str, float]:
        return {f"lambda{i}": float(value) for i, value in enumerate(self.schedule.lambdas)}

    # -- one width of its own ---------------------------------------------------------------------

    def select(self) -> dict[str, list[int]]:
        return {} if self.extracting is None else self._slices[self.extracting].keep

    @torch.no_grad()
    def fold(self, codec: nn.Module) -> None:
        i = self.extracting
        if not i:
            return
        modules: dict[str, Any] = dict(codec.named_modules())
        for name in self._norms:
            layer, parts = modules[name], self._norm_at(i, name, modules[name])
            if self.config.gdn == "slim+":
                parts = {
                    what: getattr(layer, f"{what}_reparam").init(parts[what])
                    for what in ("gamma", "beta")
                }
            index = self._slices[i].layers.get(name, (None, None))[0]
            places = torch.arange(layer.beta.numel())
            places = (
                places
                if index is None
                else places[: index.stop]
                if isinstance(index, slice)
                else index
            )
            layer.beta[places] = parts["beta"].to(layer.beta).clone()
            layer.gamma[places[:, None], places[None, :]] = parts["gamma"].to(layer.gamma).clone()

    def finalize(self, small: nn.Module) -> None:
        for name in self._bottlenecks if self.extracting else ():
            setattr(small, name, copy.deepcopy(self.bottlenecks[_key(str(self.extracting), name)]))

    def transfer_to(self, other: Method, keep: Mapping[str, Sequence[int]]) -> None:
        assert isinstance(other, Slimmable)
        other.load_state_dict(self.state_dict())


def _key(prefix: str, name: str) -> str:
    return f"{prefix}_{name}".replace(".", "/")


def _check_distill(config: SlimmableConfig, metric: str) -> None:
    if config.distill and metric != "mse":
        raise RecipeError(
            f"distill is by squared error, and the codec is trained for {metric}: leave it out"
        )
