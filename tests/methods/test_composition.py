"""Which methods go together, as their classes declare it, and operating points of any codec."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import METHOD_SETTINGS, built, hook_count, image

from nicprune.codecs.cdf import refresh_tables
from nicprune.common.errors import RecipeError
from nicprune.methods import METHODS, Attached, Method, attach
from nicprune.methods.compatibility import check_combination
from nicprune.methods.operating_point import EMPTY, OperatingPoint
from nicprune.methods.points import operating_points, resolve_point
from nicprune.pruning.target import Target

PAIRS = list(itertools.combinations(sorted(METHODS), 2))


def declared(first: str, second: str) -> bool:
    """Whether one of two methods excludes the other, written anew from the declarations."""

    def excludes(one: type[Method], other: type[Method]) -> bool:
        names = {other.name, *(base.__name__ for base in other.__mro__)}
        return any(key in names for key in one.exclusive) and not names & one.goes_with

    a, b = METHODS[first], METHODS[second]
    return excludes(a, b) or excludes(b, a)


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_every_pair_is_attached_or_refused_as_declared(first: str, second: str) -> None:
    codec: Any = built("bmshj2018-hyperprior")[0].eval()
    stack = [(name, METHOD_SETTINGS.get(name, {})) for name in (first, second)]
    if first == "adaptation" and second in METHODS[first].goes_with:  # new channels are pruned
        target = {**METHOD_SETTINGS[second], "budget": {"macs": 1.2}}
        stack = [(first, {"form": "grow", "grow": 0.5, "round_to": 4}), (second, target)]
    if all(issubclass(METHODS[name].Config, Target) for name in (first, second)):
        with pytest.raises(RecipeError, match=f"{first} and {second} would both choose channels"):
            attach(codec, stack)  # of all groups
        assert hook_count(codec) == 0
        return
    if declared(first, second):
        with pytest.raises(RecipeError, match=f"{first}|{second}") as error:
            attach(codec, stack)
        assert "do not go together" in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(RecipeError, match="do not go together"):  # whatever their settings
            attach(codec, [(name, {"nonsense": 1}) for name in (first, second)])
        assert hook_count(codec) == 0
        return
    with torch.no_grad():
        before = codec(image(codec, 1))["x_hat"]
    attached = attach(codec, stack)
    assert [method.name for method in attached.methods] == [first, second]
    if not any(METHODS[name].rates_field for name in (first, second)):
        with torch.no_grad():
            assert torch.equal(attached(image(codec, 1))["x_hat"], before)
    assert attached.detach() is codec and hook_count(codec) == 0


def test_what_is_alone_is_so_with_a_method_of_its_own_kind() -> None:
    for name in ("slimmable", "scalable_encoder", "bit_rate_modulator"):
        with pytest.raises(RecipeError, match="do not go together"):
            check_combination([METHODS[name], METHODS[name]])
    check_combination([METHODS["mask_decay"], METHODS["channel_gating"], METHODS["distillation"]])


def test_a_method_may_exclude_another_by_its_name() -> None:
    class Lonely(Method):
        name = "lonely"
        exclusive = {"magnitude": "both say what stays"}

    with pytest.raises(RecipeError, match="lonely and magnitude .*: both say what stays"):
        check_combination([METHODS["magnitude"], Lonely])
    check_combination([Lonely, METHODS["random"]])


@pytest.mark.parametrize("member", ["select", "fold", "weight_factors", "check_ready"])
def test_a_method_that_is_no_pruner_cannot_define_a_pruners_member(member: str) -> None:
    with pytest.raises(TypeError, match=f"Own defines {member}.*derive from Pruner"):
        type("Own", (Method,), {member: lambda self: None})


POINTS = {
    "mask_decay": [EMPTY],
    "bit_rate_modulator": [OperatingPoint(rate=level) for level in (0.0, 0.5, 1.0, 1.5, 2.0)],
    "slimmable": [OperatingPoint(width=width) for width in range(3)],
    "scalable_encoder": [OperatingPoint(effort=level) for level in range(3)],
    "adaptation": [OperatingPoint(domain=domain) for domain in range(2)],
}


@pytest.mark.parametrize("name", sorted(POINTS))
def test_operating_points_are_all_that_a_codec_has(name: str) -> None:
    settings = METHOD_SETTINGS.get(name, {})
    attached = attach(built("bmshj2018-hyperprior")[0].eval(), name, **settings)
    found = operating_points(attached, between=1)
    expected = POINTS[name]
    assert found[: len(expected)] == expected and len(found) == len(set(found))
    for point in found:
        assert attached.point(**point.keywords()) == resolve_point(attached, **point.keywords())
        assert attached.point(**point.keywords()) == point
        attached.set_point(point)
        assert [choice.now for choice in attached.choices] == [
            value
            for value in (point.rate, point.width, point.effort, point.domain)
            if value is not None
        ]


def test_the_bits_of_a_point_are_those_of_its_keywords() -> None:
    codec: Any = built("bmshj2018-hyperprior")[0].eval()
    attached: Attached = attach(codec, "slimmable", **METHOD_SETTINGS["slimmable"]).eval()
    refresh_tables(attached)
    x = image(codec, 3)
    sizes = []
    for width, point in enumerate(attached.operating_points()):
        by_point = attached.compress(x, **point.keywords())["strings"]
        assert by_point == attached.compress(x, width=width)["strings"]
        sizes.append(by_point)
    assert sizes[0] != sizes[1] != sizes[2]


def test_a_plain_codec_has_one_point_and_says_so() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    assert operating_points(codec) == [EMPTY] and EMPTY.keywords() == {} and str(EMPTY) == ""
    assert resolve_point(codec, level=None, lmbda=None, width=None) == EMPTY
    for asked, said in (
        ({"level": 0.0}, "need a modulator"),
        ({"lmbda": 0.01}, "need a modulator"),
        ({"width": 0}, "needs a slimmable codec"),
        ({"domain": "screen"}, "has no domain 'screen'"),
    ):
        with pytest.raises(RecipeError, match=said):
            resolve_point(codec, **asked)


def test_points_have_names_for_folders() -> None:
    assert str(OperatingPoint(rate=0.5)) == "level-0.5"
    assert str(OperatingPoint(width=2)) == "width-2" and str(OperatingPoint(effort=1)) == "level-1"
