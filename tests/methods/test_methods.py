"""The contract of every method, and what mask decay does."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import METHOD_SETTINGS, built, hook_count, image, random_keep, same_state, state_of
from torch import Tensor, nn

from nicprune.channels.known import ATTRIBUTE
from nicprune.codecs.anatomy import forward_for_analysis
from nicprune.common.errors import CodecError, NicpruneError, RecipeError, TrainingError
from nicprune.methods import METHODS, Attached, Method, attach
from nicprune.methods.pruners.mask_decay import MaskDecay
from nicprune.pruning.cost import CostModel
from nicprune.pruning.target import Target
from nicprune.training.precision import entropy_models_in_float32

MODULATORS = [name for name in sorted(METHODS) if METHODS[name].rates_field]
STAYING = [
    "adaptation",
    "channel_gating",
    "scalable_encoder",
    "slimmable",
    "temporal_entropy_model",
    *MODULATORS,
]
"""Methods that are part of the codec when it codes."""

CODECS = ["bmshj2018-hyperprior", "mbt2018", "cheng2020-attn", "elic2022-chandelier"]


HOOKLESS = tuple(name for name in sorted(METHODS) if METHODS[name].attach is Method.attach)
FEW = {
    **dict.fromkeys(HOOKLESS, CODECS[:1]),
    **dict.fromkeys((*MODULATORS, "distillation"), CODECS[::2]),
}
PAIRS = [(m, c) for m in sorted(METHODS) for c in FEW.get(m, CODECS)]
"""Methods that put nothing on the codec need not be tried on every one, nor those that only scale
latents.
"""


@pytest.fixture(params=sorted(METHODS))
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def settings(method: str, **more: Any) -> dict[str, Any]:
    return {**METHOD_SETTINGS.get(method, {}), **more}


def step(attached: Attached, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One training step, noise and all, the same for the same seed."""
    torch.manual_seed(seed)
    x = image(attached.codec, seed)
    optimizer.zero_grad()
    for width in attached.widths_per_step() or [None]:  # type: ignore[list-item]
        out = attached(x, width=width)
        rate = sum(-torch.log2(value).mean() for value in out["likelihoods"].values())
        ((out["x_hat"] - x).square().mean() + 0.01 * rate + attached.loss(out, x)).backward()
    optimizer.step()
    attached.after_step()


def optimizer_for(attached: Attached, lr: float = 1e-4) -> torch.optim.Optimizer:
    own = {id(p) for p in attached.manually_updated()}
    return torch.optim.Adam(
        [
            p
            for n, p in attached.named_parameters()
            if id(p) not in own and not n.endswith("quantiles")
        ],
        lr=lr,
    )


def steps_of(method: str) -> int:
    """How many steps it takes until a method with these settings is done."""
    return METHOD_SETTINGS[method].get(
        "decay_steps", METHOD_SETTINGS[method].get("gating_steps", 0)
    )


def train(attached: Attached, steps: int, first: int = 0) -> None:
    attached.train()
    optimizer = optimizer_for(attached)
    for number in range(first, first + steps):
        step(attached, optimizer, number)


def forward(model: nn.Module, mode: str) -> Tensor:
    torch.manual_seed(0)
    codec = getattr(model, "codec", model)
    x = image(codec, 2)
    # In training a modulator draws rates: the highest is what the codec is without it.
    top = (
        {"level": model.levels.top}
        if isinstance(model, Attached) and model.levels is not None
        else {}
    )
    model.train(mode == "training")
    with torch.no_grad():
        if mode == "bf16":
            with torch.autocast("cpu", torch.bfloat16), entropy_models_in_float32(codec):
                return model(x, **top)["x_hat"]
        return model(x, **top)["x_hat"]


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_attaching_changes_nothing(method: str, name: str) -> None:
    codec, _ = built(name)
    before, state = (
        {mode: forward(codec, mode) for mode in ("eval", "training", "bf16")},
        state_of(codec),
    )
    attached = attach(codec, method, **settings(method))
    assert attached.codec is codec
    assert same_state(state, codec.state_dict())
    for mode in before:
        assert torch.equal(forward(attached, mode), before[mode]), mode
    assert torch.equal(forward(attached, "eval"), before["eval"]), "after a training pass"
    assert same_state(state, codec.state_dict())


def test_attaching_with_latents_open_changes_nothing() -> None:
    for name in CODECS:
        codec, _ = built(name)
        before = {mode: forward(codec, mode) for mode in ("eval", "training")}
        attached = attach(codec, "mask_decay", **settings("mask_decay", latents=True))
        for mode in before:
            assert torch.equal(forward(attached, mode), before[mode]), (name, mode)


def test_detaching_gives_the_object_back(method: str) -> None:
    codec, _ = built("mbt2018")
    codec.g_a[0].bias.requires_grad_(False)  # the user's own
    state, hooks, parameters = (
        state_of(codec),
        hook_count(codec),
        [(id(p), p.requires_grad) for p in codec.parameters()],
    )
    attached = attach(codec, method, **settings(method))
    assert (hook_count(codec) == hooks) == (method in HOOKLESS)
    back = attached.detach()
    assert back is codec and hook_count(codec) == hooks
    assert (
        same_state(state, codec.state_dict())
        and [(id(p), p.requires_grad) for p in codec.parameters()] == parameters
    )
    assert not any("weight" in m.__dict__ or "bias" in m.__dict__ for m in codec.modules())
    attach(codec, method, **settings(method)).detach()


def test_a_second_attachment_is_refused() -> None:
    codec, _ = built("bmshj2018-hyperprior")
    attach(codec, "mask_decay", **settings("mask_decay"))
    with pytest.raises(RecipeError, match="attached already"):
        attach(codec, "mask_decay", **settings("mask_decay"))


def test_hooks_are_set_again_after_detaching_and_only_then(method: str) -> None:
    codec, _ = built("bmshj2018-hyperprior")
    attached = attach(codec, method, **settings(method))
    before, hooks = forward(attached, "eval"), hook_count(codec)
    if method not in HOOKLESS:
        with pytest.raises(CodecError, match=r"follows detach\(\)"):
            attached.attach_again()
    assert hook_count(codec) == hooks
    attached.detach()
    attached.attach_again()
    assert hook_count(codec) == hooks and torch.equal(forward(attached, "eval"), before)


def test_a_copy_is_independent(method: str) -> None:
    codec, _ = built("bmshj2018-hyperprior")
    attached = attach(codec, method, **settings(method))
    twin = copy.deepcopy(attached)
    state, before = (
        {k: v.clone() for k, v in attached.state_dict().items()},
        forward(attached, "eval"),
    )
    train(twin, 3)
    for part in (twin.methods, twin.codec):
        for parameter in part.parameters():
            parameter.data.mul_(0.5)
    assert same_state(state, attached.state_dict())
    assert torch.equal(forward(attached, "eval"), before)
    assert not torch.equal(forward(twin, "eval"), before)
    if twin.levels is not None:
        twin.levels.assign(0)
        assert attached.levels is not None and float(attached.levels.now) == attached.levels.top
    twin.detach()
    assert hook_count(twin.codec) == 0
    assert attached.methods[0].rates_field or torch.equal(forward(attached, "eval"), before)


def test_a_state_dict_resumes_identically(method: str) -> None:
    first = attach(built("bmshj2018-hyperprior")[0], method, **settings(method))
    optimizer = optimizer_for(first)
    first.train()
    for number in range(3):
        step(first, optimizer, number)
    second = attach(built("bmshj2018-hyperprior")[0], method, **settings(method))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = optimizer_for(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.train()
    for number in range(3, 7):
        step(first, optimizer, number)
        step(second, resumed, number)
    assert same_state(first.state_dict(), second.state_dict())
    assert first.keep() == second.keep() and first.done == second.done


def assert_plain(small: nn.Module, codec: nn.Module) -> None:
    """It is of the codec's class, with nothing of this package left on it but the groups that are
    known, which copies leave behind.
    """
    assert type(small) is type(codec) and hook_count(small) == 0
    assert not any(type(m).__module__.startswith("nicprune") for m in small.modules())
    for one, allowed in ((small, {ATTRIBUTE}), (copy.deepcopy(small), set())):
        left = {
            key
            for m in one.modules()
            for key, value in m.__dict__.items()
            if "nicprune" in type(value).__module__
        }
        assert left <= allowed
    assert list(small.state_dict()) == list(codec.state_dict())
    assert small.training == codec.training


def in_float64(model: nn.Module, **rate: float) -> Tensor:
    """What comes out of a copy in float64, evaluated."""
    double = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        if isinstance(double, Attached) and double.levels is not None:
            return double(image(double.codec, 2), **rate)["x_hat"]
        inner = getattr(double, "codec", double)
        return forward_for_analysis(inner, image(inner, 2))["x_hat"]


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / first.abs().max())


@pytest.mark.parametrize(("method", "name"), [(m, c) for m, c in PAIRS if m not in STAYING])
def test_hardening_gives_a_plain_codec(method: str, name: str) -> None:
    codec, groups = built(name)
    attached = attach(codec, method, **settings(method))
    if not attached.done:
        train(attached, METHOD_SETTINGS[method]["decay_steps"])
    assert attached.done and attached.stays is False
    attached.prepare([image(codec, seed) for seed in range(2)])
    state, hooks = state_of(attached), hook_count(codec)
    drawn = torch.random.get_rng_state()
    small = attached.harden()
    assert same_state(state, attached.state_dict()) and hook_count(codec) == hooks
    assert drawn.equal(torch.random.get_rng_state()), "a look draws no random numbers"
    assert_plain(small, codec)
    cost = CostModel(small, attached.groups.__class__([]))
    assert cost.totals() == attached.cost.totals(attached.keep())
    if "budget" in METHOD_SETTINGS.get(method, {}):
        share = cost.totals().macs / attached.cost.original.macs
        assert 0.45 < share <= 0.5
    # The attached codec and the folded one of full width are one function (weights times masks is
    # rounded to float32), and so is the small one where the masks of what goes are zero.
    plain = attached.plain()
    assert hook_count(plain) == 0
    results = [in_float64(model) for model in (attached, plain, small)]
    assert relative(results[0], results[1]) <= 1e-5
    if method == "mask_decay":
        assert relative(results[0], results[1] - results[2] + results[0]) <= 1e-10


def staying(method: str, name: str) -> tuple[Attached, nn.Module]:
    """A codec with a method that stays, trained until it is done, and gates measured on two
    images.
    """
    codec, _ = built(name)
    attached = attach(codec, method, **settings(method))
    train(attached, max(steps_of(method), 2))
    assert attached.done and attached.stays
    attached.calibrate([image(codec, 20), image(codec, 21)])
    return attached, codec


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((m, CODECS[0]) for m in STAYING if m != "scalable_encoder"),
        ("channel_gating", "mbt2018"),
        ("channel_gating", "elic2022-chandelier"),
        ("modulated_autoencoder", "cheng2020-attn"),
    ],  # fmt: skip
)
def test_what_stays_is_attached_again_to_what_is_left(method: str, name: str) -> None:
    attached, codec = staying(method, name)
    state, hooks, keep = state_of(attached), hook_count(codec), attached.keep()
    drawn = torch.random.get_rng_state()
    small = attached.harden()
    assert same_state(state, attached.state_dict()) and hook_count(codec) == hooks
    assert drawn.equal(torch.random.get_rng_state()), "a look draws no random numbers"
    assert (
        isinstance(small, Attached)
        and type(small.codec) is type(codec)
        and small.codec is not codec
    )
    assert small.stays and small.done and small.training == codec.training
    assert [(m.name, m.config) for m in small.methods] == [
        (m.name, m.config) for m in attached.methods
    ]
    assert list(small.state_dict()) == list(attached.state_dict())
    shared = {p.untyped_storage().data_ptr() for p in attached.state_dict().values() if p.numel()}
    assert not shared & {
        p.untyped_storage().data_ptr() for p in small.state_dict().values() if p.numel()
    }
    cost = CostModel(small.codec, attached.groups.__class__([]))
    assert cost.totals() == attached.cost.totals(keep)
    if method == "channel_gating":
        assert sum(attached.groups[n].width - len(kept) for n, kept in keep.items()) >= 3
    else:
        assert not keep and torch.equal(forward(small, "eval"), forward(attached, "eval"))
        others: dict[str, dict[str, Any]] = {
            "slimmable": {"width": 1},
            "adaptation": {"domain": "source"},
            "temporal_entropy_model": {},
        }
        other = others.get(method, {"level": 0.6})
        with torch.no_grad():
            x = image(codec, 2)
            assert torch.equal(
                small.eval()(x, **other)["x_hat"], attached.eval()(x, **other)["x_hat"]
            )
    small.eval().update(force=True)
    with torch.no_grad():
        sent = small.compress(image(codec, 2))
        first, second = (
            small.decompress(sent["strings"], sent["shape"])["x_hat"] for _ in range(2)
        )
    assert torch.equal(first, second) and bool(torch.isfinite(first).all())
    # The hooks are those of its own methods, and nothing is left when they are gone.
    assert (hook_count(small.codec) > 0) == (method not in HOOKLESS)
    assert_plain(small.detach(), codec.eval())


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018"])
@pytest.mark.parametrize("method", MODULATORS)
def test_hardening_at_a_level_gives_a_plain_codec(method: str, name: str) -> None:
    attached, codec = staying(method, name)
    for rate in ({"level": 0.6}, {"lmbda": 0.0018}):
        small = attached.harden(**rate)
        assert_plain(small, codec)
        assert all(p.requires_grad for p in small.parameters())
        # Weights times scales are rounded to float32.
        assert relative(in_float64(attached, **rate), in_float64(small)) <= 1e-5
    assert relative(in_float64(attached, level=2), in_float64(small)) > 1e-2


def test_gates_that_do_not_stay_leave_a_plain_codec() -> None:
    codec, _ = built("mbt2018")
    attached = attach(codec, "channel_gating", **settings("channel_gating", rest="open"))
    train(attached, steps_of("channel_gating"))
    attached.calibrate([image(codec, 20), image(codec, 21)])
    assert attached.done and not attached.stays
    small = attached.harden()
    assert_plain(small, codec)
    assert CostModel(small, attached.groups.__class__([])).totals() == attached.cost.totals(
        attached.keep()
    )
    assert sum(attached.groups[n].width - len(kept) for n, kept in attached.keep().items()) >= 3
    plain = attached.plain()
    assert_plain(plain, codec)
    assert relative(in_float64(plain), in_float64(small)) <= 1e-10


def test_an_unknown_setting_names_the_closest(method: str) -> None:
    codec, _ = built("bmshj2018-hyperprior")
    known = list(METHODS[method].Config.model_fields)
    wrong = (known[0] if known else "x") + "s"
    with pytest.raises(RecipeError) as error:
        attach(codec, method, **settings(method, **{wrong: 1}))
    assert wrong in str(error.value) and (not known or repr(known[0]) in str(error.value))
    assert hook_count(codec) == 0


def test_an_unknown_method_names_the_closest() -> None:
    with pytest.raises(NicpruneError, match="mask_decay"):
        attach(built("bmshj2018-hyperprior")[0], "mask_decai")


def test_a_failure_at_the_last_of_several_methods_leaves_no_hook() -> None:
    codec, _ = built("bmshj2018-hyperprior")
    with pytest.raises(NicpruneError):
        attach(
            codec,
            [("mask_decay", settings("mask_decay")), ("magnitude", {"budget": {"macs": 0.00001}})],
        )
    assert hook_count(codec) == 0


# -- mask decay -----------------------------------------------------------------------------------


def decaying(name: str = "bmshj2018-hyperprior", **more: Any) -> tuple[Attached, MaskDecay]:
    attached = attach(built(name)[0], "mask_decay", **settings("mask_decay", **more))
    only = attached.methods[0]
    assert isinstance(only, MaskDecay)
    return attached, only


def all_masks(method: Method) -> Tensor:
    return torch.cat([p.detach().flatten() for p in method.manually_updated()])


@pytest.mark.parametrize(
    ("criterion", "values"),
    [("decay", [1.0, 0.5, 0.0, 0.25]), ("l1", [0.0, 1.0, 1.0, 1.0]), ("l2", [0.0, 0.5, 1.0, 1.25])],
)
def test_the_gradient_of_each_criterion(criterion: str, values: list[float]) -> None:
    _, method = decaying(criterion=criterion)
    assert method._criterion(torch.tensor([0.0, 0.5, 1.0, 1.25])).tolist() == values


@pytest.mark.parametrize("target", [{}, {"budget": None, "widths": {"g_a.*": 8}}])
def test_with_equal_rates_the_criterion_alone_tells_masks_apart(target: dict[str, Any]) -> None:
    by_importance, equal = (decaying(rates=r, **target)[1] for r in ("importance", "equal"))
    importance = torch.linspace(0.1, 2.0, len(all_masks(equal)))
    rates = [m._rates(m._soft_widths(m.current), importance) for m in (by_importance, equal)]
    assert len(rates[0].unique()) > 1
    assert rates[1].tolist() == [1.0] * len(importance)
    # Masks that no gradient moves fall side by side: all are as high after some steps.
    for method in (by_importance, equal):
        method.fisher.copy_(importance)
        for parameter in method.manually_updated():
            parameter.grad = torch.zeros_like(parameter)
        method.after_step()
    assert len(all_masks(equal).unique()) == 1 and float(all_masks(equal)[0]) < 1
    assert len(all_masks(by_importance).unique()) > 1


@pytest.mark.parametrize("criterion", ["decay", "l1", "l2"])
@pytest.mark.parametrize(
    "target",
    [
        {"budget": {"macs": 0.5}},
        {"budget": {"macs": 0.5}, "rates": "equal"},
        {"budget": {"encoder": 0.6, "decoder": 0.5}},
        {"budget": None, "widths": {"g_a.*": 8, "h_s.0": 3}},
    ],
)
def test_masks_decay_to_an_exact_target(criterion: str, target: dict[str, Any]) -> None:
    attached, method = decaying(criterion=criterion, decay_steps=12, **target)
    attached.train()
    optimizer = optimizer_for(attached)
    for number in range(12):
        assert not attached.done
        with pytest.raises(TrainingError, match="step"):
            attached.harden()
        step(attached, optimizer, number)
        assert float(all_masks(method).min()) >= 0
    assert attached.done
    keep = attached.keep()
    gone = torch.cat(
        [
            ~torch.isin(torch.arange(attached.groups[n].width), torch.tensor(keep[n]))
            for n in method.free_names
        ]
    )
    assert bool((all_masks(method)[gone] == 0).all())
    if target["budget"]:
        totals, original = attached.cost.totals(keep), attached.cost.original
        for what, share in target["budget"].items():
            assert getattr(totals, what) <= share * getattr(original, what)
        wider = {n: len(k) for n, k in keep.items()}
        for name in wider:
            if wider[name] < attached.groups[name].width:
                more = attached.cost.totals({**wider, name: wider[name] + 1})
                assert any(
                    getattr(more, what) > share * getattr(original, what)
                    for what, share in target["budget"].items()
                )
    else:
        assert {n: len(k) for n, k in keep.items()} == {
            "g_a.0": 8,
            "g_a.2": 8,
            "g_a.4": 8,
            "h_s.0": 3,
        }
    small = attached.harden()
    assert {n: len(k) for n, k in keep.items()} == {
        n: small.get_submodule(n).out_channels for n in keep
    }


def test_the_target_is_met_even_without_any_gradient() -> None:
    attached, _ = decaying(decay_steps=8)
    for _ in range(8):
        attached.after_step()
    assert attached.done
    assert attached.cost.totals(attached.keep()).macs <= 0.5 * attached.cost.original.macs
    attached.harden()


def test_an_optimiser_that_also_steps_the_masks_changes_nothing() -> None:
    found = []
    for outside in (False, True):
        attached, method = decaying(decay_steps=10)
        attached.train()
        own = {id(p) for p in method.manually_updated()}
        parameters = [
            p
            for n, p in attached.named_parameters()
            if (outside or id(p) not in own) and not n.endswith("quantiles")
        ]
        optimizer = torch.optim.Adam(parameters, lr=1e-3, weight_decay=0)
        for number in range(12):
            step(attached, optimizer, number)
        found.append({k: v.clone() for k, v in attached.state_dict().items()})
    assert same_state(*found)


@pytest.mark.parametrize("name", ["bmshj2018-factorized", "mbt2018-mean"])
@pytest.mark.parametrize("latents", [False, True])
def test_any_masks_fold_into_the_weights(name: str, latents: bool) -> None:
    """Those of a kept channel are seldom 1, and those of a latent that goes leave no median
    behind.
    """
    attached, method = decaying(name, decay_steps=4, latents=latents)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.manually_updated():
            values = 0.6 + 0.6 * torch.rand(parameter.shape, generator=generator)
            parameter.copy_(
                torch.where(
                    torch.rand(parameter.shape, generator=generator) < 0.3, torch.zeros(()), values
                )
            )
    attached.eval()
    plain, x = attached.plain().double(), image(attached.codec, 2).double()
    with torch.no_grad():
        mine, folded = copy.deepcopy(attached).double()(x)["x_hat"], plain(x)["x_hat"]
    assert float((mine - folded).abs().max() / mine.abs().max()) <= 1e-5


def test_attached_bitstreams_are_those_of_the_masks() -> None:
    attached, _ = decaying(decay_steps=4)
    train(attached, 4)
    attached.eval()
    x = image(attached.codec, 2)
    small = attached.harden()
    small.update(force=True)
    with torch.no_grad():
        sent = attached.compress(x)
        mine = attached.decompress(sent["strings"], sent["shape"])["x_hat"]
        theirs = small.compress(x)
        other = small.decompress(theirs["strings"], theirs["shape"])["x_hat"]
    assert float((mine - other).abs().mean()) < 1e-3
    assert not attached.codec.entropy_bottleneck._quantized_cdf.numel()


def test_magnitude_drops_what_is_small() -> None:
    codec, groups = built("bmshj2018-hyperprior")
    with torch.no_grad():
        for member in groups["g_a.2"].members:
            module = codec.get_submodule(member.module)
            if member.axis == "both":
                continue
            rows = module.weight if member.axis == "out" else module.weight.transpose(0, 1)
            rows[[1, 7, 9]] *= 1e-4
            if member.axis == "out":
                module.bias[[1, 7, 9]] = 0
    kept = attach(codec, "magnitude", widths={"g_a.2": 13}).keep()["g_a.2"]
    assert kept == [i for i in range(16) if i not in (1, 7, 9)]


def test_random_follows_its_seed() -> None:
    def kept(seed: int) -> Any:
        return attach(
            built("mbt2018")[0], "random", budget={"macs": 0.5}, round_to=1, seed=seed
        ).keep()

    assert kept(1) == kept(1) != kept(2)


def test_keep_lists_of_several_methods_are_joined() -> None:
    codec, groups = built("bmshj2018-hyperprior")
    both = attach(
        codec,
        [
            ("random", {"widths": {"g_a.0": 9}}),
            ("magnitude", {"widths": {"g_a.2": 5}}),
        ],
    )
    parts = [m.select() for m in both.methods]
    assert both.keep() == {"g_a.0": parts[0]["g_a.0"], "g_a.2": parts[1]["g_a.2"]}
    assert both.harden().g_a[2].out_channels == 5
    assert random_keep(groups, 0)


def test_what_gates_and_a_pruner_keep_is_what_both_keep() -> None:
    both = attach(
        built("bmshj2018-hyperprior")[0],
        [
            ("magnitude", {"widths": {"g_a.0": 9}}),
            ("channel_gating", METHOD_SETTINGS["channel_gating"]),
        ],
    )
    torch.manual_seed(0)
    for gate in both.methods[1].each().values():
        gate.open_rate.uniform_(0, 1)
    pruned, gated = (m.select()["g_a.0"] for m in both.methods)
    assert both.keep()["g_a.0"] == sorted(set(pruned) & set(gated))
    assert 0 < len(both.keep()["g_a.0"]) < min(len(pruned), len(gated))


def test_a_limit_that_is_met_draws_no_decay_to_its_side() -> None:
    attached, method = decaying(budget={"encoder": 0.8, "decoder": 0.8})
    values = method.current.clone()
    parts = dict(zip(method.free_names, values.split(method._sizes), strict=True))
    for name, part in parts.items():
        if name.startswith("g_a"):
            part.zero_()  # the encoder has given more than enough
    rates = dict(
        zip(
            method.free_names,
            method._rates(method._soft_widths(values), torch.ones_like(values)).split(
                method._sizes
            ),
            strict=True,
        )
    )
    encoder = max(float(rates[name].max()) for name in rates if name.startswith("g_a"))
    decoder = min(float(rates[name].min()) for name in rates if name.startswith("g_s"))
    assert encoder < decoder


def test_photographs_go_where_the_codec_is(monkeypatch: pytest.MonkeyPatch) -> None:
    attached = attach(
        built("bmshj2018-hyperprior")[0], "channel_gating", **METHOD_SETTINGS["channel_gating"]
    )
    x, seen = image(attached.codec), []
    for what in ("prepare", "calibrate"):
        monkeypatch.setattr(
            type(attached.methods[0]),
            what,
            lambda self, model, images: seen.append([i.device.type for i in images]),
        )
    attached.codec.to("meta")
    attached.prepare([x])
    attached.calibrate([x, x])
    assert seen == [["meta"], ["meta", "meta"]]


PLUGIN = """
from nicprune.methods import METHODS
from nicprune.methods.pruners.random import Random

@METHODS.register("{name}")
class Own(Random):
    name = "{name}"
    summary = "from elsewhere"
"""


def test_methods_of_other_packages_come_in_by_an_entry_point(tmp_path: Path) -> None:
    for name, text in {"own_method": PLUGIN.format(name="own_method"), "broken": "1 / 0"}.items():
        (tmp_path / f"{name}.py").write_text(text)
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[nicprune.methods]\n{name} = {name}\n")
    done = subprocess.run(
        [sys.executable, "-m", "nicprune", "list", "methods"],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "default"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    assert re.search(r"own_method +from elsewhere", done.stdout)
    assert "the method 'broken' of broken is left out: ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("item", [int, 3, "magnitude", METHODS["magnitude"].Config], ids=repr)
def test_what_is_no_method_is_not_registered(item: Any) -> None:
    with pytest.raises(NicpruneError, match="a method is a class derived from Method"):
        METHODS.register("no_method")(item)
    assert "no_method" not in METHODS


SELECTIONS: dict[str, Any] = {
    "booleans": lambda group: [i % 2 == 0 for i in range(group.width)],
    "an array of booleans": lambda group: np.arange(group.width) % 2 == 0,
    "a channel twice": lambda group: [0, *range(group.width - 1)],
    "unsorted": lambda group: [*range(1, group.width), 0],
    "out of range": lambda group: [0, group.width],
    "negative": lambda group: [-1, 0],
    "none at all": lambda group: [],
    "a number of channels": lambda group: 4,
    "fractions": lambda group: [0.0, 1.5],
}


@pytest.mark.parametrize("what", [*SELECTIONS, "nothing", "a list", "another group"])
def test_a_selection_is_of_channels_or_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attached = attach(
        built("bmshj2018-hyperprior")[0], "magnitude", budget={"macs": 0.5}, round_to=1
    )
    pruner: Any = attached.methods[0]
    group = pruner.config.free(attached.groups)[0]
    found = {"nothing": None, "a list": [group.name], "another group": {"g_z.0": [0, 1]}}
    if what in SELECTIONS:
        found = {what: {group.name: SELECTIONS[what](group)}}
    monkeypatch.setattr(type(pruner), "select", lambda self: found[what])
    for act in (attached.keep, attached.harden):
        with pytest.raises(RecipeError, match=r"magnitude: select\(\) returns lists of") as told:
            act()
        assert "\n" not in str(told.value)


def test_methods_that_log_alike_do_not_overwrite_each_other() -> None:
    settings = {"decay_steps": 6, "round_to": 1, "budget": {"macs": 0.5}}
    attached = attach(
        built("bmshj2018-hyperprior")[0],
        [("mask_decay", settings), ("channel_gating", METHOD_SETTINGS["channel_gating"])],
    )
    assert {"mask_decay/macs", "channel_gating/macs", "mask_decay/rho"} <= attached.metrics().keys()


PRUNERS = [name for name in sorted(METHODS) if issubclass(METHODS[name].Config, Target)]
PRUNER_PAIRS = list(combinations_with_replacement(PRUNERS, 2))


@pytest.mark.parametrize(("one", "other"), PRUNER_PAIRS)
def test_two_methods_do_not_choose_channels_of_the_same_groups(one: str, other: str) -> None:
    codec, groups = built("bmshj2018-hyperprior")
    with pytest.raises(RecipeError, match=f"{one} and {other} would both choose .* channel group"):
        attach(codec, [(one, settings(one)), (other, settings(other))])
    last = max(groups.prunable(), key=lambda group: group.width).name
    for narrow in (
        (other, settings(other, budget={"macs": 0.9}, only=[last])),
        ("magnitude", {"widths": {last: 3}}),
    ):
        with pytest.raises(RecipeError, match=f"would both choose .* group {last},"):
            attach(codec, [(one, settings(one)), narrow])
    assert hook_count(codec) == 0


@pytest.mark.parametrize(("one", "other"), PRUNER_PAIRS)
def test_two_methods_share_a_codec_by_side(one: str, other: str) -> None:
    budget = {"budget": {"macs": 0.8}}
    attached = attach(
        built("bmshj2018-hyperprior")[0],
        [
            (one, settings(one, side="encoder", **budget)),
            (other, settings(other, side="decoder", **budget)),
        ],
    )
    assert attached.detach() is attached.codec


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_setting_that_says_how_long_it_learns_exists(name: str) -> None:
    field = METHODS[name].steps_field
    assert field == "" or field in METHODS[name].Config.model_fields
    assert bool(field) == any(f.endswith("_steps") for f in METHODS[name].Config.model_fields)
