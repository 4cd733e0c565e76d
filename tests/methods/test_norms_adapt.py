"""`norms: adapt`: channels that a norm computes over may go, with every method that prunes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import METHOD_SETTINGS, image, same_state, state_of
from torch import nn
from zoo_of_blocks import BlockCodec, C, block_codec

from nicprune.common.errors import RecipeError, TrainingError
from nicprune.data.images import write_png
from nicprune.experiments.recipe_files import read_recipe
from nicprune.methods import METHODS, Attached, attach
from nicprune.methods.pruners.mask_decay import MaskDecay
from nicprune.pruning.cost import measure
from nicprune.pruning.verification import difference
from nicprune.storage.checkpoint import load, save
from nicprune.storage.export import export_onnx
from nicprune.training.loop import fit

NAMES = ["ConvNeXt with LayerNorm", "NAF with LayerNorm", "NAF with GroupNorm", "Swin"]
"""A module of torch, one by hand, groups, and heads."""

PRUNING = [m for m in sorted(METHODS) if "norms" in METHODS[m].Config.model_fields]


def run(codec: nn.Module) -> torch.Tensor:
    codec = copy.deepcopy(codec).double().eval()
    with torch.no_grad():
        out = codec(image(getattr(codec, "codec", codec), 2))
    found: torch.Tensor = out["x_hat"]
    return found


def stream(codec: Any) -> int:
    """Width of the stream that the block's norm computes over."""
    width: int = codec.g_a[0].out_channels
    return width


def decayed(name: str, photos: Path, steps: int = 6, width: int = 1, **more: Any) -> Attached:
    """A codec with mask decay on it that has been trained for some steps."""
    write_png(image(block_codec(name), 3, 96)[0], photos / "a.png")
    attached = attach(block_codec(name), "mask_decay", **TO_ONE | {"widths": {"g_a.0": width}})
    quick = {"batch_size": 2, "patch_size": 64, "lmbda": 0.01, "precision": "32"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the method needs 6 steps")
        fit(attached, photos, steps=steps, progress=False, **quick, **more)
    return attached


TO_ONE: dict[str, Any] = {
    "widths": {"g_a.0": 1},
    "round_to": 1,
    "decay_steps": 6,
    "norms": "adapt",
}


def test_every_method_that_prunes_has_it() -> None:
    assert set(PRUNING) >= {
        "mask_decay",
        "group_lasso",
        "magnitude",
        "fisher",
        "netadapt",
        "random",
        "channel_gating",
        "slimmable",
        "scalable_encoder",
    }


@pytest.mark.parametrize("name", NAMES)
def test_masks_that_have_decayed_are_hardened_exactly(name: str, tmp_path: Path) -> None:
    attached = decayed(name, tmp_path)
    small = attached.harden()
    assert stream(small) < C and widths_of(small)["g_a.0"][1] == 1
    attached.double()
    assert difference(attached.codec, attached.harden(verify=False)) <= 1e-10


def widths_of(codec: Any) -> dict[str, list[int]]:
    found: dict[str, list[int]] = codec.__dict__["_nicprune_provenance"]["history"][-1]["widths"]
    return found


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("steps", [0, 3, 5])
def test_masks_half_way_are_folded_exactly(name: str, steps: int, tmp_path: Path) -> None:
    """Those below the mark count no longer in the statistics, wherever the weights are."""
    if steps:
        attached = decayed(name, tmp_path, steps)
    else:
        attached = attach(
            block_codec(name), "mask_decay", budget={"macs": 0.6}, round_to=1, norms="adapt"
        )
        assert torch.equal(run(attached.codec), run(block_codec(name)))
    method: Any = attached.methods[0]
    position = method.masks.names.index("g_a.0")
    width = len(method.masks.values[position])
    values = torch.linspace(1.0, 0.0, width)
    values[-2] = 0.05  # fades, and does not count
    start = sum(method.masks._sizes[:position])
    for target in (method.masks.values[position].data, method.current[start : start + width]):
        target.copy_(values)
    assert not bool(method.masks.present(position).all())
    attached.double()
    assert difference(attached.codec, attached.plain()) <= 1e-10


def test_a_channel_that_stays_counts_however_small_its_mask(tmp_path: Path) -> None:
    attached = decayed(NAMES[0], tmp_path, width=3)
    method: Any = attached.methods[0]
    kept = attached.keep()["g_a.0"]
    masks, position = method.masks, method.masks.names.index("g_a.0")
    start = sum(masks._sizes[:position])
    for values in (masks.values[position].data, method.current[start : start + C]):
        values[kept] = torch.tensor([0.01, 0.05, 0.02])
    assert masks.present(position).nonzero().flatten().tolist() == kept
    attached.double()
    assert difference(attached.codec, attached.harden()) <= 1e-10


def test_the_norms_see_the_mask_while_it_is_learnt() -> None:
    attached = attach(
        block_codec(NAMES[0]), "mask_decay", budget={"macs": 0.6}, round_to=1, norms="adapt"
    ).train()
    masks: Any = attached.methods[0].masks  # type: ignore[union-attr]
    masks["g_a.0"].data[:3] = 0.0
    out = attached(image(attached.codec, 0))
    out["x_hat"].square().mean().backward()
    assert bool((masks["g_a.0"].grad[3:] != 0).all())
    norm: Any = attached.codec.g_a[1].norm  # type: ignore[index, union-attr]
    assert not norm.weight.grad[:3].any() and bool((norm.weight.grad[3:] != 0).all())
    assert "forward" not in norm.__dict__ and not norm.__dict__.keys() & {"weight", "bias"}


def test_an_interrupted_run_goes_on_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = decayed(NAMES[1], tmp_path, seed=0)
    steps = iter(range(5))
    step = MaskDecay.after_step

    def interrupted(self: MaskDecay) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        step(self)

    run_of = {"folder": tmp_path / "run", "checkpoint_every": 5, "seed": 0}
    monkeypatch.setattr(MaskDecay, "after_step", interrupted)
    with pytest.raises(TrainingError, match="continue from step 5"):  # the choice is made at 4
        decayed(NAMES[1], tmp_path, **run_of)
    monkeypatch.undo()
    again = decayed(NAMES[1], tmp_path, **run_of)
    assert same_state(state_of(whole), state_of(again))
    stays: Any = again.methods[0].masks.stays  # type: ignore[union-attr]
    assert int(stays.sum()) == sum(len(kept) for kept in again.keep().values())


@pytest.mark.parametrize("method", ["magnitude", pytest.param("random", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_codec_is_counted_saved_and_exported(
    name: str, method: str, tmp_path: Path
) -> None:
    codec = block_codec(name)
    attached = attach(codec, method, budget={"macs": 0.3}, round_to=1, norms="adapt")
    small = attached.harden()
    assert attached.cost.totals(attached.keep()) == measure(small)
    path = save(small, tmp_path / "s.safetensors", factory=lambda: copy.deepcopy(codec))
    again = load(path, factory=lambda: copy.deepcopy(codec))
    assert difference(small, again) == 0 and measure(small) == measure(again)
    twice = attach(again, method, budget={"macs": 0.25}, round_to=1, norms="adapt").harden()
    assert measure(twice).macs < measure(again).macs


@pytest.mark.slow
def test_export_of_a_norm_with_fewer_channels(tmp_path: Path) -> None:
    small = attach(
        block_codec("NAF with GroupNorm"), "magnitude", widths={"g_a.0": 1}, norms="adapt"
    ).harden()
    assert {p.name for p in export_onnx(small, tmp_path)} == {"g_a.onnx", "g_s.onnx"}


@pytest.mark.parametrize("name", NAMES)
def test_a_width_of_a_slimmable_codec_is_the_codec_of_that_width(name: str) -> None:
    attached = attach(block_codec(name), "slimmable", widths=[1.0, 0.5], round_to=1, norms="adapt")
    small = attached.extract(1, verify=False).double()
    assert stream(small) == C // 2
    attached = attached.double().eval()
    x = image(attached.codec, 2)
    with torch.no_grad():
        assert torch.allclose(attached(x, width=1)["x_hat"], small(x)["x_hat"], rtol=0, atol=1e-9)


def test_gates_remove_what_never_opens_before_a_norm() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.depth = nn.GroupNorm(1, C), nn.Conv2d(C, C, 3, padding=1, groups=C)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.depth(self.norm(x)).relu()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec: Any = BlockCodec(Body()).eval()
    for norms in ("pinned", "adapt"):
        attached = attach(
            copy.deepcopy(codec),
            "channel_gating",
            alpha=1.0,
            gating_steps=2,
            round_to=1,
            norms=norms,
        )
        attached.prepare([image(codec, 1)])
        attached.train()
        for seed in range(2):
            attached(image(codec, seed))["x_hat"].square().mean().backward()
            attached.after_step()
        gate: Any = attached.methods[0].each()["g_a.2"]  # type: ignore[union-attr, operator]
        gate.open_rate[:5] = 0.0
        gate.open_rate[5:] = 1.0
        small: Any = attached.harden()  # raises unless what is left is the masked function
        assert stream(small.codec) == (3 if norms == "adapt" else C)


def test_a_scalable_encoder_may_lose_them_too() -> None:
    settings = METHOD_SETTINGS["scalable_encoder"] | {"share": 0.2}
    attached = attach(
        block_codec(NAMES[0]), "scalable_encoder", **settings, norms="adapt", lmbda=0.01
    )
    decay: Any = attached.methods[0].decays[0]  # type: ignore[index, union-attr]
    assert "g_a.0" in decay.free_names and decay.masks.stays is not None


def test_methods_on_one_codec_agree() -> None:
    stack: list[tuple[str, Any]] = [
        ("mask_decay", {"budget": {"macs": 0.5}, "round_to": 1, "norms": "adapt"}),
        ("channel_gating", {"alpha": 1.0, "round_to": 1}),
    ]
    codec = block_codec("NAF with LayerNorm")
    with pytest.raises(RecipeError, match="norms: adapt .* give it to channel_gating too"):
        attach(codec, stack)
    attach(codec, [stack[0], ("channel_gating", {**stack[1][1], "norms": "adapt"})]).detach()


def test_another_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="norms"):
        attach(block_codec(NAMES[0]), "magnitude", budget={"macs": 0.5}, norms="free")
    recipe = tmp_path / "own.yaml"
    lines = [
        "version: 1",
        "codec: bmshj2018-hyperprior",
        "qualities: [1]",
        "weights: none",
        "photographs: {train: samples, test: samples}",
        "methods: [{name: magnitude, budget: {macs: 0.5}, norms: WORD}]",
    ]
    recipe.write_text("\n".join(lines).replace("WORD", "adapt"))
    assert read_recipe(str(recipe))[0].methods[0].stack[0].settings["norms"] == "adapt"
    recipe.write_text("\n".join(lines).replace("WORD", "adopt"))
    with pytest.raises(RecipeError, match="norms"):
        read_recipe(str(recipe))


def test_a_norm_inside_another_forward_is_named_in_one_line() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, C, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x).relu()
            return x - x.mean(1, keepdim=True)

    codec = BlockCodec(Inline()).eval()
    with pytest.warns(UserWarning, match=r"mean in g_a\.1 \(Inline\).*register_kind") as told:
        attached = attach(codec, "magnitude", budget={"macs": 0.9}, round_to=1, norms="adapt")
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert attached.groups["g_a.1.conv"].pinned == "mean over channels in g_a.1"
    attached.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(codec, "magnitude", budget={"macs": 0.9}, round_to=1).detach()
