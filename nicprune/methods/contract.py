"""The roles of methods, each with the members that it needs and no others.

A new method is a file below this folder with a class decorated by `@METHODS.register("name")`, and
a recipe. Another package names its file by an entry point of the group `nicprune.methods`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nicprune.channels.groups import Groups
from nicprune.codecs.roles import on_side
from nicprune.common.config import StrictConfig, parse
from nicprune.common.registry import Registry
from nicprune.data.clip_patches import ClipSampling
from nicprune.methods.levels import Levels
from nicprune.methods.operating_point import Choice
from nicprune.methods.widths import Widths
from nicprune.pruning.cost import CostModel
from nicprune.pruning.target import Target, resolve_split
from nicprune.pruning.totals import Totals


class Method(nn.Module):
    """One sparsity technique. Every hook does nothing by default, so methods compose in a list.

    Learnt state is held in parameters and buffers of this module, so that `state_dict`,
    `.to(device)` and DDP handle it.

    Attributes:
        name: its name in recipes.
        summary: one line for listings.
        Config: its settings; unknown keys are refused.
        steps_field: the setting that holds the number of training steps it needs; a recipe fills in
            its own.
        rates_field: the setting that holds the lambdas of several rates; a recipe fills in its own.
        exclusive: roles (class names) and methods that cannot be attached beside it, each with the
            reason.
        goes_with: roles and methods that can, though `exclusive` names a wider role.
        attach_last: whether its hooks must be set after those of the others, as they hand layers
            fewer channels.
        fold_order: methods are folded into the weights in increasing order.
        for_training_only: whether it only helps to train, and leaves nothing on the codec.
        covers_all_rates: whether one codec with it serves all qualities of a recipe.
        codes_frames: whether it is for the frames of a video, which a recipe does not measure.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    Config: ClassVar[type[StrictConfig]] = StrictConfig
    steps_field: ClassVar[str] = ""
    rates_field: ClassVar[str] = ""
    exclusive: ClassVar[Mapping[str, str]] = {}
    goes_with: ClassVar[frozenset[str]] = frozenset()
    attach_last: ClassVar[bool] = False
    fold_order: ClassVar[int] = 0
    for_training_only: ClassVar[bool] = False
    covers_all_rates: ClassVar[bool] = False
    codes_frames: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        misplaced = {"select", "fold", "weight_factors", "check_ready"} & set(vars(cls))
        if misplaced and all(base.__name__ != "Pruner" for base in cls.__mro__):
            raise TypeError(
                f"{cls.__name__} defines {', '.join(sorted(misplaced))}, which only a Pruner is"
                " asked for: derive from Pruner"
            )

    def __init__(self, codec: nn.Module, groups: Groups, cost: CostModel, config: StrictConfig):
        super().__init__()
        self.config = config
        # Through a tuple, so that the codec does not become a sub-module of its own method.
        self._shared = (codec, groups, cost)
        self.validate()

    @property
    def codec(self) -> Any:
        """The codec that the method was created for."""
        return self._shared[0]

    @property
    def groups(self) -> Groups:
        """The codec's channel groups."""
        return self._shared[1]

    @property
    def cost(self) -> CostModel:
        """The codec's cost."""
        return self._shared[2]

    @classmethod
    def settings_beside(
        cls, own: Mapping[str, Any], other: str, settings: Mapping[str, Any], where: str
    ) -> Mapping[str, Any]:
        """Return the settings of another method beside this one as its `Config` takes them.

        Args:
            own: the settings of this one.
            other: name of the other method.
            where: source of the settings, for messages.

        Raises:
            RecipeError: it cannot have them beside this one.
        """
        return settings

    def validate(self) -> None:
        """Refuse a configuration that this codec cannot follow, before anything is changed."""

    def set_beside(self, methods: Sequence[Method]) -> None:
        """Take note of all methods of a codec, this one among them; called before `attach`.

        Raises:
            RecipeError: it cannot do its part beside them.
        """

    def trains(self, name: str) -> bool:
        """Return whether a parameter of the codec, given by name, is trained."""
        return on_side(self.codec, name, getattr(self.config, "side", None))

    def set_objective(self, lmbda: float, metric: str) -> None:
        """Take what `fit` weighs the distortion by, and its metric, before the first step. A loop
        of one's own may call it; without it, both are the codec's own.

        Raises:
            RecipeError: the method cannot learn by them.
        """

    def attach(self, codec: nn.Module) -> None:
        """Set hooks on the codec. They must leave its forward pass exactly as it is."""

    def detach(self, codec: nn.Module) -> None:
        """Remove every hook of this method from the codec."""

    def loss(self, out: Mapping[str, Any], x: Tensor) -> Tensor:
        """Return extra terms of the loss, a scalar."""
        return x.new_zeros(())

    def after_step(self) -> None:
        """Update what is learnt; called after every `optimizer.step()`."""

    def prepare(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        """Examine some images, (1, 3, H, W) each, before training starts."""
        if isinstance(self.config, Target):
            self.config = resolve_split(
                self.config,
                self.codec,
                self.groups,
                self.cost,
                images,
                getattr(self.config, "lmbda", None),
            )

    @property
    def examines_images(self) -> bool:
        """True if `prepare` looks at its images: the budget's split is searched, or the method has
        a `prepare` of its own.
        """
        budget = self.config.budget if isinstance(self.config, Target) else None
        searched = budget is not None and budget.split == "auto"
        return searched or type(self).prepare is not Method.prepare

    @property
    def done(self) -> bool:
        """True once it has learnt all it needs."""
        return True

    @property
    def steps_left(self) -> int:
        """Training steps until it is done."""
        return 0

    @property
    def own_lambdas(self) -> bool:
        """True if the codec is trained by lambdas of this method, not by that of `fit`."""
        return False

    def metrics(self) -> dict[str, float]:
        """Return numbers for the progress line and metrics.jsonl."""
        return {}

    def manually_updated(self) -> list[nn.Parameter]:
        """Return parameters that `after_step` updates, not the optimiser."""
        return []

    def fixed(self) -> list[nn.Parameter]:
        """Return parameters of its own whose training is over, though the method's may go on: no
        optimiser moves them, by momentum or weight decay.
        """
        return []

    @classmethod
    def stays_with(cls, config: Any) -> bool:
        """Return whether it remains on the codec after `harden` with these settings, as a
        `CodecPart`, and is saved with it.
        """
        return False

    @property
    def stays(self) -> bool:
        """True if it remains on the codec after `harden`."""
        return self.stays_with(self.config)

    @classmethod
    def one_shot(cls) -> bool:
        """Return whether it prunes a codec without training."""
        return issubclass(cls.Config, Target) and not cls.steps_field


class Pruner(Method):
    """A method that decides which channels `harden` keeps, or writes into the weights there."""

    def select(self) -> dict[str, list[int]]:
        """Return the keep-lists decided so far, by group; groups not named keep everything."""
        raise NotImplementedError(f"{type(self).__name__} does not say what to keep: define select")

    def shrinks(self) -> set[str]:
        """Return the names of the groups whose width its budget, or its widths, decide: no two
        methods can decide the same.
        """
        if not isinstance(self.config, Target):
            return set()
        return {group.name for group in self.config.free(self.groups)}

    def fold(self, codec: nn.Module) -> None:
        """Write what was learnt into the weights of `codec` (a copy without hooks), in place."""

    def check_ready(self) -> None:
        """Raise TrainingError if the decision is not made yet."""

    def weight_factors(self, codec: nn.Module) -> dict[tuple[str, str], Tensor]:
        """Return the factors that `fold` multiplies weights by, shape (C,), by module name and
        side, "in" or "out".
        """
        return {}


class CodecPart(Pruner):
    """A method that remains on the codec when it codes: gates, modulators, widths, encoders.

    Attributes:
        needed_for_decoding: whether decoding depends on it.
        folds_where_it_stays: whether `harden` folds it into the weights also where it stays.
        cdf_source_hash: hash of the weights of its own entropy bottlenecks that their CDF tables
            were made from, if it has any.
    """

    needed_for_decoding: ClassVar[bool] = True
    folds_where_it_stays: ClassVar[bool] = True
    cdf_source_hash: str = ""

    def choice(self) -> Choice | None:
        """Return the dimension of operating points that it adds, if any."""
        return None

    def select(self) -> dict[str, list[int]]:
        return {}

    def config_after_pruning(self) -> dict[str, Any]:
        """Return the settings with which it is attached again after `harden`."""
        return self.config.model_dump()

    def transfer_to(self, other: Method, keep: Mapping[str, Sequence[int]]) -> None:
        """Copy what was learnt to `other`, the same method on the codec pruned to these
        keep-lists.
        """

    def on_rescale(self, layer: str, side: str, factor: Tensor) -> None:
        """Called after another method has folded a per-channel factor, shape (C,), into a layer's
        input or output.
        """

    def by_transform(self) -> dict[str, tuple[int, int]]:
        """Return (MACs at 64x64, params) of each transform at the operating point that is set."""
        return self.cost.by_transform()

    def totals(self) -> Totals | None:
        """Return the cost at the operating point that is set; None if it is that of the layers."""
        return None

    def aux_loss(self) -> Tensor | None:
        """Return the auxiliary loss of entropy bottlenecks of its own."""
        return None

    def update(self, force: bool = False) -> None:
        """Update CDF tables of its own."""

    def active(self, codec: nn.Module) -> AbstractContextManager[None]:
        """Make the codec compute at the operating point that is set, inside the block: also in
        `compress` and `decompress`, which call its layers one by one.
        """
        return nullcontext()

    def lmbda_at(self, value: Any) -> float | None:
        """Return the lambda that a value of its choice was trained with, where it has its own."""
        return None

    def bare(self, value: Any) -> bool:
        """Return whether, at a value of its choice, the codec is what it is without the method."""
        return False


class RateModulator(CodecPart):
    """A method that makes one codec code at many rates.

    Attributes:
        levels: the rates, and which is set.
    """

    exclusive = {
        "RateModulator": "a codec has one modulator",
        "Distiller": "a teacher codes at one rate, a modulator at many: leave one of them out",
    }
    rates_field = "lambdas"
    fold_order = -1  # its bias first: a mask takes it away from the channels that go
    folds_where_it_stays = False
    covers_all_rates = True
    levels: Levels

    @property
    def own_lambdas(self) -> bool:
        return True

    def choice(self) -> Levels:
        return self.levels

    def lmbda_at(self, value: float) -> float:
        return float(self.levels.lmbda(torch.tensor(value)))

    def objective(self, out: Mapping[str, Any], x: Tensor, metric: str) -> dict[str, Tensor] | None:
        """Return the rate-distortion loss that replaces the training loop's own, with its parts as
        CompressAI names them; None to keep the loop's.
        """
        return None


class Temporal(CodecPart):
    """A method that codes frames of a video, each given the one before, and learns from clips."""

    codes_frames = True
    exclusive = {
        "Temporal": "a codec has one temporal model",
        "RateModulator": "frames are coded at one rate: harden the codec at one first",
        "Gating": "gates decide by image, and their decision is no part of a P frame: harden first",
        "Distiller": "distillation learns from images: distil the image codec first",
    }

    @property
    def sampling(self) -> ClipSampling:
        """The frames of a training clip."""
        raise NotImplementedError

    @property
    def trains_codec(self) -> bool:
        """True if the codec is trained along; otherwise nothing is but this method."""
        return False

    def forward_clips(self, codec: nn.Module, clips: Tensor) -> dict[str, Any]:
        """Run clips, (B, T, 3, H, W) in [0, 1]: an I frame, then P frames. Return {"likelihoods"},
        and, where the codec is trained along, {"x_hat"} of all frames, (B * T, 3, H, W).
        """
        raise NotImplementedError

    def objective(self, out: Mapping[str, Any], x: Tensor) -> dict[str, Tensor] | None:
        """Return the loss where it is not that of the training loop over all frames x,
        (B * T, 3, H, W): {"loss", "bpp_loss"}.
        """
        return None

    def frozen(self) -> list[nn.Parameter]:
        """Return parameters of other methods on the codec that are not trained."""
        return []


class MultiWidth(CodecPart):
    """A method with several widths of one codec, or several encoders, one of which is set.

    Attributes:
        widths: the widths, and which is set.
        extracting: the width that `extract` is taking out, if any.
        replay: fraction of each training batch that is of source images.
    """

    exclusive = {
        "Method": "it goes alone: harden the others first, or attach them to one of its widths"
        " (extract)"
    }
    widths: Widths | None
    extracting: int | None = None
    replay: float = 0.0

    def choice(self) -> Widths | None:
        return self.widths

    def default_in_training(self) -> dict[str, Any]:
        """Return the operating point, as keywords, of a training pass that asks for none."""
        return {}

    @property
    def stays(self) -> bool:
        return self.extracting is None and super().stays

    def prunable(self) -> tuple[nn.Module, Groups, CostModel] | None:
        """Return what pruners beside it prune in place of the codec: layers of its own, their
        channel groups, and the cost by these; None if it has none.
        """
        return None

    def share_at(self, width: int) -> float:
        """Return a width as a fraction of the widest."""
        raise NotImplementedError

    def keep_at(self, width: int) -> dict[str, list[int]]:
        """Return the keep-lists of a width."""
        raise NotImplementedError

    def widths_per_step(self) -> list[int]:
        """Return the widths that one step trains, in order; none for the codec as it is set."""
        return []

    @property
    def scheduled(self) -> bool:
        """True if a schedule of lambdas looks at validation images during training."""
        return False

    @property
    def wants_validation(self) -> bool:
        """True if this step needs figures of validation images."""
        return False

    def on_validation(self, figures: Sequence[tuple[float, float]]) -> None:
        """Take (bpp, PSNR) of each width on validation images."""

    def lambda_history(self) -> list[Any]:
        """Return the steps of a schedule of lambdas, for reports."""
        return []

    def finalize(self, small: nn.Module) -> None:
        """Write into a hardened codec what neither weights nor keep-lists hold."""

    def objective(self, out: Mapping[str, Any], x: Tensor, metric: str) -> dict[str, Tensor] | None:
        """Return the rate-distortion loss that replaces the training loop's own, with its parts as
        CompressAI names them; None to keep the loop's.
        """
        return None


class Gating(CodecPart):
    """A method whose cost depends on the image."""

    def calibrate(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        """Adjust to whole images, (1, 3, H, W) each, what was learnt on patches."""

    def image_cost(self) -> tuple[dict[str, float], dict[str, float]] | None:
        """Return the cost of the last image: "macs", "encoder", "decoder" at 64x64, and MACs by
        transform; None if it is the same for all.
        """
        return None


class Taught(Method):
    """A method that learns from another codec."""

    def set_teacher(self, teacher: nn.Module) -> None:
        """Take a codec as the teacher, a copy of its own; called before `attach`."""


class Distiller(Taught):
    """A method that only helps to train, by a teacher's example; it can go on after `harden`."""

    for_training_only = True


@dataclass(frozen=True)
class Roles:
    """The methods on one codec by role, in order of attachment."""

    pruners: list[Pruner]
    parts: list[CodecPart]
    modulator: RateModulator | None
    multi_width: MultiWidth | None
    temporal: Temporal | None
    gating: list[Gating]
    taught: list[Taught]

    @classmethod
    def of(cls, methods: Sequence[Method]) -> Roles:
        """Sort methods by role; done once, when they are attached."""
        return cls(
            pruners=[m for m in methods if isinstance(m, Pruner)],
            parts=[m for m in methods if isinstance(m, CodecPart)],
            modulator=next((m for m in methods if isinstance(m, RateModulator)), None),
            multi_width=next((m for m in methods if isinstance(m, MultiWidth)), None),
            temporal=next((m for m in methods if isinstance(m, Temporal)), None),
            gating=[m for m in methods if isinstance(m, Gating)],
            taught=[m for m in methods if isinstance(m, Taught)],
        )


METHODS: Registry[type[Method]] = Registry("method", Method)


def parse_settings(
    name: str,
    settings: Mapping[str, Any],
    where: str,
    stack: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> Any:
    """Return the settings of a method, validated.

    Args:
        where: source of the settings, for messages.
        stack: all methods that are attached together, with their settings.

    Raises:
        RecipeError: a setting is unknown or out of range, alone or beside the others.
    """
    for other, own in stack:
        if other != name and other in METHODS:
            settings = METHODS[other].settings_beside(own, name, settings, where)
    return parse(METHODS[name].Config, settings, where)
