"""In a training loop of one's own, as docs/howto/own_loop.md shows it: what methods do not train
keeps its bits, whatever the optimiser is.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compressai.losses import RateDistortionLoss
from compressai.models import ScaleHyperprior
from compressai.optimizers import net_aux_optimizer
from helpers import METHOD_SETTINGS, built, same_state, state_of
from torch import nn

from nicprune.codecs.roles import on_side
from nicprune.common.errors import CodecError, TrainingError
from nicprune.data.images import write_png
from nicprune.methods import METHODS, Attached, attach
from nicprune.storage.adaptation import save_adaptation
from nicprune.storage.container import decode, encode
from nicprune.training.loop import fit


def image() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


QUICK: dict[str, Any] = {"steps": 2, "batch_size": 1, "patch_size": 64, "progress": False}


def train(model: nn.Module, steps: int = 3, kind: str = "AdamW") -> None:
    """Train as the page does."""
    loss = RateDistortionLoss(0.01)
    optimizers = net_aux_optimizer(
        model, {"net": {"type": kind, "lr": 1e-3}, "aux": {"type": kind, "lr": 1e-2}}
    )
    given: Any = model.train()
    for _ in range(steps):
        batch = image()
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        for width in given.widths_per_step() or [None]:
            out = given(batch, width=width)
            objective = given.objective(out, batch) or loss(out, batch)
            (objective["loss"] + given.loss(out, batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers["net"].step()
        given.after_step()
        given.aux_loss().backward()
        optimizers["aux"].step()


def changed(codec: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in codec.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_one_side_alone_learns(side: str) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    original, before = copy.deepcopy(codec), state_of(codec)
    budget = {side: 0.7}
    model = attach(codec, "mask_decay", side=side, budget=budget, decay_steps=3, round_to=1)
    train(model)
    learnt = changed(codec, before)
    assert learnt and all(on_side(codec, name, side) for name in learnt)
    picture = (image()[0] * 255).byte()
    if side == "encoder":
        small = model.harden().eval()
        assert decode(original, encode(small, picture)).shape == picture.shape
        grads = [p.requires_grad for p in small.parameters()]
        assert all(grads)


@pytest.mark.parametrize(
    "settings",
    [
        {"form": "low_rank"},
        {"form": "grow", "grow": 0.25, "round_to": 4},
        {"form": "decoder_adapter"},
    ],
    ids=lambda settings: settings["form"],
)
def test_the_source_of_an_adaptation_keeps_its_bits(settings: Any, tmp_path: Any) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    before, picture = state_of(codec), (image()[0] * 255).byte()
    old = encode(copy.deepcopy(codec), picture)
    model = attach(codec, "adaptation", domain="mine", **settings)
    train(model)
    assert not changed(codec, before)
    assert decode(model.eval(), old).shape == picture.shape
    save_adaptation(model, tmp_path / "mine.safetensors")


def test_copies_hold_too_and_detaching_lets_go() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    settings: dict[str, Any] = {"side": "encoder", "budget": {"encoder": 0.7}, "round_to": 1}
    model = attach(codec, "mask_decay", decay_steps=3, **settings)
    train(model, 1)
    twin = copy.deepcopy(model)
    before = state_of(twin.codec)
    train(twin)
    assert all(on_side(twin.codec, name, "encoder") for name in changed(twin.codec, before))
    plain, before = model.detach(), state_of(codec)
    out = plain.train()(image())
    out["x_hat"].square().mean().backward()
    assert plain.g_s[0].weight.grad is not None
    assert plain is codec and not changed(codec, before)


def test_fit_trains_both_sides_where_it_is_asked_to() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    settings: dict[str, Any] = {"side": "encoder", "budget": {"encoder": 0.7}, "round_to": 1}
    model = attach(codec, "mask_decay", decay_steps=3, **settings)
    train(model, 1)  # drops gradients of the decoder
    before = state_of(codec)
    fit(model, "samples", side="both", **QUICK)
    assert any(name.startswith("g_s.") for name in changed(codec, before))
    before = state_of(codec)
    train(model, 1)
    assert not any(name.startswith("g_s.") for name in changed(codec, before))


@pytest.mark.parametrize("method", ["mask_decay", "group_lasso"])
def test_averaged_masks_are_not_hardened(method: str) -> None:
    """The average of masks over steps is not zero where the last ones are."""
    model = attach(
        built("bmshj2018-hyperprior")[0],
        method,
        budget={"macs": 0.7},
        round_to=1,
        decay_steps=4,
    )
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for _ in range(4):
        train(model, 1, "Adam")
        average.update_parameters(model)
    averaged: Attached = average.module
    assert model.done and averaged.done
    with pytest.raises(TrainingError, match=r"not zero .*masked.after_step\(\)"):
        averaged.harden()
    averaged.after_step()
    small, x = averaged.harden(), image()
    with torch.no_grad():
        expected, found = averaged.eval()(x)["x_hat"], small(x)["x_hat"]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


FREEZING = [("bottleneck_scaling", {"qualities": [1, 3]})]


@pytest.mark.parametrize("stack", [
    [("group_lasso", METHOD_SETTINGS["group_lasso"]), *FREEZING],
    [("mask_decay", METHOD_SETTINGS["mask_decay"]), *FREEZING],
], ids=["group_lasso", "mask_decay"])  # fmt: skip
def test_methods_that_change_weights_leave_a_frozen_codec_alone(stack: Any) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    before = state_of(codec)
    train(attach(codec, stack))
    assert not changed(codec, before)


def test_gates_that_are_done_do_not_follow_a_frozen_codec() -> None:
    gates = ("channel_gating", METHOD_SETTINGS["channel_gating"] | {"gating_steps": 2})
    attached = attach(built("bmshj2018-hyperprior")[0], [gates, *FREEZING])
    train(attached, 2)
    assert attached.methods[0].done
    before = state_of(attached.methods[0])
    train(attached, 3)
    assert same_state(before, state_of(attached.methods[0]))


@pytest.mark.parametrize("method", ["slimmable", "scalable_encoder"])
def test_a_loop_that_leaves_out_widths_is_told(method: str) -> None:
    attached = attach(built("bmshj2018-hyperprior")[0], method, **METHOD_SETTINGS[method]).train()
    attached(image())
    with pytest.raises(TrainingError, match=f"{method} trains several widths") as told:
        attached.after_step()
    assert "\n" not in str(told.value) and "model.widths_per_step()" in str(told.value)
    first, *others = attached.widths_per_step()
    for width in others[1:]:
        attached(image(), width=width)
    attached(image(), width=first)
    if others:
        with pytest.raises(TrainingError, match="several widths"):
            attached.after_step()
    before = state_of(attached.methods)
    train(attached, 2)
    assert changed(attached.methods, before)


FOLLOW_GRADIENTS = ["mask_decay", "group_lasso", "channel_gating", "scalable_encoder"]


def backward(attached: Attached) -> None:
    """Run both passes of a step, the reconstruction alone being the loss."""
    for width in attached.widths_per_step() or [None]:  # type: ignore[list-item]
        attached(image(), width=width)["x_hat"].square().mean().backward()


def many_steps(method: str, steps: int) -> Attached:
    """A codec with a method that takes so many steps, whatever is shorter in other tests."""
    settings = {**METHOD_SETTINGS[method]}
    settings |= {k: steps for k in ("decay_steps", "gating_steps") if k in settings}
    return attach(built("bmshj2018-hyperprior")[0], method, **settings).train()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("method", FOLLOW_GRADIENTS)
def test_a_loop_that_takes_gradients_away_is_told(method: str, set_to_none: bool) -> None:
    attached = many_steps(method, 50)
    optimizer = torch.optim.Adam(attached.parameters(), 1e-4)

    def step(early: bool) -> None:
        backward(attached)
        optimizer.step()
        if early:
            optimizer.zero_grad(set_to_none=set_to_none)
        attached.after_step()
        optimizer.zero_grad(set_to_none=set_to_none)

    step(early=True)
    step(early=True)
    step(early=False)  # a step may be left out
    step(early=True)
    step(early=True)
    with pytest.raises(TrainingError, match=f"{method} found no gradient in 3 steps") as told:
        step(early=True)
    assert "\n" not in str(told.value) and "before optimizer.zero_grad()" in str(told.value)


@pytest.mark.parametrize("fault", ["taken away", "requires_grad"])
@pytest.mark.parametrize("method", FOLLOW_GRADIENTS)
def test_gradients_of_other_parameters_are_not_those_of_masks(method: str, fault: str) -> None:
    attached = many_steps(method, 50)
    if fault == "requires_grad":
        attached.requires_grad_(False)
        attached.codec.g_s.requires_grad_(True)
    for step in range(3):
        backward(attached)
        if fault == "taken away":
            attached.zero_grad()
            attached.aux_loss().backward()
        if step < 2:
            attached.after_step()
    with pytest.raises(TrainingError, match=f"{method} found no gradient in 3 steps") as told:
        attached.after_step()
    assert "\n" not in str(told.value)
    assert ("requires_grad=False" in str(told.value)) == (fault == "requires_grad")


def test_each_of_several_methods_needs_its_own_gradients() -> None:
    settings: dict[str, Any] = {"decay_steps": 50, "round_to": 1}
    attached = attach(
        built("bmshj2018-hyperprior")[0],
        [
            ("mask_decay", {**settings, "side": "encoder", "budget": {"encoder": 0.7}}),
            ("group_lasso", {**settings, "side": "decoder", "budget": {"decoder": 0.7}}),
        ],
    )
    attached.methods[1].requires_grad_(False)
    for _ in range(2):
        backward(attached.train())
        attached.after_step()
    backward(attached)
    with pytest.raises(TrainingError, match=r"group_lasso .* requires_grad=False"):
        attached.after_step()


@pytest.mark.parametrize("method", FOLLOW_GRADIENTS)
def test_what_is_done_needs_no_gradients(method: str) -> None:
    attached = many_steps(method, 8)
    train(attached, 8)
    assert attached.done
    attached.methods.requires_grad_(False)
    for _ in range(4):
        for width in attached.widths_per_step() or [None]:  # type: ignore[list-item]
            attached(image(), width=width)
        attached.after_step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("method", ["channel_gating", "scalable_encoder"])
def test_what_a_method_has_fixed_keeps_its_bits(method: str, set_to_none: bool) -> None:
    attached = many_steps(method, 8 if method == "scalable_encoder" else 4)
    optimizer = torch.optim.AdamW(attached.parameters(), 1e-3, weight_decay=0.1)

    def steps() -> None:
        for _ in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(attached)
            optimizer.step()
            attached.after_step()

    steps()
    own: Any = attached.methods[0]
    fixed = own.gates if method == "channel_gating" else own.encoders[0]
    before = dict(fixed.named_parameters())
    assert {id(p) for p in before.values()} <= {id(p) for p in own.fixed()}
    before = {name: p.detach().clone() for name, p in before.items()}
    codec = state_of(attached.methods if method == "scalable_encoder" else attached.codec)
    steps()
    assert not changed(fixed, before)
    assert changed(attached.methods if method == "scalable_encoder" else attached.codec, codec)


def test_a_step_may_ask_for_its_widths_again() -> None:
    settings = {"widths": [1.0, 0.8, 0.6, 0.5], "sandwich": 1, "round_to": 1}
    attached = attach(built("bmshj2018-hyperprior")[0], "slimmable", **settings).train()
    for _ in range(8):
        for width in attached.widths_per_step():
            attached(image(), width=width)["x_hat"].mean().backward()
        attached.widths_per_step()
        attached.after_step()


@pytest.mark.parametrize("size", [64, 128])
def test_distilled_widths_are_compared_on_the_same_images(size: int) -> None:
    settings: dict[str, Any] = {"widths": [1.0, 0.5], "round_to": 1, "distill": 1.0}
    attached = attach(built("bmshj2018-hyperprior")[0], "slimmable", **settings).train()
    first, second = image(), 1 - torch.rand(1, 3, size, size)

    def loss(x: torch.Tensor, width: int) -> float:
        return float(attached.loss(attached(x, width=width), x).detach())

    for x in (first, second):
        assert loss(x, 0) == 0 and loss(x.clone(), 1) > 0
    loss(first, 0)
    loss(second, 0)
    with pytest.raises(TrainingError, match="on one batch before the next batch") as told:
        loss(first, 1)
    assert "\n" not in str(told.value)
    attached.eval()
    assert loss(first, 1) == 0


class Nested(ScaleHyperprior):
    """A codec with another one inside."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.source = ScaleHyperprior(8, 12)


STATES: dict[str, tuple[type[ScaleHyperprior], dict[str, Any]]] = {
    **{name: (ScaleHyperprior, METHOD_SETTINGS.get(name, {})) for name in sorted(METHODS)},
    "slimmable with bottlenecks": (ScaleHyperprior, {"widths": [1.0, 0.5], "latents": "slim"}),
    "adaptation that grows": (ScaleHyperprior, {"form": "grow", "grow": 0.5}),
    "mask_decay on a nested codec": (Nested, METHOD_SETTINGS["mask_decay"]),
}


@pytest.mark.parametrize(("there", "here", "wrapped"), [(True, False, False), (False, True, True)])
@pytest.mark.parametrize("kind", STATES)
def test_states_are_taken_with_or_without_tables(
    kind: str, there: bool, here: bool, wrapped: bool
) -> None:
    cls, settings = STATES[kind]
    rounding = {"round_to": 4} if " " in kind else {}

    def made(tables: bool, seed: int) -> Attached:
        torch.manual_seed(seed)
        codec: Any = cls() if cls is Nested else cls(8, 12)
        attached = attach(codec, kind.split(" ")[0], **settings | rounding)
        if tables:
            attached.update()
            if cls is Nested:
                codec.source.update()
        return attached

    model: nn.Module
    found: nn.Module
    model, found = made(there, 0), made(here, 1)
    if wrapped:
        model, found = nn.Sequential(model), nn.Sequential(found)
    state = state_of(model)
    found.load_state_dict(state)
    assert same_state(state, state_of(found))
    found.load_state_dict(found.state_dict())
    assert same_state(state, state_of(found))


class WithNorms(ScaleHyperprior):
    """A codec with batch norms in its analysis."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.g_a = nn.Sequential(
            nn.Conv2d(3, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 5, 4, 2),
            nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 5, 2, 2),
        )  # fmt: skip


def norms(codec: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in codec.modules() if isinstance(layer, nn.BatchNorm2d)]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"distillation"}))
def test_attaching_leaves_the_modes_of_single_layers(method: str) -> None:
    torch.manual_seed(0)
    codec = WithNorms().train()
    for layer in norms(codec):
        layer.eval()
    modes = [module.training for module in codec.modules()]
    with torch.no_grad():
        before = codec.g_a(image())
    attached = attach(codec, method, **METHOD_SETTINGS.get(method, {}))
    assert [module.training for module in codec.modules()] == modes
    with torch.no_grad():
        assert torch.equal(codec.g_a(image()), before)
    assert attached.training
    attached.detach()
    assert [module.training for module in codec.modules()] == modes


def test_a_pruned_codec_has_the_modes_of_its_layers() -> None:
    codec = WithNorms().train()
    norms(codec)[0].eval()
    small = attach(codec, "magnitude", budget={"macs": 0.6}, round_to=1).harden()
    assert [norm.training for norm in norms(small)] == [False, True] and small.training


def test_encoders_that_are_fixed_keep_the_running_means_of_their_norms() -> None:
    torch.manual_seed(0)
    codec = WithNorms().train()
    attached = attach(codec, "scalable_encoder", **METHOD_SETTINGS["scalable_encoder"])
    method: Any = attached.methods[0]
    assert not any(module.training for module in method._teacher[0].modules())
    train(attached, 4)
    assert method.stage == 1
    before = state_of(method.encoders[0])
    train(attached, 3)
    assert same_state(before, state_of(method.encoders[0]))


def test_validation_leaves_frozen_norms_as_they_are(tmp_path: Any) -> None:
    write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    torch.manual_seed(0)
    codec = WithNorms()
    attached = attach(
        codec, "slimmable", widths=[1.0, 0.5], round_to=1, lambdas=[0.01, 0.01],
        schedule={"first": 1, "every": 1, "most": 1},
    )  # fmt: skip
    before = [norm.running_mean.clone() for norm in norms(codec)]  # type: ignore[union-attr]
    fit(attached, tmp_path, side="decoder", validation=tmp_path, **QUICK | {"steps": 3})
    for mean, norm in zip(before, norms(codec), strict=True):
        assert torch.equal(mean, norm.running_mean)  # type: ignore[arg-type]


NARROWED: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "slimmable": (
        "slimmable",
        {"widths": [1.0, 0.5], "round_to": 4},
        [{"width": 0}, {"width": 1}],
    ),
    "scalable_encoder": (
        "scalable_encoder",
        {"encoders": 2, "share": 0.3, "round_to": 1},
        [{"level": 0}, {"level": 1}],
    ),
    "low_rank": (
        "adaptation",
        {"form": "low_rank", "rank": 4, "domain": "screen"},
        [{"domain": "source"}, {"domain": "screen"}],
    ),
    "grow": (
        "adaptation",
        {"form": "grow", "grow": 0.5, "round_to": 4, "domain": "screen"},
        [{"domain": "source"}, {"domain": "screen"}],
    ),
}
"""Codecs that compute at several points, by putting values in front of layers' parameters: method,
settings and points.
"""


def narrowed(case: str) -> Attached:
    name, settings, _ = NARROWED[case]
    model = attach(ScaleHyperprior(16, 24), name, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # new parameters change what is computed
        for parameter in model.methods.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def run_at(run: Any, model: Attached, point: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return x_hat, and the gradients in training."""
    model.zero_grad()
    torch.manual_seed(1)
    x_hat = run(image(), **point)["x_hat"]
    if not model.training:
        return {"x_hat": x_hat.detach()}
    x_hat.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"x_hat": x_hat.detach()}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler, on what it traces
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", NARROWED)
def test_a_compiled_codec_computes_at_the_point_that_is_set(case: str, training: bool) -> None:
    torch.compiler.reset()
    model, points = narrowed(case).train(training), NARROWED[case][2]
    plain = [run_at(model, model, point) for point in points]
    assert not torch.equal(plain[0]["x_hat"], plain[1]["x_hat"])
    compiled = torch.compile(model, backend="eager")
    for point, expected in zip(points, plain, strict=True):
        torch.testing.assert_close(run_at(compiled, model, point), expected, rtol=0, atol=0)
    layer: Any = model.codec.g_s
    layer.compile(backend="eager")  # in place
    for point, expected in zip(points, plain, strict=True):
        torch.testing.assert_close(run_at(model, model, point), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler, on what it traces
@pytest.mark.parametrize("case", NARROWED)
def test_compiling_the_codec_in_the_model_is_refused(case: str) -> None:
    torch.compiler.reset()
    model = narrowed(case).eval()
    model(image(), **NARROWED[case][2][1])
    expected = model(image())["x_hat"]
    with pytest.raises(CodecError, match="compile the model that attach"):
        torch.compile(model.codec, backend="eager")(image())
    assert torch.equal(model(image())["x_hat"], expected)
