"""Methods beside each other: what each says of sides, budgets and channels holds of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import MeanScaleHyperprior
from compressai.optimizers import net_aux_optimizer
from helpers import QUICK_FIT, built, image, state_of
from torch import Tensor

from nicprune.common.errors import DataError, RecipeError, TrainingError
from nicprune.methods import attach
from nicprune.methods.gating.gate import Gate
from nicprune.methods.video.coder import video_coder
from nicprune.storage.checkpoint import load, save
from nicprune.training.loop import fit


def codec() -> Any:
    return built("bmshj2018-hyperprior")[0]


def moved(before: dict[str, Tensor], codec: Any) -> set[str]:
    """Modules of the codec of which something has changed, their CDF tables aside."""
    tables = ("_offset", "_quantized_cdf", "_cdf_length", "scale_table")
    return {
        name.split(".")[0]
        for name, value in codec.state_dict().items()
        if not name.endswith(tables) and not torch.equal(value, before[name])
    }


def own_loop(attached: Any, steps: int) -> None:
    attached.train()
    optimizer = torch.optim.Adam(attached.parameters(), 1e-3)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        torch.manual_seed(step)
        out = attached(x)
        bits = sum(-torch.log2(p).sum() for p in out["likelihoods"].values()) / (2 * 64 * 64)
        optimizer.zero_grad()
        (
            0.01 * 255**2 * (out["x_hat"] - x).square().mean() + bits + attached.loss(out, x)
        ).backward()
        optimizer.step()
        attached.after_step()
    attached.eval()


# -- sides ----------------------------------------------------------------------------------------

DECAY = {"decay_steps": 4, "round_to": 1}


def test_pruners_of_both_sides_train_both(few_photos: Path) -> None:
    stack = [
        ("mask_decay", {**DECAY, "side": side, "budget": {side: 0.8}})
        for side in ("encoder", "decoder")
    ]
    whole = {"g_a", "g_s", "h_a", "h_s", "entropy_bottleneck"}
    for train in (
        lambda one: fit(one, few_photos, steps=4, **QUICK_FIT),
        lambda one: own_loop(one, 4),
    ):
        one = codec()
        before = state_of(one)
        attached = attach(one, stack)
        train(attached)
        assert moved(before, one) == whole


def test_what_stays_after_one_side_was_pruned_keeps_to_it(few_photos: Path, tmp_path: Path) -> None:
    stack = [
        ("mask_decay", {**DECAY, "side": "encoder", "budget": {"encoder": 0.8}}),
        ("channel_gating", {"transforms": ["g_a"], "gating_steps": 4, "alpha": 0.5}),
    ]
    attached = attach(codec(), stack)
    fit(attached, few_photos, steps=4, **QUICK_FIT)
    small: Any = attached.harden()
    again: Any = load(save(small, tmp_path / "a.safetensors"))
    for one, train in (
        (small, lambda one: fit(one, few_photos, steps=2, **QUICK_FIT)),
        (again, lambda one: own_loop(one, 2)),
    ):
        before = state_of(one.codec)
        train(one)
        assert moved(before, one.codec) == {"g_a", "h_a"}


def test_a_codec_pruned_anew_is_trained_whole(few_photos: Path) -> None:
    attached = attach(codec(), "mask_decay", side="encoder", budget={"encoder": 0.8}, **DECAY)
    fit(attached, few_photos, steps=4, **QUICK_FIT)
    small = attached.harden()
    again = attach(small, "mask_decay", budget={"macs": 0.8}, **DECAY)
    before = state_of(small)
    fit(again, few_photos, steps=4, **QUICK_FIT)
    assert {"g_a", "g_s"} <= moved(before, small)


# -- gates ----------------------------------------------------------------------------------------

MASKS = {
    "mask_decay": {"budget": {"macs": 0.5}, "decay_steps": 60, "round_to": 1},
    "group_lasso": {"budget": {"macs": 0.5}, "decay_steps": 60, "round_to": 1},
}
GATES = {"budget": {"macs": 0.45}, "gating_steps": 60, "round_to": 1, "freeze": 0.0}


def gated(first: str, *, gates_first: bool = False, **more: Any) -> Any:
    stack = [(first, MASKS[first]), ("channel_gating", GATES | more)]
    attached = attach(codec(), stack[::-1] if gates_first else stack)
    own_loop(attached, 60)
    return attached


@pytest.mark.parametrize("gates_first", [False, True])
@pytest.mark.parametrize("first", sorted(MASKS))
def test_gates_decide_alike_once_masked_channels_are_gone(
    first: str, gates_first: bool, tmp_path: Path
) -> None:
    attached = gated(first, gates_first=gates_first)
    small = attached.harden()
    assert any(bool((gate.rest != 1).any()) for gate in small.methods[0].each().values())
    file = save(small, tmp_path / "a.safetensors")
    with torch.no_grad():
        for number in range(3):
            x = image(attached.codec, number)
            expected = attached(x)["x_hat"]
            for one in (small, load(file)):
                assert torch.allclose(one.eval()(x)["x_hat"], expected, atol=1e-4)


def test_the_channel_that_is_always_open_is_not_one_of_zeros() -> None:
    """One that a mask has made zero will be gone, and another would open in its place."""
    gate = Gate(4, "mean", 0, "channel").eval()
    gate.threshold.data = torch.tensor([5.0, 1.0, 9.0, 7.0])
    energy = torch.tensor([[2.0, 0.0, 3.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    assert gate.decide(energy).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def test_files_of_gates_that_say_nothing_of_removed_channels_are_read(tmp_path: Path) -> None:
    attached = attach(codec(), "channel_gating", gating_steps=4, alpha=0.5)
    own_loop(attached, 4)
    small = attached.harden()
    file = save(small, tmp_path / "a.safetensors")
    gate = next(iter(small.methods[0].each().values()))
    state = {f"x.{k}": v for k, v in gate.state_dict().items() if k != "rest"}
    gate.rest = torch.full((int(gate.width),), 0.5)
    gate._load_from_state_dict(state, "x.", {}, True, [], [], [])
    assert torch.equal(gate.rest, torch.ones(int(gate.width)))
    assert load(file)


@pytest.mark.parametrize(
    ("budget", "whole"),
    [
        ({"decoder": 0.7}, ["encoder"]),
        ({"encoder": 0.7}, ["decoder"]),
        ({"decoder": 0.7, "encoder": 0.8}, []),
        ({"macs": 0.75, "split": 0.3}, []),
    ],
    ids=str,
)
def test_gates_close_where_the_budget_says(budget: dict[str, float], whole: list[str]) -> None:
    attached = attach(codec(), "channel_gating", budget=budget, gating_steps=80, round_to=1)
    own_loop(attached, 80)
    attached.calibrate([image(attached.codec, 0), image(attached.codec, 1)])
    gating: Any = attached.methods[0]
    found, original = gating.expected(), attached.cost.original
    for name, limit in gating.config.budget.limits(original).items():
        assert 0.85 * limit < found[name] <= limit, name
    for side in whole:  # h_s runs on both sides
        assert found[side] >= 0.95 * getattr(original, side)


def test_a_split_by_trial_is_refused_for_gates() -> None:
    with pytest.raises(RecipeError, match="split: auto compares codecs whose channels are removed"):
        attach(codec(), "channel_gating", budget={"macs": 0.6, "split": "auto"}, gating_steps=4)


# -- refused, or of no effect ---------------------------------------------------------------------


def test_encoders_of_whole_latents_are_not_added_up() -> None:
    settings = {"encoders": 2, "share": 0.5, "round_to": 1, "residual": False}
    with pytest.raises(RecipeError, match="residual: false trains each encoder alone.*average"):
        attach(codec(), "scalable_encoder", **settings)
    assert attach(codec(), "scalable_encoder", form="average", **settings)


def test_narrow_widths_learn_by_squared_error_alone(few_photos: Path) -> None:
    attached = attach(codec(), "slimmable", widths=[1.0, 0.5], round_to=1, distill=0.5)
    with pytest.raises(RecipeError, match="distill is by squared error.*ms-ssim: leave it out"):
        fit(attached, few_photos, steps=1, metric="ms-ssim", **(QUICK_FIT | {"patch_size": 192}))


@pytest.mark.parametrize("budget", [{"kmac": 1.5}, {"macs": 0.5, "split": 0.5}], ids=str)
def test_budgets_of_a_temporal_network_are_shares_of_its_own(budget: dict[str, float]) -> None:
    decay = {"budget": budget, "decay_steps": 4}
    with pytest.raises(RecipeError, match="budget is a share of the network's own macs or params"):
        attach(MeanScaleHyperprior(8, 12), "temporal_entropy_model", mask_decay=decay)


def test_frames_of_the_source_domain_are_coded_as_by_the_codec() -> None:
    plain = codec().eval()
    plain.update()
    x = image(plain, 0)
    strings, shape, _ = video_coder(plain).compress(x)
    attached = attach(plain, "adaptation", form="low_rank", domain="target").eval()
    attached.update(force=True)
    coder = video_coder(attached)
    found, same_shape, _ = coder.compress(x)
    assert found == strings and same_shape == shape
    decoded, _ = coder.decompress(found, same_shape)
    with torch.no_grad():
        assert torch.allclose(decoded.float(), plain(x)["x_hat"].clamp(0, 1), atol=1e-3)


def test_a_frozen_codec_takes_compressais_optimisers() -> None:
    attached = attach(codec(), "bottleneck_scaling", lambdas=[0.01, 0.02])
    made = net_aux_optimizer(
        attached, {"net": {"type": "Adam", "lr": 1e-3}, "aux": {"type": "Adam", "lr": 1e-3}}
    )
    attached.aux_loss().backward()
    made["aux"].step()


@pytest.mark.parametrize("terms", [{"latent": 1.0}, {"features": 1.0}], ids=str)
def test_distillation_compares_in_training_alone(terms: dict[str, float]) -> None:
    attached = attach(codec(), "distillation", **terms)
    x = image(attached.codec, 0)
    assert float(attached.eval().loss(attached(x), x)) == 0
    out = attached.train()(x)
    attached.loss(out, x)
    with pytest.raises(TrainingError, match="call loss once after each"):
        attached.loss(out, x)


@pytest.mark.parametrize("method", ["fisher", "netadapt", "slimmable"])
def test_images_to_examine_are_a_list_of_some(method: str) -> None:
    settings: dict[str, Any] = {"budget": {"macs": 0.8}, "round_to": 1}
    if method == "slimmable":
        settings = {"widths": [1.0, 0.5], "round_to": 1, "order": "importance"}
    attached = attach(codec(), method, **settings)
    with pytest.raises(DataError, match="give at least one"):
        attached.prepare([])
    with pytest.raises(
        DataError, match=r"shape \(1, 3, H, W\), in a list \(got one of \(3, 64, 64"
    ):
        attached.prepare(torch.rand(2, 3, 64, 64))
    attached.prepare([image(attached.codec, 0)])


def test_importance_for_ms_ssim_needs_large_images() -> None:
    one = codec()
    from nicprune.codecs.provenance import provenance

    provenance(one).metric = "ms-ssim"
    attached = attach(one, "fisher", budget={"macs": 0.8}, round_to=1, lmbda=8.0)
    with pytest.raises(DataError, match="ms-ssim needs images of at least 192 pixels"):
        attached.prepare([image(one, 0)])
