"""From the content of a recipe to a `Recipe`: methods, their settings and those of training are
validated, each mistake told with its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from nicprune.codecs.zoo import LAMBDAS, check_name, lmbda_for
from nicprune.common.config import cut, parse
from nicprune.common.errors import RecipeError, closest
from nicprune.experiments.recipe import LARGEST_SEED, MethodSpec, Phase, Recipe, Variant
from nicprune.methods.compatibility import check_combination
from nicprune.methods.contract import METHODS, parse_settings
from nicprune.training.settings import TrainSettings

FIXED = ("lmbda", "metric", "seed", "steps")
"""Training settings that a recipe states elsewhere than below `training:`."""


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
    rates = [
        part.name
        for part in found.stack
        if METHODS[part.name].rates_field or {"lambdas", "qualities"} & part.settings.keys()
    ]
    if found.lmbda is not None and rates:
        raise RecipeError(f"{here}: lmbda: {rates[0]} trains by lambdas of its own: leave it out")
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
        return sorted(
            float(own[q]) if q in own else lmbda_for(q, metric)  # YAML reads 1e-3 as text
            for q in content["qualities"]
        )
    except ValueError as error:
        raise RecipeError(f"{here}: lambdas: {error}") from None
    except (KeyError, TypeError, IndexError):
        raise RecipeError(
            f"{here}: a modulator takes the recipe's qualities as its rates; state them above,"
            " qualities: [1, 2, 3]"
        ) from None
