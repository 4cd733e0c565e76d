"""Distillation: what the terms are, that keep-lists name the right teacher channels, and that the
teacher leaves no trace; students of one side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import built, image, random_keep, same_state, state_of
from safetensors.torch import load_file
from torch import Tensor, nn

from nicprune.channels.groups import from_ranges, to_ranges
from nicprune.codecs.anatomy import CDF_BUFFERS, rate_distortion_loss
from nicprune.codecs.provenance import provenance
from nicprune.common.errors import CodecError, RecipeError, TrainingError
from nicprune.data.images import calibration_images
from nicprune.methods import Attached, attach
from nicprune.methods.with_teacher import taught, untaught
from nicprune.pruning.masks import masked_copy
from nicprune.storage import container
from nicprune.storage.checkpoint import load, save
from nicprune.storage.named import load_codec
from nicprune.training.loop import fit

ARCHITECTURES = [
    "bmshj2018-factorized",
    "bmshj2018-hyperprior",
    "mbt2018",
    "cheng2020-attn",
    "elic2022-chandelier",
]
DECAY = ("mask_decay", {"budget": {"macs": 0.5}, "round_to": 1, "decay_steps": 6})
QUICK: dict[str, Any] = {"batch_size": 1, "patch_size": 64, "lr": 1e-3, "progress": False}


def term(attached: Attached, x: Tensor, out: dict[str, Any] | None = None) -> float:
    """The extra terms of a training step."""
    attached.train()
    torch.manual_seed(0)
    out = out if out is not None else attached(x)
    return float(attached.loss(out, x).detach())


def cut(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A codec, itself with channels drawn at random zero, and without them; latents whole."""
    codec, groups = built(name)
    widths = {n: len(kept) for n, kept in random_keep(groups, seed, latents=False).items()}
    attached = attach(codec, "random", widths=widths, seed=seed)
    keep = attached.keep()
    return codec, masked_copy(codec, groups.check(keep), groups), attached.harden()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_channels_that_stayed_know_their_teachers(name: str) -> None:
    _, masked, small = cut(name)
    student = attach(
        small,
        "distillation",
        features=1.0,
        latent=1.0,
        transforms=["g_a", "h_a", "h_s", "g_s"],
        teacher=masked,
    )
    method: Any = student.methods[0]
    assert len(method._stages) >= 4 and any(
        len(stage.mine) < len(stage.theirs) or int(stage.theirs.max()) >= len(stage.theirs)
        for stage in method._stages
    )
    student.eval()
    method.train()  # it listens, while the codec rounds as the teacher does
    x = image(small, 0)
    with torch.no_grad():
        assert float(method.loss(student(x), x)) == pytest.approx(0.0, abs=1e-6)
        stage = method._stages[0]
        stage.theirs = stage.theirs.roll(1) if len(stage.theirs) > 1 else stage.theirs + 1
        assert float(method.loss(student(x), x)) > 1e-3, (
            "with other channels for teachers, it is not"
        )


def test_pruning_twice_still_names_them() -> None:
    codec, groups = built("bmshj2018-hyperprior")
    first = attach(codec, "random", widths={"g_s.2": 9, "g_a.0": 7}, seed=1).harden()
    second = attach(first, "random", widths={"g_s.2": 5, "g_a.0": 3}, seed=2).harden()
    student = attach(second, "distillation", features=1.0, teacher=codec)
    method: Any = student.methods[0]
    stage = next(s for s in method._stages if s.module == "g_s.4")
    wide: Any = dict(codec.named_modules())["g_s.4"]
    mine: Any = dict(second.named_modules())["g_s.4"]
    assert torch.equal(mine.weight[stage.mine], wide.weight[stage.theirs]) and len(stage.mine) == 5
    student.detach()
    between: Any = attach(
        second, "distillation", features=1.0, teacher=first
    )  # what it was in between is as good a teacher
    stage = next(s for s in between.methods[0]._stages if s.module == "g_s.4")
    assert torch.equal(
        mine.weight[stage.mine], dict(first.named_modules())["g_s.4"].weight[stage.theirs]
    )


def test_ranges_are_read_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        indices = sorted(rng.choice(40, int(rng.integers(0, 40)), replace=False).tolist())
        assert from_ranges(to_ranges(indices)) == indices
    assert to_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


@pytest.mark.parametrize("weights", ["even", "entropy"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_codec_has_nothing_to_learn_from_itself(name: str, weights: str) -> None:
    codec = built(name)[0]
    attached = attach(
        codec, "distillation", latent=1.0, features=1.0, weights=weights, transforms=["g_a", "h_a"]
    )
    assert term(attached, image(codec, 0)) == pytest.approx(0.0, abs=1e-6)
    (
        codec.g_a[0].weight.data.mul_(1.1)
        if hasattr(codec.g_a[0], "weight")
        else codec.g_a[0].conv1.weight.data.mul_(1.1)
    )
    assert term(attached, image(codec, 0)) > 1e-4


def test_output_mixes_the_targets() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    attached = attach(codec, "distillation", output=0.3, lmbda=0.02)
    x, made = image(codec, 0), image(codec, 1).requires_grad_(True)
    with torch.no_grad():
        target = codec.eval()(x)["x_hat"].clamp(0, 1)
    whole = 0.02 * 255**2 * (made - x).square().mean() + attached.loss({"x_hat": made}, x)
    mixed = 0.02 * 255**2 * (0.7 * (made - x).square() + 0.3 * (made - target).square()).mean()
    assert float(whole.detach()) == pytest.approx(float(mixed.detach()), rel=1e-5)
    assert torch.allclose(
        torch.autograd.grad(whole, made, retain_graph=True)[0],
        torch.autograd.grad(mixed, made)[0],
        atol=1e-7,
    )


def test_latent_terms_are_squared_steps_per_pixel() -> None:
    codec: Any = built("bmshj2018-hyperprior")[0]
    x = image(codec, 0)
    for weights in ("even", "entropy"):
        attached = attach(codec, "distillation", latent=0.5, weights=weights)
        with torch.no_grad():
            before = codec.g_a(x)
            bits = -torch.log2(codec.eval()(x)["likelihoods"]["y"]).sum((0, 2, 3))
            codec.g_a[-1].bias.add_(torch.linspace(0, 1, before.shape[1]))
            apart = (codec.g_a(x) - before).square().sum((0, 2, 3))
        expected = 0.5 * (apart * (bits / bits.mean() if weights == "entropy" else 1)).sum() / 64**2
        assert term(attached, x) == pytest.approx(float(expected), rel=1e-4)
        attached.detach()


def test_what_a_mask_takes_away_is_not_missed() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    attached = attach(
        codec,
        [
            ("mask_decay", {"widths": {"g_s.4": 4}, "decay_steps": 4}),
            ("distillation", {"features": 1.0, "transforms": ["g_s"]}),
        ],
    )
    masks: Any = attached.methods[0]
    x = image(codec, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        masks.masks["g_s.4"][2:5] = 0.0
    stage = next(s for s in attached.methods[1]._stages if s.module == "g_s.6")  # type: ignore[union-attr]
    shares = stage.share(dict(codec.named_modules()))
    assert shares.tolist() == [0.0 if 2 <= i < 5 else 1.0 for i in range(len(shares))]
    method: Any = attached.methods[1]
    attached.train()(x)
    method._mine["g_s.6"] = method._mine["g_s.6"].detach()
    method._theirs.clear()
    mine = {key: value.detach().clone() for key, value in method._mine.items()}
    mine["g_s.6"][:, 2:5] = 7.0  # whatever a channel holds whose mask is zero
    found = []
    for given in ({**mine}, {**mine, "g_s.6": method._mine["g_s.6"]}):
        method._mine.clear()
        method._mine.update(given)
        found.append(float(attached.loss({"x_hat": x}, x)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    # Half a mask is owed half of the teacher's channel.
    with torch.no_grad():
        masks.masks["g_s.4"][2:5] = 0.5
        method._listen(method._teacher[0], theirs := {})
        method._teacher[0](x)
    shares = stage.share(dict(codec.named_modules())).view(1, -1, 1, 1)
    for factor, sign in ((shares, -1), (1.0, 1)):
        method._mine.update(
            {key: value * (factor if key == "g_s.6" else 1.0) for key, value in theirs.items()}
        )
        assert sign * float(attached.loss({"x_hat": x}, x)) > (0 if sign > 0 else -1e-9)


def test_adaptive_stages_weigh_what_is_off_the_most() -> None:
    codec: Any = built("bmshj2018-hyperprior")[0]
    both = {}
    for stages in ("even", "adaptive"):
        codec = built("bmshj2018-hyperprior")[0]
        attached = attach(codec, "distillation", features=1.0, stages=stages, transforms=["g_a"])
        codec.g_a[4].weight.data.mul_(2.0)
        both[stages] = term(attached, image(codec, 0))
        method: Any = attached.methods[0]
    distances = method.distances
    assert distances.argmax() == len(distances) - 1 and both["adaptive"] > 1.5 * both["even"]


def test_the_teacher_leaves_no_trace(tmp_path: Path) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    teacher = state_of(codec)
    attached = attach(
        codec, [DECAY, ("distillation", {"output": 0.2, "features": 1.0, "stages": "adaptive"})]
    )
    keys = set(attached.state_dict())
    assert all(
        k.startswith(("codec.", "methods.0.")) or k in ("methods.1.distances", "methods.1.step")
        for k in keys
    )
    fit(attached, "samples", steps=6, folder=tmp_path / "run", **QUICK)
    teaching: Any = attached.methods[1]
    assert all(
        torch.equal(value, teacher[key]) for key, value in teaching._teacher[0].named_parameters()
    )
    small = attached.harden()
    file = save(small, tmp_path / "small.safetensors")
    assert set(load_file(file)) == set(codec.state_dict()), "and so does its file"
    student = taught(
        load(file, factory=lambda: built("bmshj2018-hyperprior")[0]),
        [("distillation", {"features": 1.0})],
        built("bmshj2018-hyperprior")[0],
    )
    fit(student, "samples", steps=2, **QUICK)
    plain = untaught(student)
    assert type(plain) is type(codec) and not any(m._forward_pre_hooks for m in plain.modules())


def test_gates_stay_beside_what_teaches() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    gated = attach(codec, "channel_gating", alpha=1.0, gating_steps=2, round_to=1)
    fit(gated, "samples", steps=2, **QUICK)
    small = gated.harden()
    x = image(codec, 0)
    before = small.eval()(x)["x_hat"]
    student: Any = taught(
        small, [("distillation", {"features": 1.0})], built("bmshj2018-hyperprior")[0]
    )
    assert [m.name for m in student.methods] == ["channel_gating", "distillation"]
    assert torch.equal(student.eval()(x)["x_hat"], before)
    fit(student, "samples", steps=1, **QUICK)
    back: Any = untaught(student)
    assert [m.name for m in back.methods] == ["channel_gating"] and back.methods[
        0
    ] is small.methods[0]
    assert not torch.equal(back.eval()(x)["x_hat"], before)


def _stopping(real: Any) -> Any:
    """Ctrl-C at the fourth call."""
    count: list[int] = []

    def stops(self: Any) -> None:
        count.append(1)
        if len(count) > 3:
            raise KeyboardInterrupt
        real(self)

    return stops


def test_a_killed_run_goes_on_with_its_teacher(tmp_path: Path) -> None:
    settings = [
        DECAY,
        ("distillation", {"output": 0.2, "latent": 0.1, "features": 1.0, "stages": "adaptive"}),
    ]
    whole = attach(built("bmshj2018-hyperprior")[0], settings)
    fit(whole, "samples", steps=6, **QUICK)
    for stop in (3, 6):
        with pytest.MonkeyPatch.context() as patch:
            parts = attach(built("bmshj2018-hyperprior")[0], settings)
            if stop == 3:
                patch.setattr(type(parts), "after_step", _stopping(type(parts).after_step))
            try:
                fit(parts, "samples", steps=6, folder=tmp_path, checkpoint_every=2, **QUICK)
            except Exception as error:
                assert "interrupted" in str(error)
    assert same_state(whole.state_dict(), parts.state_dict())


@pytest.mark.parametrize(
    ("match", "settings"),
    [
        ("at least one of output, latent, features", {}),
        ("output", {"output": 1.5}),
        ("weights", {"output": 0.5, "weights": "heavy"}),
    ],
)
def test_bad_settings_are_one_clear_line(match: str, settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=match) as error:
        attach(built("bmshj2018-hyperprior")[0], "distillation", **settings)
    assert "\n" not in str(error.value)


def test_bad_use_is_one_clear_line() -> None:
    codec, _, small = cut("bmshj2018-hyperprior")
    other = cut("bmshj2018-hyperprior", 1)[2]
    for match, kind, call in (
        ("give teacher=", RecipeError, lambda: attach(small, "distillation", output=0.5)),
        ("no use for a teacher", RecipeError, lambda: attach(codec, "none", teacher=codec)),
        (
            "not what this codec was made from",
            CodecError,
            lambda: attach(small, "distillation", features=1.0, teacher=other),
        ),
        (
            "expected a compressai CompressionModel",
            CodecError,
            lambda: attach(small, "distillation", features=1.0, teacher=nn.Linear(1, 1)),
        ),
        (
            "a teacher codes at one rate",
            RecipeError,
            lambda: attach(
                codec,
                [("bit_rate_modulator", {"qualities": [1, 2]}), ("distillation", {"output": 1.0})],
            ),
        ),
    ):
        with pytest.raises(kind, match=match) as error:
            call()
        assert "\n" not in str(error.value)


# -- students of one side -------------------------------------------------------------------------


def one_sided(name: str, side: str, method: str = "mask_decay") -> tuple[Any, Any]:
    """An original, and its student whose other side was left alone, after training and
    fine-tuning.
    """
    codec = built(name)[0]
    original: Any = built(name)[0]
    original.update(force=True)
    codec.load_state_dict(original.state_dict())
    steps = {"decay_steps": 2} if method == "mask_decay" else {}
    attached = attach(
        codec,
        method,
        budget={side: 0.95 if name.startswith("elic") else 0.8},
        side=side,
        round_to=1,
        **steps,
    )
    if steps:
        fit(attached, "samples", steps=2, **QUICK)
    small: Any = attached.harden()
    fit(small, "samples", steps=1, **QUICK)
    return original, small


@pytest.mark.parametrize(
    "name",
    [
        "bmshj2018-factorized",
        "bmshj2018-hyperprior",
        "mbt2018-mean",
        "mbt2018",
        "cheng2020-attn",
        "elic2022-chandelier",
    ],
)
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_original_is_the_other_side(name: str, side: str) -> None:
    original, small = one_sided(name, side)
    assert sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in original.parameters()
    )
    x = image(original, 0, 128)
    writes, reads = (small, original) if side == "encoder" else (original, small)
    with torch.no_grad():
        sent = writes.compress(x)
        theirs = reads.decompress(sent["strings"], sent["shape"])["x_hat"]
        own = writes.decompress(sent["strings"], sent["shape"])["x_hat"]
        shared = small.compress(x)["strings"], original.compress(x)["strings"]
    if side == "encoder":
        assert torch.equal(theirs, own) and shared[0] != shared[1]
    else:
        assert shared[0] == shared[1] and not torch.equal(theirs, own) and theirs.shape == own.shape
    changed = {
        k
        for k, v in small.state_dict().items()
        if v.shape != original.state_dict()[k].shape or not torch.equal(v, original.state_dict()[k])
    }
    allowed = ("g_a", "h_a") if side == "encoder" else ("g_s",)
    assert changed and all(any(part in allowed for part in key.split(".")) for key in changed), (
        changed
    )
    assert all(p.requires_grad for p in small.parameters()), (
        "left alone while training, not for ever"
    )


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_one_shot_students_have_one_side_too(method: str) -> None:
    original, small = one_sided("bmshj2018-hyperprior", "encoder", method)
    x = image(original, 0)
    sent = small.compress(x)
    assert torch.equal(
        small.decompress(sent["strings"], sent["shape"])["x_hat"],
        original.decompress(sent["strings"], sent["shape"])["x_hat"],
    )


def test_files_of_a_pruned_encoder_are_read_by_the_original(tmp_path: Path) -> None:
    original, small = one_sided("bmshj2018-hyperprior", "encoder")
    pictured = (image(original, 0)[0] * 255).byte()
    data = container.encode(small, pictured)
    assert torch.equal(container.decode(original, data), container.decode(small, data))
    _, decoder = one_sided("bmshj2018-hyperprior", "decoder")
    with pytest.raises(Exception, match="another codec"):
        container.decode(decoder, data)


def test_tables_stand_as_long_as_their_weights_do(tmp_path: Path) -> None:
    codec: Any = load_codec(
        "demo-hyperprior", 1
    )  # its weights were rounded to float16 after its tables had been made
    tables = {
        k: v.clone() for k, v in codec.state_dict().items() if k.rsplit(".", 1)[-1] in CDF_BUFFERS
    }
    fit(codec, "samples", steps=1, side="encoder", **QUICK)
    again: Any = load(save(codec, tmp_path / "a.safetensors"))
    assert all(torch.equal(again.state_dict()[k], v) for k, v in tables.items())
    with torch.no_grad():
        codec.entropy_bottleneck.quantiles[:, :, 2] += 3
    again = load(save(codec, tmp_path / "b.safetensors"))
    assert (
        again.entropy_bottleneck._quantized_cdf.shape
        != tables["entropy_bottleneck._quantized_cdf"].shape
    )


def test_a_modulator_is_not_taught_and_stays_attached() -> None:
    modulated = attach(
        load_codec("demo-hyperprior", 1).eval(), "bit_rate_modulator", qualities=[1, 2]
    )
    x = image(modulated.codec, 0)
    before = modulated(x, level=0)["x_hat"]
    for settings in ({"output": 1.0}, {"output": "much"}):
        with pytest.raises(RecipeError):
            taught(modulated, [("distillation", settings)], load_codec("demo-hyperprior", 1))
        assert torch.equal(modulated(x, level=0)["x_hat"], before)
    gated = attach(load_codec("demo-hyperprior", 1).eval(), "channel_gating", alpha=1.3)
    for gate in gated.methods[0].each().values():  # type: ignore[operator]
        gate.threshold.data[::2] = float("inf")
    before = gated(x)["x_hat"]
    assert not torch.equal(before, load_codec("demo-hyperprior", 1).eval()(x)["x_hat"])
    with pytest.raises(RecipeError, match="output"):
        taught(gated, [("distillation", {"output": "much"})], load_codec("demo-hyperprior", 1))
    assert torch.equal(gated(x)["x_hat"], before)


def test_masks_of_one_side_write_what_the_original_reads() -> None:
    original: Any = load_codec("demo-hyperprior", 1)
    attached = attach(
        load_codec("demo-hyperprior", 1),
        "mask_decay",
        budget={"encoder": 0.8},
        side="encoder",
        decay_steps=2,
    )
    fit(attached, "samples", steps=2, **QUICK)
    sent = attached.compress(image(original, 0, 128))
    theirs = original.decompress(sent["strings"], sent["shape"])["x_hat"]
    assert torch.equal(theirs, attached.decompress(sent["strings"], sent["shape"])["x_hat"])


def test_a_side_can_be_told_and_untold() -> None:
    codec = built("bmshj2018-hyperprior")[0]
    before = state_of(codec)
    fit(codec, "samples", steps=1, side="decoder", **QUICK)
    changed = {
        key.split(".")[0]
        for key, value in codec.named_parameters()
        if not torch.equal(value, before[key])
    }
    assert changed == {"g_s"}
    small = attach(codec, "magnitude", budget={"encoder": 0.8}, side="encoder", round_to=1).harden()
    assert provenance(small).history[-1]["side"] == "encoder"
    before = state_of(small)
    fit(small, "samples", steps=1, side="both", **QUICK)
    assert not torch.equal(small.g_s[0].weight, before["g_s.0.weight"])  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("match", "settings"),
    [
        (
            "would change the bitstream",
            {"budget": {"macs": 0.5}, "side": "encoder", "latents": True},
        ),
        ("cannot be met", {"budget": {"macs": 0.2}, "side": "decoder"}),
        (
            "no channel group matches 'g_s",
            {"budget": {"encoder": 0.8}, "side": "encoder", "only": ["g_s.*"]},
        ),
    ],
)
def test_what_one_side_cannot_do_is_one_clear_line(match: str, settings: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=match) as error:
        attach(built("bmshj2018-hyperprior")[0], "magnitude", round_to=1, **settings)
    assert "\n" not in str(error.value)


def test_only_the_groups_named_shrink() -> None:
    codec, groups = built("bmshj2018-hyperprior")
    small = attach(codec, "magnitude", budget={"macs": 0.8}, only=["g_s.*"], round_to=1).harden()
    widths = provenance(small).history[-1]["widths"]
    assert widths and all(name.startswith("g_s") for name in widths)


# -- how a budget is divided ----------------------------------------------------------------------


@pytest.mark.parametrize("split", [0.3, 0.7])
def test_a_split_says_who_saves(split: float) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    attached = attach(codec, "magnitude", budget={"macs": 0.7, "split": split}, round_to=1)
    before, after = attached.cost.totals(), attached.cost.totals(attached.keep())
    saved = before.macs - 0.7 * before.macs
    assert after.macs <= 0.7 * before.macs
    assert (
        before.encoder - after.encoder >= split * saved
        and before.decoder - after.decoder >= (1 - split) * saved
    )
    other = attach(
        built("bmshj2018-hyperprior")[0],
        "magnitude",
        budget={"macs": 0.7, "split": 1 - split},
        round_to=1,
    )
    assert attached.keep() != other.keep()


def test_the_best_split_is_measured() -> None:
    codec = load_codec("demo-hyperprior", 1)
    settings: dict[str, Any] = {"budget": {"macs": 0.7, "split": "auto"}}
    attached = attach(codec, "fisher", **settings)
    images = [image[..., :192, :192] for image in calibration_images("samples")[:2]]
    with pytest.raises(TrainingError, match="prepare"):
        attach(
            built("mbt2018")[0], "magnitude", budget={"macs": 0.7, "split": "auto"}, round_to=1
        ).harden()
    attached.prepare(images)
    method: Any = attached.methods[0]
    chosen = method.config.budget.split
    loss = rate_distortion_loss(0.0018, "mse")

    def measured(split: float) -> float:
        other = attach(
            load_codec("demo-hyperprior", 1), "fisher", budget={"macs": 0.7, "split": split}
        )
        other.prepare(images)
        small = other.harden().eval()
        with torch.no_grad():
            return sum(float(loss(small(image), image)["loss"]) for image in images)

    losses = {split: measured(split) for split in (0.3, 0.5, 0.7)} | {chosen: measured(chosen)}
    assert min(losses, key=lambda split: losses[split]) == chosen


def test_mask_decay_wants_a_settled_split() -> None:
    attached = attach(
        built("bmshj2018-hyperprior")[0],
        "mask_decay",
        budget={"macs": 0.7, "split": "auto"},
        round_to=1,
        decay_steps=2,
    )
    with pytest.raises(TrainingError, match="prepare"):
        fit(attached, "samples", steps=2, **QUICK)
    attached.prepare([image(attached.codec, 0)])
    fit(attached, "samples", steps=2, **QUICK)
    assert attached.harden()


@pytest.mark.parametrize(
    "budget",
    [
        {"params": 0.5, "split": 0.5},
        {"macs": 0.5, "encoder": 0.5, "split": 0.5},
        {"macs": 0.5, "split": 1.5},
        {"macs": 0.5, "split": "best"},
    ],
)
def test_a_split_that_cannot_be_is_one_clear_line(budget: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="split") as error:
        attach(built("bmshj2018-hyperprior")[0], "magnitude", budget=budget)
    assert "\n" not in str(error.value)
