"""Energy-based channel gating (Yin et al., "Universal Efficient Variable-rate Neural Image
Compression", ICASSP 2022).

Before each convolution a gate measures the energy of every input channel over the image (global
pooling), mixes it with that of its neighbours (1-D convolution across channels) and closes the
channels that are below a learnt threshold alpha. The paper's loss adds gamma * sum (alpha -
alpha_t)^2; its gate formula and settings are not public. This implementation:

*Score.* The score of a channel is a root of its energy relative to its own running mean: alpha = 1
means "closed where there is less than usual". So the absolute energy of a channel does not decide
whether it is closed. The gradient of the step is that of a sigmoid (straight-through). While
thresholds are learnt, the step is a ramp that narrows: channels fade before they close, so that the
following layers can adapt. A hard step from the start ended at a far higher loss.

*Update.* After each optimiser step

    alpha <- alpha + rho * r * (alpha_t - alpha) - eta * clip(g / rms(g))

with g the rate-distortion gradient: the decoupled gradient step of gamma * (alpha - alpha_t)^2, 2 *
gamma = rho. As a term of the loss, gamma would be cancelled by Adam's normaliser. With `alpha` as
target rho is constant and r = 1, as published. With a budget alpha_t closes everything, r is the
MACs that a channel accounts for over its importance (running mean of the squared gradient by the
gate), relative to the median, and rho is steered so that the measured cost follows a straight line
from the whole to the budget, and stays there.

*Skipping.* For a single image, closed channels are left out of the convolution, and of the GDN
before it if nothing else reads its output. The gate decides from the output at some pixels.

*Fine-tuning.* Thresholds and mixing stay as they were learnt; running means of energies go on
following the codec where its weights are trained, since scores are relative to them. If they did
not, channels would open and close as weights grow and shrink.

*Whole images* have less extreme energies than training patches. `calibrate` measures how often each
channel is open on whole images and moves the thresholds until the budget holds there: by t * r to
close channels, by t / r to open some, with one t for all and the r of the update. If all moved by
one amount, important channels would close too.

*Freezing.* Channels that hardly ever open are removed by `harden`. They then no longer contribute
to the GDN's sum over channels; beta takes over their mean contribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nicprune.channels.groups import kept_channels
from nicprune.codecs.calling import run
from nicprune.codecs.layer_kinds.kind import channel_kind, kinds_in, widths_of
from nicprune.codecs.layer_kinds.parameters import layers_of
from nicprune.codecs.layer_operations import zero
from nicprune.codecs.modes import modes_restored
from nicprune.codecs.roles import transform_in, transforms_in
from nicprune.common.errors import BudgetError, RecipeError, TrainingError
from nicprune.methods.contract import METHODS, Gating, Method, Roles
from nicprune.methods.gating.execution import attach_gates, detach_gates, pooled_before
from nicprune.methods.gating.gate import (
    SILENT,
    START,
    Gate,
    GatingConfig,
    Power,
    gatable,
    input_sizes,
    key_of,
    opened,
    recording,
    sampling_step,
)
from nicprune.pruning.budget import SIDES, move_to_budget
from nicprune.pruning.budget_controller import SPREAD, deviations, relative_rates, steer

CLOSED = 3.0
"""alpha_t with a budget: closed wherever there is less than 3^4 times a channel's usual energy."""

RAMP = 0.7
"""Share of the gating steps until the budget is reached."""

SOFT = 1.0
"""Width of the ramp that stands for the step at first; it narrows to a step over the same share."""

PHOTOGRAPH = 96
"""Pixels of a photograph (768x512) for each of a 64x64 image's."""


@METHODS.register("channel_gating")
class ChannelGating(Gating):
    """Close channels per image; those that hardly ever open can be removed."""

    name = "channel_gating"
    summary = "gates close channels of little energy, per image (ECG); what never opens is removed"
    steps_field = "gating_steps"
    Config = GatingConfig
    attach_last = True
    config: GatingConfig

    step: Tensor
    rho: Tensor
    frozen: Tensor
    sampled: Tensor

    def __init__(self, *args: Any):
        super().__init__(*args)
        codec = self.codec
        self.gated = gatable(codec, self.groups, self.config.transforms)
        self._transforms = transforms_in(codec, self.gated)
        modules = dict(codec.named_modules())
        self.gates = nn.ModuleDict(
            {
                key_of(n): Gate(
                    widths_of(modules[n])[1],
                    self.config.energy,
                    self.config.kernel,
                    self.config.relative,
                )
                for n in self.gated
            }
        )
        pools = [
            n
            for n, kind in kinds_in(codec).items()
            if kind.pools and transform_in(codec, n) in self.config.transforms
        ]
        self.powers = nn.ModuleDict(
            {key_of(n): Power(channel_kind(modules[n]).widths(modules[n])[0]) for n in pools}
        )
        self._pools = pools
        self._beside: tuple[Method, ...] = ()
        self._sizes = input_sizes(codec, self.gated)
        # How much of a map is looked at to pool it: of a photograph's at first, of those calibrated
        # with later.
        sides = [math.isqrt(self._sizes[n] * PHOTOGRAPH) for n in self.gated]
        self.register_buffer(
            "sampled", torch.tensor([1.0 / sampling_step(side, side) ** 2 for side in sides])
        )
        self._find_pools(codec)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("rho", torch.tensor(self._first_rho()))
        # Whether channels that never open have been removed: those that are found later are still
        # there, and cost.
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self._check_budget()

    def _find_pools(self, codec: nn.Module) -> None:
        self._behind = pooled_before(codec, self.groups, self.gated)
        self._prices = self._price_channels()

    def _price_channels(self) -> np.ndarray:
        """Return the MACs that each gated channel accounts for: those of the convolution and its
        GDN, and a part of what `harden` removes with it if it never opens.
        """
        prices = {
            name: np.full(gate.channels, float(self.cost.per_input(name)))
            for name, gate in self.each().items()
        }
        for pool, name in self._behind.items():
            prices[name] += self.cost.per_output(pool)
        whole = dict(zip(self.cost.names, self.cost.per_channel(), strict=True))
        for group in self.groups.prunable():
            readers = [m for m in group.members if m.axis == "in"]
            if readers and all(m.module in prices for m in readers):
                direct = sum(float(prices[m.module][m.index].sum()) for m in readers) / group.width
                for m in readers:
                    prices[m.module][m.index] *= max(1.0, whole[group.name] / direct)
        return np.concatenate(list(prices.values()))

    def _first_rho(self) -> float:
        if self.config.gamma is not None:
            return 2 * self.config.gamma
        return (5.0 if self.config.alpha is not None else 1.0) / self.config.gating_steps

    def validate(self) -> None:
        if self.config.budget is not None and self.config.budget.params is not None:
            raise RecipeError(
                "budget params: gates leave parameters where they are; name macs, encoder or"
                " decoder"
            )
        if self.config.budget is not None and self.config.budget.split == "auto":
            raise RecipeError(
                "budget split: auto compares codecs whose channels are removed for good; give a"
                " number, or limits for encoder and decoder"
            )
        if self.config.budget is not None and self.config.budget.times:
            raise RecipeError(
                f"budget {self.config.budget.times[0]}: gates choose channels image by image, and"
                " times are measured of layers as they are; name macs, encoder or decoder, or prune"
                " by mask_decay, magnitude or fisher"
            )
        gatable(self.codec, self.groups, self.config.transforms)

    def _check_budget(self) -> None:
        """Raise BudgetError if even one open channel in front of each convolution costs more than
        the budget.
        """
        if self.config.budget is None:
            return
        least = self._costs(
            dict.fromkeys(self.gated, 1.0),
            dict(zip(self.gated, self.sampled.tolist(), strict=True)),
        )[0]
        for name, limit in self.config.budget.limits(self.cost.original).items():
            if least[name] > limit:
                asked, left = self.config.budget.in_units_given(name, limit, least[name], self.cost)
                raise BudgetError(
                    f"{asked} cannot be met by gating alone: with one channel open before each of"
                    f" {len(self.gated)} convolutions {left} remains (layers without a gate, GDN);"
                    " ask for more, or gate a pruned codec"
                )

    def each(self) -> dict[str, Gate]:
        """Return the gates by the name of the convolution after them."""
        return {name: self.gates[key_of(name)] for name in self.gated}  # type: ignore[misc]

    def _meters(self) -> dict[str, Power]:
        return {name: self.powers[key_of(name)] for name in self._pools}  # type: ignore[misc]

    def set_beside(self, methods: Sequence[Method]) -> None:
        self._beside = tuple(methods)

    def _kept_by_others(self) -> dict[str, list[int]]:
        """Return the keep-lists of the other methods that remove channels, as they would now."""
        found: dict[str, list[int]] = {}
        for method in Roles.of(self._beside).pruners:
            if method is not self and method.codec is self.codec:
                for name, kept in method.select().items():
                    found[name] = sorted(set(kept) & set(found.get(name, kept)))
        return found

    def attach(self, codec: nn.Module) -> None:
        self._find_pools(codec)  # another method may stand between the two by now
        attach_gates(codec, self.each(), self._meters(), self._behind)

    def detach(self, codec: nn.Module) -> None:
        detach_gates(codec, {id(m) for m in (*self.each().values(), *self._meters().values())})

    @classmethod
    def stays_with(cls, config: Any) -> bool:
        return bool(config.rest == "dynamic")

    @property
    def done(self) -> bool:
        return self.steps_left == 0

    @property
    def steps_left(self) -> int:
        return max(0, self.config.gating_steps - int(self.step))

    def manually_updated(self) -> list[nn.Parameter]:
        return [gate.threshold for gate in self.each().values()]

    def fixed(self) -> list[nn.Parameter]:
        return list(self.gates.parameters()) if self.done else []

    # -- cost -------------------------------------------------------------------------------------

    def _costs(
        self,
        inputs: Mapping[str, float],
        sampled: Mapping[str, float],
        keep: Mapping[str, Sequence[int]] | None = None,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return the MACs with so many open channels, those of the gates included: a multiply-add
        per square, the 1-D convolution, the GDN of the sample.
        """
        outputs = {pool: inputs[name] for pool, name in self._behind.items() if sampled[name] < 1}
        totals, by_transform = self.cost.with_fewer(inputs, outputs, keep)
        twice = {self._behind[pool] for pool in outputs}
        for name, gate in self.each().items():
            transform, width = self._transforms[name], gate.channels
            if keep:
                width = len(kept_channels(self.groups, keep, name, "in", width))
            own = width * (
                self._sizes[name] * sampled[name] * (1 + width * (name in twice))
                + self.config.kernel
            )
            by_transform[transform] += own
            for what in _counted_in(transform):
                totals[what] += own
        return totals, by_transform

    def image_cost(self) -> tuple[dict[str, float], dict[str, float]]:
        return self._costs(
            {n: float(gate.open.sum()) for n, gate in self.each().items()},
            {n: gate.fraction for n, gate in self.each().items()},
        )

    def expected(self) -> dict[str, float]:
        """Return the mean MACs at the running open rates, with frozen channels removed."""
        keep = {} if bool(self.frozen) else self.select()
        inputs = {}
        for name, gate in self.each().items():
            kept = kept_channels(self.groups, keep, name, "in", gate.channels)
            inputs[name] = float(
                gate.open_rate[torch.from_numpy(kept).to(gate.open_rate.device)].sum()
            )
        return self._costs(inputs, dict(zip(self.gated, self.sampled.tolist(), strict=True)), keep)[
            0
        ]

    def metrics(self) -> dict[str, float]:
        rates = torch.cat([gate.open_rate for gate in self.each().values()])
        return {
            "macs": self.expected()["macs"] / self.cost.original.macs,
            "density": float(rates.mean()),
            "dynamic": float(((rates > 0.02) & (rates < 0.98)).float().mean()),
            "rho": float(self.rho),
        }

    # -- learning ---------------------------------------------------------------------------------

    def _ahead(self) -> dict[str, float]:
        """Return the distance from the planned cost as a fraction of the whole way, by limit;
        positive where it is too high.
        """
        assert self.config.budget is not None
        planned = min(1.0, int(self.step) / max(1.0, RAMP * self.config.gating_steps))
        now, limits = self.expected(), self.config.budget.limits(self.cost.original)
        found = deviations(now.__getitem__, self.cost.totals(), limits, planned, 0.01)
        return dict(zip(limits, found, strict=True))

    @torch.no_grad()
    def after_step(self) -> None:
        gates = list(self.each().values())
        _share(gates)
        if self.done:
            return
        self.step += 1
        sizes = [gate.channels for gate in gates]
        alpha = torch.cat([gate.current() for gate in gates])
        gradient = torch.cat(
            [
                g.threshold.grad if g.threshold.grad is not None else torch.zeros_like(g.threshold)
                for g in gates
            ]
        )
        if not bool(torch.isfinite(gradient).all()):
            gradient = torch.zeros_like(gradient)
        importance = torch.cat([gate.importance for gate in gates])
        pull = gradient / gradient.square().mean().sqrt().clamp_min(1e-20)
        eta = 2.0 / self.config.gating_steps
        if self.config.budget is not None:
            ahead = self._ahead()
            steer(self.rho, max(ahead.values()), slowest=1e-3 / self.config.gating_steps)
            missed = [name for name, deviation in ahead.items() if deviation > 0]
            rates = self._rates(importance, missed or list(ahead))
            goal = torch.full_like(alpha, CLOSED)
            learning = self._lowering(list(ahead)).to(alpha.device)
        else:
            rates, goal = (
                torch.ones_like(alpha),
                torch.full_like(alpha, float(self.config.alpha or 0)),
            )
            learning = torch.ones_like(alpha, dtype=torch.bool)
        change = (self.rho * rates).clamp(max=1) * (goal - alpha) - eta * pull.clamp(-1, 1)
        alpha = alpha + change.where(learning, 0.0)
        left = max(0.0, 1 - int(self.step) / (RAMP * self.config.gating_steps))
        for gate, part in zip(gates, alpha.clamp(min=START).split(sizes), strict=True):
            gate.softness.fill_(SOFT * left)
            gate.write(part)
        if self.done:
            self._fix_thresholds()

    def _lowering(self, limits: Sequence[str]) -> Tensor:
        """Return whether closing a channel lowers one of these costs, for all channels of all
        gates.
        """
        counted = [bool({*limits} & {*_counted_in(t)}) for t in self._transforms.values()]
        gates = self.each().values()
        return torch.cat(
            [torch.full((g.channels,), lowers) for g, lowers in zip(gates, counted, strict=True)]
        )

    def _rates(self, importance: Tensor, limits: Sequence[str]) -> Tensor:
        """Return r, how much faster than others each channel is closed, from the importance of all
        channels, shape (sum of C,); 0 where closing it lowers none of these limited costs.
        """
        helps = self._lowering(limits).to(importance.device)
        rates = torch.zeros_like(importance)
        prices = torch.from_numpy(self._prices).to(importance)
        if bool(helps.any()):
            rates[helps] = relative_rates(prices[helps], importance[helps])
        return rates

    def _fix_thresholds(self) -> None:
        """Fix thresholds and the 1-D convolution once done; the codec's weights may be trained
        on. They get no gradient then, and stay parameters that an optimiser is given: a run that is
        resumed has those of its checkpoint.
        """
        parts: list[Any] = [*self.each().values(), *self._meters().values()]
        for part in parts:
            part.learns = not self.done

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fix_thresholds()

    @torch.no_grad()
    def calibrate(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        if not images:
            raise TrainingError("calibrating gates needs at least one image")
        with modes_restored(model, self):
            model.eval()
            self.eval()
            if self.config.budget is None:
                self._measure(model, images)
            else:
                self._move_to_budget(model, images)

    def _measure(self, model: nn.Module, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run these images, set open rates and powers to theirs, and return the margins of each
        gate, shape (images, C).
        """
        gates, meters, looked_at = self.each(), self._meters(), []
        with recording(gates, meters):
            for image in images:
                run(model, image)
                looked_at.append(torch.tensor([gate.fraction for gate in gates.values()]))
            self.sampled.copy_(torch.stack(looked_at).mean(0))
            margins = {name: torch.cat(gate.recorded or []) for name, gate in gates.items()}
            for meter in meters.values():
                meter.value.copy_(torch.stack(meter.recorded or []).mean(0))
                meter.seen.fill_(len(images))
        for name, gate in gates.items():
            gate.open_rate.copy_(opened(margins[name]).mean(0))
        return margins

    def _used(self, limits: Sequence[str]) -> float:
        """Return the largest fraction of these limits that is used at the running open rates."""
        assert self.config.budget is not None
        now, all_ = self.expected(), self.config.budget.limits(self.cost.original)
        return max(now[name] / all_[name] for name in limits)

    def _move_to_budget(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        """Move the thresholds until the budget holds on these images and is used: those of each
        side by its own limit, then all by that of the whole, where it is still exceeded.
        """
        assert self.config.budget is not None
        limits = list(self.config.budget.limits(self.cost.original))
        sides = [name for name in limits if name in SIDES]
        for side in sides:
            self._move_to_limits(model, images, [side])
        if not sides or self._used(limits) > 1:
            self._move_to_limits(model, images, limits)

    def _move_to_limits(
        self, model: nn.Module, images: Sequence[Tensor], limits: Sequence[str]
    ) -> None:
        """Move the thresholds of the gates that lower these limited costs until these hold on the
        images and are used.
        """
        gates, margins = self.each(), dict[str, Tensor]()
        start = {name: gate.threshold.data.clone() for name, gate in gates.items()}
        rates = self._rates(torch.cat([gate.importance for gate in gates.values()]), limits)
        parts = rates.split([gate.channels for gate in gates.values()])

        def moved(to: float) -> dict[str, Tensor]:
            """Return the thresholds at t = `to`: none falls below START, where all are open."""
            found = {}
            for name, rate in zip(gates, parts, strict=True):
                further = to * rate if to > 0 else (to / rate).where(rate > 0, 0.0)
                found[name] = (start[name] + further).maximum(start[name].clamp_max(START))
            return found

        def move(to: float) -> None:
            for name, threshold in moved(to).items():
                gates[name].threshold.data.copy_(threshold)

        def measure() -> float:
            margins.update(self._measure(model, images))
            return self._used(limits)

        def guess(now: float) -> float:
            """Return how much further thresholds must move for the recorded images to meet the
            budget at the same energies.
            """
            before, here = {n: gate.open_rate.clone() for n, gate in gates.items()}, moved(now)
            low, high = -CLOSED * SPREAD, CLOSED * SPREAD
            for middle in ((low + high) / 2 for _ in range(26)):
                for name, there in moved(now + middle).items():
                    further = margins[name] - (there - here[name])
                    gates[name].open_rate.copy_(opened(further).mean(0))
                low, high = (middle, high) if self._used(limits) > 1 else (low, middle)
            for name, rate in before.items():
                gates[name].open_rate.copy_(rate)
            return high

        move_to_budget(move, measure, guess, 2 * CLOSED * SPREAD)

    # -- freezing ---------------------------------------------------------------------------------

    def select(self) -> dict[str, list[int]]:
        gates, modules = self.each(), layers_of(self.codec)
        found: dict[str, list[int]] = {}
        for group in self.groups.prunable():
            readers = [m for m in group.members if m.axis == "in"]
            pools = [
                m
                for m in group.members
                if m.axis == "both" and channel_kind(modules[m.module]).pools
            ]
            if (
                not readers
                or any(m.module not in gates for m in readers)
                or any(m.module not in self._pools for m in pools)
            ):
                continue
            rate = np.zeros(group.width)
            for member in readers:
                rate = np.maximum(
                    rate, gates[member.module].open_rate.cpu().numpy()[member.index].max(1)
                )
            step = min(group.step(self.config.round_to), group.width)
            count = max(int((rate > self.config.freeze).sum()), 1)
            count = min(-(-count // step) * step, group.width)
            if count < group.width:
                found[group.name] = sorted(np.argsort(-rate, kind="stable")[:count].tolist())
        return found

    def check_ready(self) -> None:
        if not self.done:
            raise TrainingError(
                f"channel gating is at step {int(self.step)} of {self.config.gating_steps}:"
                " thresholds are still learning; train on until gated.done, or attach with fewer"
                " gating_steps"
            )

    @torch.no_grad()
    def fold(self, codec: nn.Module) -> None:
        modules, meters = layers_of(codec), self._meters()
        for name, kept in self.select().items():
            gone = np.setdiff1d(np.arange(self.groups[name].width), kept)
            for member in self.groups[name].members:
                layer: Any = modules[member.module]
                channels = member.index[gone].ravel()
                if member.axis == "out":
                    zero(layer, "out", channels.tolist())
                elif (kind := channel_kind(layer)).pools:
                    gamma, _ = kind.pool_weights(layer)
                    index = torch.from_numpy(channels).to(gamma.device)
                    added = gamma[:, index] @ meters[member.module].value.to(gamma)[index]
                    kind.add_to_pool(layer, added)
                elif member.axis == "both":
                    zero(layer, "both", channels.tolist())

    @torch.no_grad()
    def on_rescale(self, layer: str, side: str, factor: Tensor) -> None:
        if side == "in" and layer in self.each():
            self.each()[layer].gain.mul_(factor.to(self.each()[layer].gain))

    def transfer_to(self, other: Method, keep: Mapping[str, Sequence[int]]) -> None:
        assert isinstance(other, ChannelGating)
        for name, gate in self.each().items():
            kept = torch.from_numpy(kept_channels(self.groups, keep, name, "in", gate.channels))
            target = other.each()[name]
            target.rest = gate.rest.clone()
            _take(gate, target, kept)
            # A channel that a mask had made zero counted as silent, and does so where it is gone.
            heard = kept_channels(self.groups, self._kept_by_others(), name, "in", gate.channels)
            silent = torch.ones(gate.channels, dtype=torch.bool)
            silent[torch.from_numpy(heard)] = False
            target.rest[gate.place[silent.to(gate.place.device)]] = SILENT
        for name, meter in self._meters().items():
            kept = torch.from_numpy(
                kept_channels(self.groups, keep, name, "both", len(meter.value))
            )
            _take(meter, other._meters()[name], kept)
        other.step.copy_(self.step)
        other.rho.copy_(self.rho)
        other.sampled.copy_(self.sampled)
        other.frozen.fill_(True)
        other._fix_thresholds()


def _counted_in(transform: str) -> list[str]:
    """Return the costs that the MACs of a layer of this transform are part of."""
    runs = {"encoder": transform != "g_s", "decoder": transform in ("g_s", "h_s")}
    return ["macs", *(side for side in SIDES if runs[side])]


def _share(gates: Sequence[Gate]) -> None:
    """Replace the running means of gates by their mean over processes, which must move alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        means = [mean for gate in gates for mean in (gate.importance, gate.open_rate, gate.scale)]
        together = torch.cat(means)
        torch.distributed.all_reduce(together)
        together /= torch.distributed.get_world_size()
        for mean, shared in zip(means, together.split([len(m) for m in means]), strict=True):
            mean.copy_(shared)


def _take(source: nn.Module, target: nn.Module, kept: Tensor) -> None:
    """Copy state; of tensors with a value per channel only the kept ones."""
    own = target.state_dict()
    for name, value in source.state_dict().items():
        whole = not value.dim() or name in ("mix", "rest")
        own[name].copy_(value if whole else value[kept.to(value.device)])
