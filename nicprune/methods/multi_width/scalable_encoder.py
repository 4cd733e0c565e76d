"""A scalable encoder: several small encoders in place of the large one, each of which learns the
residual of those before it (Wang et al., "EVC: Towards Real-Time Neural Image Compression with Mask
Decay", ICLR 2023, residual representation learning; the authors' scalable_encoder_model.py).

Decoder, hyperprior and entropy models stay as they are: the original decoder reads the bitstream of
every level. With encoders e_0 ... e_K-1, level i computes the latents

    average (EVC's):  y_i = (e_0(x) + ... + e_i(x)) / (i + 1)
    sum:              y_i = e_0(x) + ... + e_i(x)

where the gradient of level i reaches e_i alone. Each encoder is the large one pruned to the given
size by mask decay, one after the other: e_i learns the residual of e_0 ... e_i-1, which are fixed
by then, under the rate-distortion loss plus

    pull * |y_i - y_teacher|^2        (summed over channels, per pixel; the quantiser's step is 1).

The authors' training loss is not public; the pull and the form `sum` are not theirs. After
`harden`, each step fine-tunes all levels. At the best level, every level is tried for each image,
decoder included, and the one of the least lambda * 255^2 * MSE + bpp is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nicprune.channels.groups import Groups, Norms
from nicprune.codecs.calling import further_arguments
from nicprune.codecs.hooks import NarrowHook, remove_hooks
from nicprune.codecs.layer_kinds.parameters import layers_of
from nicprune.codecs.layer_operations import resize, zero
from nicprune.codecs.modes import modes_restored
from nicprune.codecs.provenance import provenance
from nicprune.codecs.roles import roles_of, transform_in
from nicprune.codecs.standing_in import Given, can_stand_in, standing_in
from nicprune.codecs.zoo import LAMBDAS, lmbda_of
from nicprune.common.config import StrictConfig, parse
from nicprune.common.errors import CodecError, RecipeError, TrainingError
from nicprune.methods.contract import METHODS, Method, MultiWidth, Taught
from nicprune.methods.widths import Widths
from nicprune.pruning.budget import ROUND_TO
from nicprune.pruning.cost import CostModel
from nicprune.pruning.surgery import prune
from nicprune.pruning.totals import Totals
from nicprune.pruning.views import override_attributes

DECAYING = 0.6
"""Share of a stage's steps in which masks decay; in the rest, what is left learns."""


class ScalableEncoderConfig(StrictConfig):
    """Settings of a scalable encoder; exactly one of `share` and `widths`.

    Attributes:
        encoders: number of small encoders.
        share: MACs of each, as a fraction of g_a's.
        widths: or the width of each of its channel groups, by name or pattern ("g_a.*": 16).
        round_to: widths derived from `share` are multiples of this.
        form: "sum" or "average" of the encoders' latents. A sum starts from the level before.
        residual: whether each learns the residual of those before it; without, each learns to be an
            encoder on its own.
        pull: weight of the distance from the teacher's latents, in bits per squared quantisation
            step.
        decay_steps: training steps of all stages together, divided equally among the encoders.
        lmbda: lambda by which the best level is chosen; that of the codec's quality if not given.
        norms: whether channels that a norm computes over are "pinned", or may go ("adapt"), as for
            pruning.
        made: whether the encoders are small already (set by `harden`).
    """

    encoders: int = Field(default=4, ge=2, le=16)
    share: float | None = Field(default=None, gt=0, lt=1)
    widths: dict[str, int] | None = None
    round_to: int = Field(default=ROUND_TO, ge=1, le=64)
    form: Literal["average", "sum"] = "sum"
    residual: bool = True
    pull: float = Field(default=1.0, ge=0)
    decay_steps: int = Field(default=10_000, ge=8)
    lmbda: float | None = Field(default=None, gt=0)
    norms: Norms = "pinned"
    made: bool = False

    @model_validator(mode="after")
    def _one(self) -> ScalableEncoderConfig:
        if (self.share is None) == (self.widths is None):
            raise ValueError("give either share: 0.125, of g_a's MACs, or widths: {'g_a.*': 16}")
        if self.form == "sum" and not self.residual:
            raise ValueError(
                "residual: false trains each encoder alone, and form: sum would add up what are"
                " whole latents each: give form: average"
            )
        if self.decay_steps < 4 * self.encoders:
            raise ValueError(
                f"decay_steps are for all {self.encoders} encoders: at least {4 * self.encoders}"
                f" (got {self.decay_steps})"
            )
        return self


class EncoderLevels(Widths):
    """The levels of a scalable encoder: 0 the first encoder alone, the last one the best of all for
    each image, None the large encoder. The bitstream is the same for all.
    """

    field = "effort"
    keywords = ("level", "width")
    word = "level"
    in_bitstream = False

    def __init__(self, encoders: int, made: bool):
        super().__init__(encoders + 1, [])
        self.now = encoders - 1 if made else None

    @property
    def best(self) -> int:
        """The number that stands for the best level of each image."""
        return self.count - 1

    def resolve(self, width: Any = None, level: Any = None) -> int | None:
        if level is not None and width is not None:
            raise RecipeError(
                f"a scalable encoder's widths are its levels: give one of them (got level {level},"
                f" width {width})"
            )
        asked = width if level is None else level
        if asked == "best":
            return self.best
        return super().resolve(
            int(asked) if isinstance(asked, float) and asked.is_integer() else asked
        )

    def describe(self) -> str:
        return f"0 to {self.best - 1}, or best"

    def name(self, value: int) -> str:
        return "best level" if value == self.best else f"level {value}"


class Standing(nn.Module):
    """Take the place of a codec's g_a, with a given function."""

    def __init__(self, made: Callable[[Tensor], Tensor]):
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        """Return the latents, (B, M, H / 16, W / 16), of images (B, 3, H, W)."""
        return self.made(x)


@METHODS.register("scalable_encoder")
class ScalableEncoder(MultiWidth, Taught):
    """Small encoders whose outputs add up; the rest of the codec does not change."""

    name = "scalable_encoder"
    summary = (
        "small encoders that add up (EVC's residual learning): encoding effort by level, the"
        " decoder unchanged"
    )
    steps_field = "decay_steps"
    Config = ScalableEncoderConfig
    config: ScalableEncoderConfig
    needed_for_decoding = False
    widths: EncoderLevels
    step: Tensor

    def __init__(self, *args: Any):
        super().__init__(*args)
        codec: Any = self.codec
        count, made = self.config.encoders, self.config.made
        self.widths = EncoderLevels(count, made)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.encoders = nn.ModuleList(
            copy.deepcopy(self._analysis_of(codec)) for _ in range(count - made)
        )
        self.decays = (
            nn.ModuleList() if made else nn.ModuleList(self._decay(i) for i in range(count))
        )
        self._teacher: tuple[nn.Module, ...] = (
            () if made else (copy.deepcopy(self._analysis_of(codec)).requires_grad_(False).eval(),)
        )
        self._y: Tensor | None = None
        self._macs: list[tuple[int, int]] = []

    def validate(self) -> None:
        name, roles = type(self.codec).__name__, roles_of(self.codec)
        if roles.analysis is None:
            raise CodecError(f"a scalable encoder stands in for the analysis, and {roles.reason}")
        if not can_stand_in(self.codec, roles.analysis):
            raise CodecError(
                f"a scalable encoder stands in for the analysis, which is not one module of {name}"
                f" that is given the image alone: it ends in {self._path}"
            )

    @property
    def _path(self) -> str:
        """Name of the module that is the analysis."""
        found = roles_of(self.codec).analysis
        assert found is not None  # validated
        return found.module

    def _analysis_of(self, codec: nn.Module) -> nn.Module:
        return codec.get_submodule(self._path)

    def _decay(self, i: int) -> Method:
        """Return the mask decay of one encoder."""
        steps = max(2, int(DECAYING * self._stage_steps))
        target: dict[str, Any] = {
            "decay_steps": steps,
            "round_to": self.config.round_to,
            "side": "encoder",
            "norms": self.config.norms,
        }
        if self.config.share is not None:
            analysis = self.cost.by_transform()["g_a"][0]
            left = self.cost.totals().encoder - (1 - self.config.share) * analysis
            target["budget"] = {"encoder": left / self.cost.original.encoder}
            target["only"] = [f"{self._path}*"]
        else:
            target["widths"] = self.config.widths
        holder = self._codec_with_encoder(i)
        return METHODS["mask_decay"](
            holder,
            self.groups,
            self.cost,
            parse(METHODS["mask_decay"].Config, target, "method 'scalable_encoder'"),
        )

    def _codec_with_encoder(self, i: int) -> Any:
        """Return the codec with one of the encoders as its g_a; all else is the codec's own."""
        holder = node = copy.copy(self.codec)
        *before, last = self._path.split(".")
        for part in before:
            inner: Any = copy.copy(node._modules[part])
            node.__dict__["_modules"] = {**node._modules, part: inner}
            node = inner
        node.__dict__["_modules"] = {**node._modules, last: self._encoder(i)}
        return holder

    def _encoder(self, i: int) -> nn.Module:
        if self.config.made:
            before, _, last = self._path.rpartition(".")
            first: Any = self.codec.get_submodule(before)._modules[last]
            return first if i == 0 else self.encoders[i - 1]
        return self.encoders[i]

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        for i, encoder in enumerate(self.encoders):  # small ones need not be as wide as each other
            start = f"{prefix}encoders.{i}."
            resize(
                encoder,
                {
                    key.removeprefix(start): value
                    for key, value in state.items()
                    if key.startswith(start)
                },
            )
        self._macs.clear()
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[arg-type]

    # -- computing at a level ---------------------------------------------------------------------

    @contextmanager
    def active(self, codec: nn.Module) -> Iterator[None]:
        """Replace g_a by the encoders up to the level that is set, inside the block."""
        level = self.widths.now
        if level is None:
            yield
            return
        made = self._best(codec) if level == self.widths.best else self._at(level)
        with override_attributes([standing_in(codec, self._path, Standing(made))]):
            yield

    def _at(self, level: int) -> Callable[[Tensor], Tensor]:
        def latents(x: Tensor) -> Tensor:
            alone = self.training and not self.config.residual
            fixed = [] if alone else [self._encoder(j) for j in range(level)]
            with torch.no_grad(), modes_restored(*fixed):
                before = [encoder.eval()(x) for encoder in fixed]
            found = self._join([*before, self._encoder(level)(x)])
            self._y = found if self.training else None
            return found

        return latents

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        total = torch.stack(list(parts)).sum(0) if len(parts) > 1 else parts[0]
        return total / len(parts) if self.config.form == "average" else total

    def _best(self, codec: Any) -> Callable[[Tensor], Tensor]:
        def latents(x: Tensor) -> Tensor:
            parts, tried, costs = [], [], []
            for i in range(self.config.encoders):
                parts.append(self._encoder(i)(x))
                tried.append(self._join(parts))
                with override_attributes([standing_in(codec, self._path, Given(tried[-1]))]):
                    out = codec.forward(x, **further_arguments(codec, x, "forward"))
                bits = sum(-torch.log2(v).flatten(1).sum(1) for v in out["likelihoods"].values())
                mse = (out["x_hat"].clamp(0, 1) - x).square().flatten(1).mean(1)
                costs.append(self.lmbda * 255**2 * mse + bits / (x.shape[2] * x.shape[3]))
            chosen = torch.stack(costs).argmin(0)
            return torch.stack(tried)[chosen, torch.arange(len(x), device=x.device)]

        return latents

    @property
    def lmbda(self) -> float:
        """Lambda by which the best level is chosen."""
        codec = self.codec
        # Levels are compared by squared error, which lambdas for MS-SSIM do not weigh.
        return (
            lmbda_of(codec, self.config.lmbda)
            if provenance(codec).metric == "mse"
            else self.config.lmbda or LAMBDAS["mse"][2]
        )

    def attach(self, codec: nn.Module) -> None:
        hook = NarrowHook(self)
        codec.register_forward_pre_hook(hook.before)
        codec.register_forward_hook(hook, always_call=True)
        for i, decay in enumerate(self._decays()):
            decay.attach(self._codec_with_encoder(i))

    def detach(self, codec: nn.Module) -> None:
        remove_hooks(codec, lambda hook: hook.owner is self)
        for i, decay in enumerate(self._decays()):
            decay.detach(self._codec_with_encoder(i))

    def _decays(self) -> list[Any]:
        return list(self.decays)

    @classmethod
    def stays_with(cls, config: Any) -> bool:
        return True

    def totals(self) -> Totals:
        now, level = self.cost.totals(), self.widths.now
        if level is None:
            return now
        costs = self._costs()
        every = level == self.widths.best
        macs = (
            sum(m for m, _ in (costs if every else costs[: level + 1]))
            - self.cost.by_transform()["g_a"][0]
        )
        params = sum(p for _, p in costs) - self.cost.by_transform()["g_a"][1]
        if every:  # what comes behind the encoder is run once more for each trial
            macs += len(costs) * sum(
                m for name, (m, _) in self.cost.by_transform().items() if name != "g_a"
            )
        return Totals(now.macs + macs, now.encoder + macs, now.decoder, now.params + params)

    def by_transform(self) -> dict[str, tuple[int, int]]:
        found, level = self.cost.by_transform(), self.widths.now
        if level is not None:
            costs = self._costs()[: level + 1]
            found["g_a"] = (sum(m for m, _ in costs), sum(p for _, p in costs))
        return found

    def _costs(self) -> list[tuple[int, int]]:
        """Return MACs at 64x64 and parameters of each encoder."""
        if not self._macs:
            self._macs = [
                CostModel(self._codec_with_encoder(i), Groups([])).by_transform()["g_a"]
                for i in range(self.config.encoders)
            ]
        return self._macs

    # -- learning ---------------------------------------------------------------------------------

    @property
    def _stage_steps(self) -> int:
        return self.config.decay_steps // self.config.encoders

    @property
    def stage(self) -> int:
        """Index of the encoder that is being trained."""
        return min(int(self.step) // self._stage_steps, self.config.encoders - 1)

    def set_teacher(self, teacher: nn.Module) -> None:
        """Take a codec's encoder as the teacher of encoders that are small already."""
        given: Any = teacher
        self._teacher = (self._analysis_of(given),)

    def trains(self, name: str) -> bool:
        return self.config.made and transform_in(self.codec, name) == "g_a"

    def manually_updated(self) -> list[nn.Parameter]:
        return [p for decay in self._decays() for p in decay.manually_updated()]

    def fixed(self) -> list[nn.Parameter]:
        if self.config.made:
            return []
        over = [*self.encoders[: self.stage], *self.decays[: self.stage]]
        return [p for module in over for p in module.parameters()]

    def widths_per_step(self) -> list[int]:
        if self.config.made:
            return list(range(self.config.encoders))
        return [self.stage]

    @torch.no_grad()
    def _silence(self, i: int) -> None:
        """Set the last layer of an encoder that is to be added to zero."""
        modules = layers_of(self._encoder(i))
        for group in self.groups:
            for member in group.members if group.latent == "y" else ():
                if member.axis == "out" and self.groups.transform(member.module) == "g_a":
                    zero(
                        modules[member.module.removeprefix(self._path).lstrip(".")],
                        "out",
                        member.index.ravel().tolist(),
                    )

    def loss(self, out: Mapping[str, Any], x: Tensor) -> Tensor:
        mine, self._y = self._y, None
        if not self.config.pull or mine is None or self.widths.now in (None, self.widths.best):
            return x.new_zeros(())
        if not self._teacher:
            raise TrainingError(
                "the large encoder that the small ones learn from is not in their file:"
                " attached.set_teacher(codec) first"
            )
        teacher = self._teacher[0]
        if next(teacher.parameters()).device != x.device:
            teacher.to(x.device)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            target = teacher(x)
        return (
            self.config.pull
            * (mine.float() - target).square().sum()
            / (x.shape[0] * x.shape[2] * x.shape[3])
        )

    def after_step(self) -> None:
        if not self.done and not self.config.made:
            self._decays()[self.stage].after_step()
            before = self.stage
            self.step += 1
            if self.stage > before and self.config.form == "sum":
                self._silence(self.stage)

    @property
    def steps_left(self) -> int:
        return (
            0
            if self.config.made
            else max(0, self._stage_steps * self.config.encoders - int(self.step))
        )

    @property
    def done(self) -> bool:
        return self.steps_left == 0

    def metrics(self) -> dict[str, float]:
        return (
            {}
            if self.config.made
            else {"encoder": float(self.stage), **self._decays()[self.stage].metrics()}
        )

    # -- small encoders ---------------------------------------------------------------------------

    def check_ready(self) -> None:
        if not self.done:
            raise TrainingError(
                f"encoder {self.stage} of {self.config.encoders} still learns: {self.steps_left}"
                " steps are left"
            )

    def select(self) -> dict[str, list[int]]:
        return {} if self.config.made else self._decays()[0].select()

    def fold(self, codec: Any) -> None:
        if self.config.made:
            return
        for i, decay in enumerate(self._decays()):
            decay.fold(self._codec_with_encoder(i))
        before, _, last = self._path.rpartition(".")
        setattr(codec.get_submodule(before), last, self.encoders[0])

    def config_after_pruning(self) -> dict[str, Any]:
        return {**self.config.model_dump(), "made": True}

    def transfer_to(self, other: Method, keep: Mapping[str, Sequence[int]]) -> None:
        assert isinstance(other, ScalableEncoder)
        for i in range(1, self.config.encoders):
            small: Any = (
                self._codec_with_encoder(i)
                if self.config.made
                else prune(self._codec_with_encoder(i), self._decays()[i].select(), self.groups)
            )
            other.encoders[i - 1] = copy.deepcopy(self._analysis_of(small))
        other._teacher = self._teacher
        other.step.copy_(self.step)
