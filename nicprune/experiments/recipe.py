"""Recipes: one YAML file names the codec, images, methods and training lengths. Unknown keys are
refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from nicprune.codecs.zoo import DEMO, LAMBDAS, check_name, codec_names, lmbda_for
from nicprune.common.config import StrictConfig, apply_override, cut, parse, read_yaml
from nicprune.common.errors import FileError, NicpruneError, RecipeError, closest
from nicprune.common.files import check_regular, expand
from nicprune.data.images import SAMPLES, list_images
from nicprune.methods.composition import check_combination
from nicprune.methods.contract import METHODS, parse_settings
from nicprune.pruning.budget import TIMES
from nicprune.pruning.latency_table import Runtime
from nicprune.training.loop import LARGEST_LR, TrainSettings

LARGEST_SEED = 2**62 - 1
"""Each seed gives two of 63 bits, one for each phase of training."""

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]

Quality = Annotated[int, Field(ge=-(2**31), lt=2**31)]
"""Of a codec of one's own, any number that tables hold."""

FIXED = ("lmbda", "metric", "seed", "steps")
"""Training settings that a recipe states elsewhere than below `training:`."""


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
    seeds: list[Seed] | None = None
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
            replaced. A codec given as `package.module:factory` may have a single quality, of any
            number.
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
    weights: str = "official"
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
        for what, keys in (("lambdas", self.lambdas), ("per_quality", self.per_quality)):
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
        own = {k: v for k, v in phase.model_dump().items() if v is not None}
        arms = (arm.training if arm is not None else None) or {}
        return {
            **self.training,
            **own,
            **arms,
            "lmbda": self.lmbda(quality),
            "metric": self.metric,
            "seed": seed,
        }

    def weights_for(self, quality: int) -> str:
        """Return the weights that a quality starts from."""
        return self.weights.replace("{quality}", str(quality))

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
    """

    train: str | list[str]
    test: str | list[str]
    validation: str | list[str] | None = None
    crops: bool = True
    source: str | list[str] | None = None
    replay: str | list[str] | None = None

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit what older recipes did not have: hashes of theirs stay as they are."""
        newer = ("source", "replay")
        return {k: v for k, v in dump(self).items() if k not in newer or v is not None}

    @field_validator("train", "test", "validation", "source", "replay")
    @classmethod
    def _named(cls, folders: str | list[str] | None) -> str | list[str] | None:
        named = [folders] if isinstance(folders, str) else folders
        if named is not None and not (named and all(named)):
            raise ValueError("name a folder of images, or several")
        return folders


Recipe.model_rebuild()


def recipe_folders() -> list[Path]:
    """Return the folders where recipes are found by name: beside the package in a clone, inside it
    when installed.
    """
    package = Path(str(resources.files("nicprune")))
    return [
        folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()
    ]


def recipe_names() -> dict[str, Path]:
    """Return the names of the recipes that come with nicprune."""
    return {
        path.stem: path
        for folder in reversed(recipe_folders())
        for path in sorted(folder.glob("*.yaml"))
    }


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by path or by name.

    Raises:
        RecipeError: there is none; names the closest.
    """
    path = expand(name)
    if path.exists() and not path.is_dir():
        return check_regular(path, "recipe")
    known = recipe_names()
    stem = path.stem if path.suffix in (".yaml", ".yml") else name
    if stem in known and (path.parent == Path(".") or path.parent.name == "recipes"):
        return known[stem]
    raise RecipeError(f"no recipe {name!r}; {closest(stem, known)}")


def read_recipe(
    name: str, overrides: Sequence[str] = (), *, imports: bool = True
) -> tuple[Recipe, str]:
    """Read a recipe and apply `key=value` overrides; return it with the text it amounts to.

    Nothing is imported here. With `imports` false, a recipe that would have code imported later is
    refused.

    Raises:
        RecipeError: not YAML, an unknown key, a value out of range, a codec, quality or method that
            does not exist.
        FileError: the file cannot be read.
    """
    path = find_recipe(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {error}") from None
    content = read_yaml(text, str(path))
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping that starts with version: 1 (found"
            f" {type(content).__name__})"
        )
    for override in overrides:
        apply_override(content, override)
        if override.partition("=")[0] == "qualities":
            _keep_qualities(content)
    content.setdefault("name", path.stem)
    recipe = parse_recipe(content, str(path))
    if recipe.imports and not imports:
        raise RecipeError(
            f"{path}: codec: {cut(recipe.codec)} runs code; look at it, then leave --no-import out"
        )
    return recipe, yaml.safe_dump(content, sort_keys=False) if overrides else text


def _keep_qualities(content: dict[str, Any]) -> None:
    """Leave out of each arm the qualities that the recipe is not run at, and arms without any."""
    arms, kept = content.get("methods"), content["qualities"]
    if not isinstance(arms, list) or not isinstance(kept, list):
        return  # refused when it is parsed
    found = []
    for arm in arms:
        own = arm.get("qualities") if isinstance(arm, dict) else None
        if isinstance(own, list):
            arm = arm | {"qualities": [quality for quality in own if quality in kept]}
        if not isinstance(own, list) or arm["qualities"]:
            found.append(arm)
    content["methods"] = found


def parse_recipe(content: Mapping[str, Any], where: str) -> Recipe:
    """Validate a recipe's content, methods and training settings included; see `read_recipe`."""
    content = dict(content)
    arms = content.get("methods")
    if isinstance(arms, list):
        content["methods"] = [_parse_arm(arm, i, content, where) for i, arm in enumerate(arms)]
    recipe = parse(Recipe, content, where)
    if not recipe.imports and not recipe.codec.endswith(".safetensors"):
        for quality in recipe.qualities:
            try:
                check_name(recipe.codec, quality, recipe.metric)
            except Exception as error:
                raise RecipeError(f"{where}: {cut(str(error), 400)}") from None
    for quality in recipe.qualities:
        if quality not in recipe.lambdas and not 1 <= quality <= len(LAMBDAS[recipe.metric]):
            raise RecipeError(
                f"{where}: quality {quality} has no lambda of CompressAI's; state it below lambdas:"
            )
    for key in (
        key
        for settings in (recipe.training, *(arm.training or {} for arm in recipe.methods))
        for key in settings
    ):
        if key in FIXED:
            places = {
                "lmbda": "lambdas:",
                "metric": "metric:",
                "seed": "seeds:",
                "steps": "sparsify: and finetune:",
            }
            raise RecipeError(f"{where}: training.{key} is stated at {places[key]}")
    for arm in (None, *recipe.methods):
        own = [p for p in (arm.sparsify, arm.phase) if p is not None] if arm is not None else []
        for phase in (recipe.sparsify, recipe.finetune, *recipe.per_quality.values(), *own):
            told = f"{where}: training" if arm is None else f"{where}: {cut(arm.label)!r}: training"
            settings = parse(
                TrainSettings,
                recipe.train_settings(phase, recipe.qualities[0], recipe.seeds[0], arm),
                told,
            )
            if settings.devices > 1:
                raise RecipeError(
                    f"{where}: a recipe trains on one device; call nicprune.fit(devices=...) in a"
                    " script of your own for more"
                )
    return recipe


def _parse_arm(arm: Any, number: int, content: Mapping[str, Any], where: str) -> Variant:
    """Parse an arm as a recipe writes it: the settings of a method stand beside its name."""
    here = f"{where}: methods.{number}"
    words = ("between", "lmbda", "seeds", "qualities", "sparsify", "phase", "training", "images")
    if isinstance(arm, dict) and arm.get("sparsify") is not None:
        content = {**content, "sparsify": arm["sparsify"]}
    if isinstance(arm, dict) and "stack" in arm:
        if (
            "label" not in arm
            or not isinstance(arm["stack"], list)
            or set(arm) - {"label", "stack", *words}
        ):
            raise RecipeError(f"{here}: a stack is {{label: ..., stack: [{{name: ...}}, ...]}}")
        stack = [
            (part["name"], {k: v for k, v in part.items() if k != "name"})
            for part in arm["stack"]
            if isinstance(part, dict) and isinstance(part.get("name"), str)
        ]
        # Before the settings, which may be refused because of a method that cannot be there at all.
        try:
            check_combination([METHODS[name] for name, _ in stack if name in METHODS])
        except RecipeError as error:
            raise RecipeError(f"{here}: {error}") from None
        parts = [
            _parse_part(part, content, f"{here}.stack.{i}", stack)
            for i, part in enumerate(arm["stack"])
        ]
        found = parse(Variant, {**arm, "stack": [p.model_dump() for p in parts]}, here)
    elif isinstance(arm, dict) and "scratch" in arm:
        found = parse(
            Variant,
            {"label": f"{arm['scratch']} from scratch", **arm, "stack": [{"name": "none"}]},
            here,
        )
    else:
        part = _parse_part(
            (
                {k: v for k, v in arm.items() if k not in ("label", *words)}
                if isinstance(arm, dict)
                else arm
            ),
            content,
            here,
        )
        own = {k: arm[k] for k in words if k in arm}
        found = parse(
            Variant,
            {"label": arm.get("label", part.name), "stack": [part.model_dump()], **own},
            here,
        )
    if found.between and not any(METHODS[part.name].rates_field for part in found.stack):
        raise RecipeError(
            f"{here}: between is for codecs of many rates; {cut(found.label)!r} has no modulator"
        )
    return found


def _parse_part(
    part: Any,
    content: Mapping[str, Any],
    here: str,
    stack: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> MethodSpec:
    if not isinstance(part, dict) or "name" not in part:
        raise RecipeError(f"{here} needs a name; {closest(cut(str(part)), METHODS)}")
    if not isinstance(part["name"], str) or part["name"] not in METHODS:
        raise RecipeError(
            f"{here}: unknown method {cut(str(part['name']))!r};"
            f" {closest(cut(str(part['name'])), METHODS)}"
        )
    settings = {k: v for k, v in part.items() if k != "name"}
    method = METHODS[part["name"]]
    steps = _sparsify_steps(content)
    if (length := method.steps_field) and steps is not None:
        if not steps:
            raise RecipeError(
                f"{here}: {part['name']} learns while the codec trains; give it steps, sparsify:"
                " {steps: 500}"
            )
        settings.setdefault(length, steps)
        parsed: Any = parse_settings(part["name"], settings, here, stack)
        if getattr(parsed, length) > steps:
            raise RecipeError(
                f"{here}: {length} {getattr(parsed, length)} does not fit into sparsify.steps"
                f" {steps}"
            )
    if (field := method.rates_field) and not {field, "qualities"} & set(settings):
        settings[field] = _lambdas(content, here)
    seed = getattr(parse_settings(part["name"], settings, here, stack), "seed", 0)
    if isinstance(seed, int) and seed > LARGEST_SEED:
        raise RecipeError(f"{here}: seed: input should be at most {LARGEST_SEED} (got {seed})")
    photographs = content.get("photographs")
    if settings.get("schedule") is not None and not (
        isinstance(photographs, dict) and photographs.get("validation")
    ):
        raise RecipeError(
            f"{here}: a schedule decides by validation photographs; name them, photographs:"
            " {validation: folder}"
        )
    if settings.get("replay") and not (isinstance(photographs, dict) and photographs.get("replay")):
        raise RecipeError(
            f"{here}: replay takes images of the source domain; name them, photographs:"
            " {replay: folder}"
        )
    return parse(MethodSpec, {"name": part["name"], "settings": settings}, here)


def _sparsify_steps(content: Mapping[str, Any]) -> int | None:
    """Return the steps of the phase `sparsify` as it will be parsed: 4.0 is 4. None if it cannot
    be, which is an error when the whole recipe is parsed.
    """
    try:
        return Phase.model_validate(content.get("sparsify", {"steps": 0})).steps
    except ValidationError:
        return None


def _lambdas(content: Mapping[str, Any], here: str) -> list[float]:
    """Return the recipe's own rates, increasing, for a modulator without its own."""
    own, metric = content.get("lambdas") or {}, content.get("metric", "mse")
    try:
        return sorted(own[q] if q in own else lmbda_for(q, metric) for q in content["qualities"])
    except (KeyError, TypeError, IndexError):
        raise RecipeError(
            f"{here}: a modulator takes the recipe's qualities as its rates; state them above,"
            " qualities: [1, 2, 3]"
        ) from None


SPLITS = {
    "train": "train",
    "test": "test",
    "validation": "train",
    "source": "test",
    "replay": "train",
}
"""Photographs of a recipe, and the sub-folder that is listed where their folder has one."""


def check_paths(recipe: Recipe) -> None:
    """Raise unless all files that the recipe reads exist, before any work is done. One error lists
    all that is missing.

    Raises:
        DataError, FileError: images or weights are missing.
    """
    missing: list[NicpruneError] = []

    def collect(where: str, look: Callable[..., object], *arguments: Any) -> None:
        try:
            look(*arguments)
        except NicpruneError as error:
            missing.append(type(error)(f"{where}: {error}"))
        except OSError as error:  # a name that is too long, a folder that may not be read
            path = f"{str(error.filename or arguments[0])[:60]!r}"
            missing.append(FileError(f"{where}: cannot read {path}: {error.strerror or error}"))

    for split, inside in SPLITS.items():
        if (folder := getattr(recipe.photographs, split)) is not None:
            collect(f"photographs.{split}", list_images, folder, inside)
    for quality in recipe.qualities:
        if recipe.before(quality) is None:
            if recipe.weights not in ("official", "none"):
                collect("weights", _check_exists, recipe.weights_for(quality))
            transforms = recipe.transforms_for(quality)
            if transforms == DEMO:
                collect("transforms", check_name, DEMO, quality, "mse")
            elif transforms is not None:
                collect("transforms", _check_exists, transforms)
    if recipe.codec.endswith(".safetensors"):
        collect("codec", _check_exists, recipe.codec, f" (known names: {', '.join(codec_names())})")
    if missing:
        raise type(missing[0])("\n".join(dict.fromkeys(map(str, missing))))


def check_outside_images(recipe: Recipe, report: Path) -> None:
    """Raise RecipeError if a report would lie in a folder of images: the next run would learn from
    its plots, or be tested on them.
    """
    for split, inside in SPLITS.items():
        given = getattr(recipe.photographs, split)
        for folder in [given] if isinstance(given, (str, Path)) else given or ():
            if str(folder) == SAMPLES:
                continue
            root = expand(folder)
            root = root / inside if (root / inside).is_dir() else root
            if report.resolve().is_relative_to(root.resolve()):
                raise RecipeError(
                    f"the report would be written into {report}, among photographs.{split}"
                    f" ({root}), and taken for images: choose another folder (--reports)"
                )


def _check_exists(path: str, hint: str = "") -> None:
    file = expand(path)
    if not file.exists():
        raise FileError(f"no such file: {path}{hint}")
    check_regular(file, "weights")


def slug_of(label: str) -> str:
    """Return a label as a part of a file name."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in label)


def digest(*parts: Any) -> str:
    """Return a hash of anything that JSON can write, for cache keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
