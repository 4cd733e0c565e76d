"""What a method is: roles, each with the members that it needs and no others.

A new one is a file below this folder with a class decorated by `@METHODS.register("name")`, and a
recipe. A package of its own names its file by an entry point of the group `nicprune.methods`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from nicprune.channels.groups import Groups
from nicprune.codecs.anatomy import on_side
from nicprune.common.config import StrictConfig
from nicprune.common.registry import Registry
from nicprune.methods.levels import Levels, Widths
from nicprune.pruning.cost import CostModel, Totals
from nicprune.pruning.target import Target, resolve_split


class Method(nn.Module):
    """One sparsity technique. Every hook does nothing by default, so methods compose in a list.

    Learnt state is parameters and buffers of this module, so `state_dict`, `.to(device)` and DDP
    know it.

    Attributes:
        name: what recipes call it.
        summary: one line for listings.
        Config: its settings; unknown keys are refused.
        steps_field: the setting that says for how many steps it learns; a recipe fills in its own
            length.
        alone: whether nothing else can be attached beside it.
        narrows: whether its hooks hand layers fewer channels; they come last then.
        modulates, slims, teaches: what the roles below declare.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    Config: ClassVar[type[StrictConfig]] = StrictConfig
    steps_field: ClassVar[str] = ""
    alone: ClassVar[bool] = False
    narrows: ClassVar[bool] = False
    modulates: ClassVar[bool] = False
    slims: ClassVar[bool] = False
    teaches: ClassVar[bool] = False

    def __init__(self, codec: nn.Module, groups: Groups, cost: CostModel, config: StrictConfig):
        super().__init__()
        self.config = config
        # Through a tuple, so that the codec does not become a sub-module of its own method.
        self._shared = (codec, groups, cost)
        self.validate()

    @property
    def codec(self) -> Any:
        """The codec that the method is made for."""
        return self._shared[0]

    @property
    def groups(self) -> Groups:
        """The codec's channel groups."""
        return self._shared[1]

    @property
    def cost(self) -> CostModel:
        """The codec's cost."""
        return self._shared[2]

    def validate(self) -> None:
        """Refuse a configuration that this codec cannot follow, before anything is changed."""

    def trains(self, name: str) -> bool:
        """Whether a parameter of the codec, by name, is to be trained."""
        return on_side(name, getattr(self.config, "side", None))

    def attach(self, codec: nn.Module) -> None:
        """Put hooks on the codec. The forward pass must stay the same, exactly."""

    def detach(self, codec: nn.Module) -> None:
        """Take every hook of this method off the codec again."""

    def loss(self, out: Mapping[str, Any], x: Tensor) -> Tensor:
        """Extra terms of the loss, a scalar."""
        return x.new_zeros(())

    def after_step(self) -> None:
        """Called behind every `optimizer.step()`."""

    def prepare(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        """Look at some photographs, (1, 3, H, W) each, before training starts."""
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
    def done(self) -> bool:
        """Whether the method has nothing left to learn."""
        return True

    @property
    def steps_left(self) -> int:
        """How many more steps it needs until it is done."""
        return 0

    def metrics(self) -> dict[str, float]:
        """Numbers for the progress line and metrics.jsonl."""
        return {}

    def manually_updated(self) -> list[nn.Parameter]:
        """Parameters that `after_step` moves by itself; the optimiser leaves them alone."""
        return []

    @classmethod
    def stays_with(cls, config: Any) -> bool:
        """Whether it remains on the codec behind `harden` with these settings, and is saved with
        it: whether it is a `CodecPart` there.
        """
        return False

    @property
    def stays(self) -> bool:
        """Whether it remains on the codec behind `harden`."""
        return self.stays_with(self.config)


class Pruner(Method):
    """A method that has a say in what `harden` does: which channels stay, what goes into the
    weights.
    """

    def select(self) -> dict[str, list[int]]:
        """The keep-lists decided so far, by group; groups not named keep everything."""
        return {}

    def fold(self, codec: nn.Module) -> None:
        """Write what was learnt into the weights of `codec` (a copy without hooks), in place."""

    def check_ready(self) -> None:
        """Raise if the decision is not made yet."""

    def weight_factors(self, codec: nn.Module) -> dict[tuple[str, str], Tensor]:
        """What `fold` moves into weights: factors of shape (C,) by module name and side, "in" or
        "out".
        """
        return {}


class CodecPart(Pruner):
    """A method that remains on the codec when it codes: gates, modulators, widths, encoders.

    Attributes:
        needed_for_decoding: whether decoding depends on it.
        tables: hash of its own entropy bottlenecks that their CDF tables were made from, if it has
            any.
    """

    needed_for_decoding: ClassVar[bool] = True
    tables: str = ""

    def config_after_pruning(self) -> dict[str, Any]:
        """The settings with which it is attached again behind `harden`."""
        return self.config.model_dump()

    def transfer_to(self, other: Method, keep: Mapping[str, Sequence[int]]) -> None:
        """Hand what was learnt to `other`, the same method on the codec pruned to these
        keep-lists.
        """

    def on_rescale(self, layer: str, side: str, factor: Tensor) -> None:
        """Learn that another method's factor at a layer's input or output is in the weights from
        now on.
        """

    def by_transform(self) -> dict[str, tuple[int, int]]:
        """(MACs at 64x64, params) of each transform, as the codec is set now."""
        return self.cost.by_transform()

    def totals(self) -> Totals | None:
        """What the codec costs as it is set now; None if it costs what its layers say."""
        return None

    def aux_loss(self) -> Tensor | None:
        """The auxiliary loss of entropy bottlenecks of its own."""
        return None

    def update(self, force: bool = False) -> None:
        """Update CDF tables of its own."""

    def narrowed(self, codec: nn.Module) -> AbstractContextManager[None]:
        """Let the codec's layers be as they are set, also for what calls them one by one: compress,
        decompress.
        """
        return nullcontext()


class RateModulator(CodecPart):
    """A method that makes one codec code at many rates.

    Attributes:
        levels: the rates, and which is set.
    """

    modulates = True
    levels: Levels

    def objective(self, out: Mapping[str, Any], x: Tensor, metric: str) -> dict[str, Tensor] | None:
        """The rate-distortion loss in place of the loop's own, with its parts, as CompressAI names
        them; None to leave it.
        """
        return None


class MultiWidth(CodecPart):
    """A method with several widths of one codec, or several encoders, one of which is set.

    Attributes:
        widths: what there is, and which is set.
        slims: whether each width is a codec of its own, that can be taken out.
        extracting: the width that is being taken out, if one is.
    """

    widths: Widths
    extracting: int | None = None

    def widths_per_step(self) -> list[int]:
        """The widths that one step trains, one after the other; none: the codec as it is."""
        return []

    @property
    def wants_validation(self) -> bool:
        """Whether this step is one at which something depends on validation photographs."""
        return False

    def on_validation(self, figures: Sequence[tuple[float, float]]) -> None:
        """Take in what validation found: (bpp, PSNR) of each width."""

    def lmbda_at(self, width: int) -> float | None:
        """The lambda that a width was trained with, where it has one of its own."""
        return None

    def finalize(self, small: nn.Module) -> None:
        """Put into a hardened codec what neither weights nor keep-lists say."""

    def objective(self, out: Mapping[str, Any], x: Tensor, metric: str) -> dict[str, Tensor] | None:
        """The rate-distortion loss in place of the loop's own, with its parts, as CompressAI names
        them; None to leave it.
        """
        return None


class Gating(CodecPart):
    """A method whose cost depends on the image."""

    def calibrate(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        """Settle on whole images, (1, 3, H, W) each, what was learnt on patches."""

    def image_cost(self) -> tuple[dict[str, float], dict[str, float]] | None:
        """What the last image cost: "macs", "encoder", "decoder" at 64x64, and MACs by transform;
        None if it costs what all do.
        """
        return None


class Taught(Method):
    """A method that learns from another codec."""

    def set_teacher(self, teacher: nn.Module) -> None:
        """Take a codec (a copy, its own to keep) as the teacher; called before `attach`."""


class Distiller(Taught):
    """A method that does nothing but help to train, by a teacher's example; it can go on behind
    `harden`.
    """

    teaches = True


@dataclass(frozen=True)
class Roles:
    """The methods on one codec by what they are, in order of attachment."""

    pruners: list[Pruner]
    parts: list[CodecPart]
    modulator: RateModulator | None
    multi_width: MultiWidth | None
    gating: list[Gating]
    taught: list[Taught]

    @classmethod
    def of(cls, methods: Sequence[Method]) -> Roles:
        """Resolve the roles of methods once, when they are attached."""
        return cls(
            pruners=[m for m in methods if isinstance(m, Pruner)],
            parts=[m for m in methods if isinstance(m, CodecPart)],
            modulator=next((m for m in methods if isinstance(m, RateModulator)), None),
            multi_width=next((m for m in methods if isinstance(m, MultiWidth)), None),
            gating=[m for m in methods if isinstance(m, Gating)],
            taught=[m for m in methods if isinstance(m, Taught)],
        )


METHODS: Registry[type[Method]] = Registry("method")
