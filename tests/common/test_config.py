"""Settings and recipes as YAML: what YAML takes in silence, or without end, is refused in one
line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from compressai.models import ScaleHyperprior

from nicprune.common.config import DEEPEST, MOST_NODES, apply_override, cut, read_yaml
from nicprune.common.errors import RecipeError
from nicprune.experiments.recipe_files import read_recipe, recipe_names
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.methods import attach
from nicprune.pruning.budget import Budget

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 5000))

REFUSED: dict[str, tuple[str, str]] = {
    "a key twice": ("version: 1\nname: a\nname: b\n", r"line 3: the key 'name' stands twice .*2"),
    "a key twice, further in": (
        "a:\n  - b:\n      steps: 1\n      lr: 1\n      steps: 2\n",
        "line 5: the key 'steps' stands twice .*line 3",
    ),
    "a key twice, in one line": ("a: {b: 1, c: 2, b: 3}", "line 1: the key 'b' stands twice"),
    "a number twice": ("lambdas:\n  1: 0.1\n  0x1: 0.2\n", "line 3: the key '0x1' stands twice"),
    "truth twice": ("yes: 1\ntrue: 2\n", "line 2: the key 'true' stands twice"),
    "behind an anchor": ("a: &a {b: 1, b: 2}\nc: *a\n", "line 1: the key 'b' stands twice"),
    "many, by anchors": (BOMB, "line 5: more than 10,000 values"),
    "deep, by anchors": (CHAIN, "nested too deep"),
    "an anchor in itself": ("a: &a [*a]", "line 1: an anchor that contains itself"),
    "an anchor in itself, further in": ("a: &a {b: [{c: *a}]}", "an anchor that contains itself"),
    "deep lists": ("a: " + "[" * 5000 + "]" * 5000, "line 1: nested too deep"),
    "deep mappings": ("a: " + "{b: " * 5000 + "1" + "}" * 5000, "line 1: nested too deep"),
    "deep lines": ("\n".join(" " * i + "a:" for i in range(500)), "nested too deep"),
    "long": ("a: " + "x" * (1 << 20), "1,048,579 characters are more than a recipe has"),
    "a list as a key": ("? [a, b]\n: c\n", "line 1: not YAML"),
    "no such date": ("a: 2020-13-45\n", "a value cannot be read"),
    "a number of many digits": ("a: " + "9" * 5000, "a value cannot be read"),
    "an object": ("a: !!python/object/apply:os.system [true]\n", "line 1: not YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "not YAML"),
    "no such alias": ("a: *b\n", "line 1: not YAML"),
    "a control character": ("a: \x01\n", "not YAML"),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_is_refused_is_one_line(kind: str, tmp_path: Path) -> None:
    text, expected = REFUSED[kind]
    with pytest.raises(RecipeError, match=expected) as told:
        read_yaml(text, "r.yaml")
    assert "\n" not in str(told.value) and len(str(told.value)) < 400
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=expected):
        read_recipe(str(file))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1\nb: {a: 1}\nc: [{a: 1}, {a: 2}]\n",
        "a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: *a\n",
        "1: a\n'1': b\n",
        "- 1\n- [2]\n",
        "a: " + "[" * (DEEPEST - 2) + "]" * (DEEPEST - 2),
        "[" + "1, " * (MOST_NODES - 2) + "1]",
    ],
)
def test_what_is_read_is_what_yaml_reads(text: str) -> None:
    assert read_yaml(text, "r.yaml") == yaml.safe_load(text)


def test_every_recipe_reads_as_before() -> None:
    for path in recipe_names().values():
        text = path.read_text(encoding="utf-8")
        assert read_yaml(text, str(path)) == yaml.safe_load(text)


def test_overrides_are_read_alike() -> None:
    for value, expected in (
        ("{a: 1, a: 2}", "the key 'a' stands twice"),
        ("[" * 500 + "]" * 500, "nested too deep"),
        ("[" * 500, "nested too deep|is not a YAML value"),
        ("{" + "x" * 5000, "is not a YAML value"),
        ("2020-13-45", "a value cannot be read"),
    ):
        with pytest.raises(RecipeError, match=expected) as told:
            apply_override({}, f"training={value}")
        assert "\n" not in str(told.value) and len(str(told.value)) < 300


@pytest.mark.parametrize(
    ("override", "content"),
    [
        ("widths.g_a.0=48", {"widths": {"g_a.0": 48}}),
        ("methods.0.widths.h_a.0=8", {"methods": [{"widths": {"g_a.0": 8, "h_a.0": 8}}]}),
        ("methods.0.widths={g_a.2: 4}", {"methods": [{"widths": {"g_a.2": 4}}]}),
    ],
)
def test_names_of_groups_hold_dots(override: str, content: Any) -> None:
    methods: list[Any] = [{"widths": {"g_a.0": 8}}]
    given: dict[str, Any] = {"methods": methods} if "methods" in override else {}
    apply_override(given, override)
    assert given == content


def test_widths_of_a_slimmable_codec_are_a_list() -> None:
    given = {"methods": [{"widths": [1.0, 0.5]}]}
    apply_override(given, "methods.0.widths.1=0.25")
    assert given == {"methods": [{"widths": [1.0, 0.25]}]}


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "change",
    [
        {"name": LONG + "/"},
        {"codec": LONG},
        {"qualities": LONG},
        {"qualities": [1] * 10_000},
        {"seeds": ["a"] * 10_000},
        {LONG: 1},
        {"methods": [{"name": LONG}]},
        {"methods": [{"name": "none", "label": LONG}] * 2},
        {"methods": [{"name": "none", LONG: 1}]},
        {"methods": LONG},
        {"methods": [LONG]},
        {"training": {"steps_": LONG}},
        {"training": {"batch_size": LONG}},
        {"metric": LONG},
        {"photographs": {"train": [LONG] * 3, "test": 3}},
        {"lambdas": {1: LONG}},
    ],
    ids=lambda change: next(iter(change))[:12],
)
def test_values_in_messages_are_cut(change: dict[str, Any]) -> None:
    content = {
        "version": 1,
        "name": "a",
        "codec": "demo-hyperprior",
        "qualities": [1],
        "photographs": {"train": "samples", "test": "samples"},
        "methods": [{"name": "none"}],
    }
    with pytest.raises(RecipeError) as told:
        parse_recipe(content | change, "r.yaml")
    assert len(str(told.value)) < 800 and "\n" not in str(told.value)


def test_cut() -> None:
    assert cut("a\n b") == "a b" and cut("x" * 80) == "x" * 80
    assert cut("x" * 81) == "x" * 77 + "..."


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"macs": 2}, "Budget: macs: input should be less than 1 (got 2)"),
        ({"mac": 0.5}, "Budget: unknown key 'mac'; did you mean 'macs' or"),
        ({}, "Budget: a budget names macs, encoder"),
    ],
)
def test_a_configuration_made_directly_is_told_alike(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Budget(**values)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_inside_another_one_the_place_of_an_error_is_told() -> None:
    with pytest.raises(RecipeError, match=r"method 'mask_decay': budget\.macs: input should be"):
        attach(ScaleHyperprior(8, 8), "mask_decay", budget={"macs": 2})
