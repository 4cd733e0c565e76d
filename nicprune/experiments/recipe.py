"""Recipes: one YAML file names the codec, images, methods and training lengths. Unknown keys are
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from nicprune.codecs.zoo import lmbda_for
from nicprune.common.config import StrictConfig
from nicprune.methods.contract import METHODS, parse_settings
from nicprune.pruning.budget import TIMES
from nicprune.pruning.latency_table import Runtime
from nicprune.training.settings import LARGEST_LR

LARGEST_SEED = 2**62 - 1
"""Each seed gives two of 63 bits, one for each phase of training."""

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]

Quality = Annotated[int, Field(ge=-(2**31), lt=2**31)]
"""Of a codec of one's own, any number that tables hold."""


class Phase(StrictConfig):
    """One phase of training: its steps, and settings that differ from `training:`."""

    steps: int = Field(ge=0)
    lr: float | None = Field(default=None, gt=0, le=LARGEST_LR)
    schedule: Literal["constant", "cosine", "linear"] | None = None
    warmup: int | None = Field(default=None, ge=0)
    optimizer: Literal["adam", "soap"] | None = None
    latents: Literal["noisy", "rounded"] | None = None

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Omit newer settings where they are not set: this text is part of the keys of cached
        runs.
        """
        return [
            (name, value)
            for name, value in super().__repr_args__()
            if name not in ("optimizer", "latents") or value is not None
        ]


class MethodSpec(StrictConfig):
    """One method with its settings."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Variant(StrictConfig):
    """One arm of a recipe: a method, or a stack of several on one codec, and its label in tables.

    Attributes:
        between: with a modulator, number of rates to measure between two qualities.
        lmbda: lambda, where it is not that of the quality.
        seeds: where they are not all of the recipe's.
        qualities: some of the recipe's; all if not given. Where `--set qualities=...` leaves some
            of the recipe's out, so does each arm.
        scratch: no method, but the architecture that the arm with this label ends with, trained
            from random weights.
        sparsify: replaces the recipe's `sparsify` for this arm.
        phase: replaces `finetune` for this arm. An arm from scratch has no other phase; without it,
            it is trained for as many steps as the others with the settings of `finetune`.
        training: settings of training that differ for this arm, in all its phases.
        images: number of training images, evenly spaced in the list; all if not given.
    """

    label: str
    between: int = Field(default=0, ge=0, le=20)
    lmbda: float | None = Field(default=None, gt=0)
    seeds: list[Seed] | None = Field(default=None, min_length=1)
    qualities: list[Quality] | None = Field(default=None, min_length=1)
    scratch: str | None = None
    sparsify: Phase | None = None
    phase: Phase | None = None
    training: dict[str, Any] | None = None
    images: int | None = Field(default=None, ge=1)
    stack: list[MethodSpec] = Field(min_length=1)

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit what older recipes did not have: hashes of theirs stay as they are."""
        newer = ("images", "qualities", "sparsify")
        return {k: v for k, v in dump(self).items() if k not in newer or v is not None}

    @field_validator("label")
    @classmethod
    def _printable(cls, label: str) -> str:
        if not label.strip() or not label.isprintable():
            raise ValueError("a label is a line of text")
        return label

    @property
    def name(self) -> str:
        """Name of the method; of a stack, all names."""
        return (
            "scratch" if self.scratch is not None else " + ".join(part.name for part in self.stack)
        )

    def cache_fields(self) -> dict[str, Any]:
        """Return the settings that a result depends on. Unset fields are omitted, so that adding a
        field does not invalidate cached runs.
        """
        content = self.model_dump(
            exclude={
                name
                for name in ("lmbda", "scratch", "sparsify", "phase", "training", "images")
                if getattr(self, name) is None
            }
        )
        return {k: v for k, v in content.items() if k not in ("seeds", "qualities")}

    @property
    def timed(self) -> bool:
        """True if a budget limits times."""
        budgets = [part.settings.get("budget") for part in self.stack]
        return any(isinstance(b, Mapping) and set(TIMES) & b.keys() for b in budgets)

    @property
    def modulated(self) -> bool:
        """True if one codec serves all qualities."""
        return any(METHODS[part.name].covers_all_rates for part in self.stack)

    @property
    def stays(self) -> bool:
        """True if methods remain on the final codec."""
        stack = [(part.name, part.settings) for part in self.stack]
        return any(
            METHODS[name].stays_with(parse_settings(name, settings, self.label, stack))
            for name, settings in stack
        )


class Recipe(StrictConfig):
    """The content of a recipe.

    Attributes:
        version: of this schema.
        name: of the report; the file's name if not given.
        task: "prune" runs methods on a codec; "train" trains the codec itself, from `weights`.
        codec, qualities, metric, weights: arguments of `load_codec`; `{quality}` in weights is
            replaced. Weights may be given for each quality, `{1: a.safetensors, 3: none}`. A codec
            given as `package.module:factory` may have a single quality, of any number.
        transforms: for "train": a file of `save`, or demo-hyperprior, whose g_a and g_s the codec
            starts from, the rest being as in `weights`; `{quality}` is replaced.
        lambdas: per quality; CompressAI's if not given.
        photographs: train and test folders, or "samples".
        seeds: every method is run once with each.
        control: also fine-tune the original for as many steps.
        training: settings of every phase (see TrainSettings).
        sparsify, finetune: the two phases of "prune": with the method attached, and after the
            channels are removed. Methods without training steps are hardened first, and use both
            phases for fine-tuning.
        methods: what to run: `{name: ..., <its settings>}`, or several on one codec, `{label: ...,
            stack: [{name: ...}, ...]}`. One with a modulator is trained once, for all qualities,
            from the codec of the highest; `between: 1` measures a rate between each two. `{scratch:
            <label of another>, label: ...}` trains that one's small codec from random weights.
        per_quality: for "train": phases by quality, where they differ from `finetune`.
        chain: for "train": each quality starts from the one before in the list; or the start of
            each, {2: 3, 4: 3}, which must come earlier in the list.
        half: save codecs in float16, and measure them as the file holds them.
        latency: the runtime whose times budgets of encode_s and decode_s limit: backend, precision,
            size, threads.
    """

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    task: Literal["prune", "train"] = "prune"
    codec: str
    qualities: list[Quality] = Field(min_length=1)
    metric: Literal["mse", "ms-ssim"] = "mse"
    weights: str | dict[int, str] = "official"
    transforms: str | None = None
    lambdas: dict[int, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    photographs: Photographs
    seeds: list[Seed] = Field(default=[0], min_length=1)
    control: bool = True
    training: dict[str, Any] = Field(default_factory=dict)
    sparsify: Phase = Phase(steps=0)
    finetune: Phase = Phase(steps=0)
    methods: list[Variant] = Field(default_factory=list)
    per_quality: dict[int, Phase] = Field(default_factory=dict)
    chain: bool | dict[int, int] = False
    half: bool = False
    latency: Runtime | None = None

    @model_serializer(mode="wrap")
    def _without_unset(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit what is not set of later keys: a recipe's digest is of what it says."""
        content: dict[str, Any] = write(self)
        later = ("latency", "transforms")
        return {k: v for k, v in content.items() if k not in later or v is not None}

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.task == "prune" and not self.methods:
            raise ValueError("methods: name at least one, for example - name: mask_decay")
        if self.task == "train" and (self.methods or self.sparsify.steps):
            raise ValueError("a recipe with task: train has no methods and no sparsify phase")
        labels = [slug_of(a.label).lower() for a in self.methods]
        for what, values in (
            ("qualities", self.qualities),
            ("seeds", self.seeds),
            ("labels of methods", labels),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{what} must differ (got {values})")
        if {"original", "control"} & set(labels):
            raise ValueError("labels of methods cannot be original or control")
        for number, arm in enumerate(self.methods):
            if arm.scratch is not None:
                if arm.sparsify is not None:
                    raise ValueError(f"{arm.label!r}: an arm from scratch has one phase, `phase`")
                like = next(
                    (other for other in self.methods[:number] if other.label == arm.scratch), None
                )
                if like is None or like.scratch is not None or like.modulated or like.stays:
                    raise ValueError(
                        f"{arm.label!r}: scratch names an arm before it that ends with one small"
                        f" codec (got {arm.scratch!r})"
                    )
                for name, one in (("seeds", "seed"), ("qualities", "quality")):
                    wanted, run = (getattr(a, name) or getattr(self, name) for a in (arm, like))
                    if missing := sorted(set(wanted) - set(run)):
                        raise ValueError(
                            f"{arm.label!r}: {arm.scratch!r} is not run with {one} {missing[0]}"
                        )
            for name in ("seeds", "qualities"):
                own, allowed = getattr(arm, name), getattr(self, name)
                if own is not None and not set(own) <= set(allowed):
                    raise ValueError(
                        f"{arm.label!r}: {name} {own} are not all among the recipe's {allowed}"
                    )
            if arm.qualities is not None and arm.modulated:
                raise ValueError(f"{arm.label!r}: one codec serves all qualities")
        weights = self.weights if isinstance(self.weights, dict) else dict.fromkeys(self.qualities)
        for quality in self.qualities:
            if quality not in weights and self.before(quality) is None:
                raise ValueError(f"weights: there is no entry for quality {quality}")
        by_quality: dict[str, dict[int, Any]] = {
            "weights": weights,
            "lambdas": self.lambdas,
            "per_quality": self.per_quality,
        }
        for what, keys in by_quality.items():
            if left := sorted(set(keys) - set(self.qualities)):
                raise ValueError(f"{what}: {left} are not among the qualities {self.qualities}")
        for quality, before in self.chain.items() if isinstance(self.chain, dict) else ():
            if (
                before
                not in self.qualities[
                    : self.qualities.index(quality) if quality in self.qualities else 0
                ]
            ):
                raise ValueError(
                    f"chain: {quality} cannot start from {before}: both must be among the qualities"
                    f" {self.qualities}, {before} before {quality}"
                )
        if self.latency is not None and not any(arm.timed for arm in self.methods):
            raise ValueError("latency: no budget of a method limits encode_s or decode_s")
        if self.task == "prune" and (self.per_quality or self.chain or self.transforms):
            raise ValueError("per_quality, chain and transforms belong to task: train")
        if self.task == "train" and len(self.seeds) > 1:
            raise ValueError("task: train takes one seed")
        if self.codec.endswith(".safetensors") and (
            self.weights != "official" or len(self.qualities) > 1
        ):
            raise ValueError("a codec given as a file brings its own weights, and is one quality")
        return self

    def phase_of(self, quality: int) -> Phase:
        """Return the phase that a quality is trained in, for `task: train`: `finetune`, with what
        `per_quality` states in place of it.
        """
        own = self.per_quality.get(quality, self.finetune).model_dump()
        return self.finetune.model_copy(update={k: v for k, v in own.items() if v is not None})

    def before(self, quality: int) -> int | None:
        """Return the quality that this one starts from, in a chain."""
        if isinstance(self.chain, dict):
            return self.chain.get(quality)
        place = self.qualities.index(quality)
        return self.qualities[place - 1] if self.chain and place else None

    def lmbda(self, quality: int) -> float:
        """Return the lambda that a quality is trained with."""
        return self.lambdas[quality] if quality in self.lambdas else lmbda_for(quality, self.metric)

    @property
    def imports(self) -> bool:
        """True if the codec is `package.module:factory`, which runs code."""
        return ":" in self.codec

    @property
    def top(self) -> int:
        """Quality of the highest rate, which a codec for all rates starts from."""
        return max(self.qualities, key=self.lmbda)

    def train_settings(
        self, phase: Phase, quality: int, seed: int, arm: Variant | None = None
    ) -> dict[str, Any]:
        """Return the arguments of `fit` for one phase of one arm."""
        given = {k: v for k, v in phase.model_dump().items() if v is not None}
        arms = (arm.training if arm is not None else None) or {}
        # What is said of one arm goes before what is said of all, and of one phase before all.
        of_the_arm = arm is not None and any(phase is one for one in (arm.sparsify, arm.phase))
        return {
            **self.training,
            **({**arms, **given} if of_the_arm else {**given, **arms}),
            "lmbda": self.lmbda(quality),
            "metric": self.metric,
            "seed": seed,
        }

    def weights_for(self, quality: int) -> str:
        """Return the weights that a quality starts from; "none" for one that starts from another
        quality, where weights are given one by one and it has no entry.
        """
        given = self.weights if isinstance(self.weights, str) else self.weights.get(quality, "none")
        return given.replace("{quality}", str(quality))

    def transforms_for(self, quality: int) -> str | None:
        """Return the file whose g_a and g_s a quality starts from, if any."""
        return self.transforms and self.transforms.replace("{quality}", str(quality))


class Photographs(StrictConfig):
    """Image folders: one, several, or "samples"; `validation` for choices made while training.

    Args:
        crops: whether the report shows crops of the test images; false where their licence forbids
            it.
        source: test images of the domain that a codec was made for, for adaptations to another:
            every codec is measured on them too.
        replay: training images of that domain, for adaptations that replay some.
        overlap: allow test images that are training images too, to see that a recipe runs or that
            a codec can learn a few images by heart. Without it they are refused: numbers on images
            seen in training are better than those on others.
    """

    train: str | list[str]
    test: str | list[str]
    validation: str | list[str] | None = None
    crops: bool = True
    source: str | list[str] | None = None
    replay: str | list[str] | None = None
    overlap: bool = False

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit what older recipes did not have: hashes of theirs stay as they are."""
        newer = ("source", "replay", "overlap")
        return {k: v for k, v in dump(self).items() if k not in newer or v}

    @field_validator("train", "test", "validation", "source", "replay")
    @classmethod
    def _named(cls, folders: str | list[str] | None) -> str | list[str] | None:
        named = [folders] if isinstance(folders, str) else folders
        if named is not None and not (named and all(named)):
            raise ValueError("name a folder of images, or several")
        return folders


Recipe.model_rebuild()


def slug_of(label: str) -> str:
    """Return a label as a part of a file name."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in label)
