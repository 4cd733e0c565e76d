"""The temporal entropy model: what it costs, that both sides keep the same latents, that it learns
from clips, and that it is as narrow as the codec.
"""

from __future__ import annotations

import copy
import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
from helpers import TESTS, built, same_state, state_of
from torch import Tensor, nn
from torch.nn import functional as F

import nicprune as nip
from nicprune.codecs.anatomy import rate_distortion_loss
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.layer_kinds import is_bottleneck
from nicprune.codecs.temporal import TemporalEntropyNetwork
from nicprune.common.errors import CodecError, DataError, FileError, InterruptedRun, RecipeError
from nicprune.data.images import write_png
from nicprune.evaluation.memory import peak_bytes
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.methods import Attached, attach
from nicprune.methods.video.coder import FrameCoder, video_coder
from nicprune.pruning.cost import CostModel

WIDTHS = [1.0, 0.75, 0.5, 0.25]
TRAINING: dict[str, Any] = {
    "batch_size": 2,
    "patch_size": 64,
    "lr": 1e-3,
    "lmbda": 0.01,
    "precision": "32",
    "progress": False,
}


def frames(count: int, height: int = 64, width: int = 64, seed: int = 0) -> list[Tensor]:
    """A smooth picture that moves, (1, 3, height, width) each."""
    small = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    size = (height + 2 * count, width + 2 * count)
    large = F.interpolate(small, size=size, mode="bicubic").clamp(0, 1)
    return [large[:, :, t : t + height, 2 * t : 2 * t + width] for t in range(count)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of eight frames."""
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(2):
        (folder / f"clip{seed}").mkdir()
        for t, frame in enumerate(frames(8, 72, 96, seed)):
            write_png(frame[0], folder / f"clip{seed}" / f"{t}.png")
    return folder


def temporal(name: str = "bmshj2018-hyperprior", **settings: Any) -> Attached:
    return attach(built(name)[0], "temporal_entropy_model", **settings)


def telling(attached: Attached) -> Attached:
    """Predictions that are far from zero and depend on the frame before."""
    generator = torch.Generator().manual_seed(1)
    network = attached.roles.temporal.network
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("weight"):
                fan = parameter[0].numel()
                noise = torch.rand(parameter.shape, generator=generator) - 0.5
                parameter.copy_(noise * 3.4 / fan**0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.3)
    return attached


def slimmable(latents: str = "slim", **settings: Any) -> Attached:
    narrow = {"widths": WIDTHS, "round_to": 1, "latents": latents}
    return telling(
        attach(
            built("bmshj2018-hyperprior")[0],
            [("slimmable", narrow), ("temporal_entropy_model", {"round_to": 1, **settings})],
        )
    )


def code(coder: FrameCoder, clip: list[Tensor], every: int = 32) -> tuple[list[Any], list[Tensor]]:
    """Return what `compress` returns for each frame of a clip, and y_hat."""
    sent, latents, previous = [], [], None
    for t, frame in enumerate(clip):
        strings, shape, previous = coder.compress(frame, previous if t % every else None)
        sent.append((strings, shape))
        latents.append(previous)
    return sent, latents


def read(coder: FrameCoder, sent: list[Any], every: int = 32) -> tuple[list[Tensor], list[Tensor]]:
    """Return the frames and y_hat that a coder reads."""
    found, latents, previous = [], [], None
    for t, (strings, shape) in enumerate(sent):
        x_hat, previous = coder.decompress(strings, shape, previous if t % every else None)
        found.append(x_hat)
        latents.append(previous)
    return found, latents


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# -- the network ----------------------------------------------------------------------------------


def test_the_papers_network_has_the_papers_cost() -> None:
    network = TemporalEntropyNetwork(192, 256, 320, (768, 576))
    attached = temporal()
    groups = type(attached.groups)([])
    per_latent = CostModel(network, groups).totals().macs / 64**2
    convolutions = {
        "temporal_prior": 25 * (192 * 256 + 256 * 320 + 320 * 384),
        "h_a": 9 * 384 * 256 + 25 * 256**2 * (1 / 4 + 1 / 16),
        "h_s": 25 * 256**2 * (1 / 16 + 1 / 4) + 9 * 256 * 384,
        "entropy_parameters": 768 * 768 + 768 * 576 + 576 * 384,
    }
    matrices = (1 * 3 + 3 * 3 * 3 + 3 * 1) * 2 * 256 / 16  # of the entropy bottleneck, both sides
    assert abs(per_latent - sum(convolutions.values()) - matrices) < 1e-6
    assert round(per_latent / 256 / 1000, 1) == 40.6


def test_widths_are_in_proportion_to_the_latents_or_given() -> None:
    network = temporal().roles.temporal.network  # M = 24
    assert [network.h_a[0].out_channels, network.temporal_prior[2].out_channels] == [32, 40]
    assert [network.entropy_parameters[i].out_channels for i in (0, 2, 4)] == [96, 72, 48]
    own = temporal(hyper=6, temporal=7, parameters=(9, 8)).roles.temporal.network
    assert [own.h_a[0].out_channels, own.temporal_prior[2].out_channels] == [6, 7]
    assert [own.entropy_parameters[i].out_channels for i in (0, 2)] == [9, 8]


def test_at_first_z_costs_little_and_less_the_smaller_it_is() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TemporalEntropyNetwork(8, 4, 4, (4, 4)).eval()
    with torch.no_grad():
        bits = [
            float(-network.entropy_bottleneck(torch.full((1, 4, 2, 2), z))[1].log2().mean())
            for z in (0.0, 2.0, 4.0)
        ]
    assert bits[0] < 3 and bits[0] < bits[1] < bits[2]


def test_a_p_frame_costs_g_a_g_s_and_the_network() -> None:
    attached = temporal()
    method = attached.roles.temporal
    network = CostModel(method.network, type(attached.groups)([])).totals()
    g_a, g_s = (attached.cost.by_transform()[name] for name in ("g_a", "g_s"))
    found = method.predicted_totals()
    assert found.macs == g_a[0] + g_s[0] + network.macs // 256
    assert found.decoder == g_s[0] + network.decoder // 256 < found.encoder
    assert found.params == g_a[1] + g_s[1] + network.params


# -- coding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "bmshj2018-factorized",
        "bmshj2018-hyperprior",
        "mbt2018-mean",
        "mbt2018",
        "cheng2020-attn",
        "elic2022-chandelier",
        "bmshj2018-hyperprior-vbr",
    ],
)
def test_both_sides_keep_the_same_latents(name: str) -> None:
    attached = telling(temporal(name))
    coder = video_coder(attached)
    clip = frames(4, 64, 128)
    sent, latents = code(coder, clip)
    decoded, theirs = read(coder, sent)
    assert equal(latents, theirs) and coder.predicts
    assert all(f.shape == (1, 3, 64, 128) and f.dtype == torch.float32 for f in decoded)
    alone = video_coder(built(name)[0])
    assert not alone.predicts and alone.widths == 1
    intra = alone.compress(clip[0])
    assert intra[0] == sent[0][0], "an I frame is the image codec's"
    assert torch.equal(alone.decompress(*intra[:2])[0], decoded[0])
    assert alone.compress(clip[1], latents[0])[0] != sent[1][0], "without a model, all are I frames"


def test_the_forward_pass_is_what_is_coded() -> None:
    attached = telling(temporal()).eval()
    method, codec = attached.roles.temporal, attached.codec
    with torch.no_grad():  # scales for which no latent is so unlikely that it is coded otherwise
        method.network.entropy_parameters[4].bias[:24] += 8
    clip = frames(3)
    sent, latents = code(video_coder(attached), clip)
    with torch.no_grad():
        out = attached(torch.stack(clip, 1))
        for t in (1, 2):
            y = codec.g_a(clip[t])
            alone = method.network(torch.cat((y, latents[t - 1].float()), 1))
            apart = (alone["x_hat"] - latents[t]).abs()  # means are rounded where it codes
            assert float((apart > 1 / 256).double().mean()) < 0.02
    bits = sum(float(-v.log2().sum()) for v in out["likelihoods"].values())
    written = sum(8 * len(s[0]) for strings, _ in sent[1:] for s in strings)
    assert bits <= written <= bits * 1.05 + 2 * 2 * 64


def test_differences_between_machines_do_not_reach_the_next_frame() -> None:
    attached = telling(temporal())
    sent, latents = code(video_coder(attached), frames(12))
    other = video_coder(attached)
    layer = other._network.entropy_parameters[4]
    layer.register_forward_hook(lambda module, args, output: output * (1 + 3e-15) + 2e-15)
    assert equal(latents, read(other, sent)[1])


READ = """
import sys, hashlib, torch
sys.path.insert(0, {tests!r})
import nicprune as nip
from nicprune.methods.video.coder import video_coder
from test_temporal_entropy_model import read
codec = nip.load({file!r})
for width, sent in enumerate(torch.load({sent!r}, weights_only=False)):
    decoded, latents = read(video_coder(codec, width), sent, {every})
    for kind in (decoded, latents):
        print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in kind)).hexdigest())
"""


@pytest.mark.parametrize(
    ("count", "every"), [(5, 3), pytest.param(100, 32, marks=pytest.mark.slow)]
)
def test_every_width_decodes_in_another_process_to_what_the_encoder_saw(
    count: int, every: int, tmp_path: Path
) -> None:
    attached, clip = slimmable(), frames(count)
    file = nip.save(attached, tmp_path / "slimvc.safetensors")
    everything, expected = [], []
    for width in range(len(WIDTHS)):
        coder = video_coder(attached, width)
        assert (coder.width, coder.widths) == (width, len(WIDTHS))
        sent, latents = code(coder, clip, every)
        decoded, theirs = read(coder, sent, every)
        assert equal(latents, theirs)
        everything.append(sent)
        for kind in (decoded, latents):
            data = b"".join(t.numpy().tobytes() for t in kind)
            expected.append(hashlib.sha256(data).hexdigest())
    torch.save(everything, tmp_path / "sent")
    done = elsewhere.run(
        READ.format(
            tests=str(TESTS / "methods"), file=str(file), sent=str(tmp_path / "sent"), every=every
        )
    )
    assert done.returncode == 0, done.stderr[-800:]
    assert done.stdout.split() == expected and len(set(expected)) == len(expected)


def test_what_does_not_belong_to_a_frame_is_refused() -> None:
    coder = video_coder(telling(temporal()))
    clip = frames(2)
    sent, latents = code(coder, clip)
    with pytest.raises(CodecError, match="code an I frame where the size or the width changes"):
        coder.compress(frames(1, 64, 128)[0], latents[0])
    strings, shape = sent[1]
    for wrong in ((strings, (2, 2)), (strings[:1], shape), ([[], strings[1]], shape), (strings, 1)):
        with pytest.raises(FileError, match="not those of a P frame"):
            coder.decompress(*wrong, latents[0])


# -- learning -------------------------------------------------------------------------------------


def test_a_frozen_codec_stays_and_the_temporal_model_learns(clips: Path) -> None:
    attached = slimmable()
    before = state_of(attached)
    sides = {name: p.requires_grad for name, p in attached.named_parameters()}
    result = nip.fit(attached, clips, steps=3, **TRAINING)
    assert "mse" not in result.metrics and result.metrics["bpp"] == result.metrics["loss"]
    changed = {
        name
        for name, parameter in attached.named_parameters()
        if not torch.equal(parameter, before[name])
    }  # quantiles too, which the auxiliary loss moves: I frames go on being coded as before
    assert changed and all(name.startswith("methods.1.") for name in changed)
    for part in ("temporal_prior.0", "h_a.4", "h_s.0", "entropy_parameters.4"):
        assert f"methods.1.network.{part}.weight" in changed
    for width in (1, 2, 3):
        own = f"methods.1.bottlenecks.{width}."
        assert any(name.startswith(own) for name in changed), "each width's bottleneck learns"
    assert sides == {name: p.requires_grad for name, p in attached.named_parameters()}


def test_the_loss_is_the_rate_of_p_frames_or_of_all_frames_with_distortion(clips: Path) -> None:
    clip = torch.stack(frames(3), 1)
    for image_codec in ("frozen", "trained"):
        attached = telling(temporal(image_codec=image_codec)).eval()
        with torch.no_grad():
            out = attached(clip)
            bits = sum(float(-v.log2().sum()) for v in out["likelihoods"].values())
            intra = attached.codec(clip[:, 0])
        own = attached.objective(out, clip.flatten(0, 1))
        if image_codec == "frozen":
            assert float(own["loss"]) == pytest.approx(bits / (2 * 64 * 64), rel=1e-5)
            assert "x_hat" not in out
        else:
            assert own is None and out["x_hat"].shape == (3, 3, 64, 64)
            found = rate_distortion_loss(0.01, "mse")(out, clip.flatten(0, 1))
            assert float(found["bpp_loss"]) == pytest.approx(bits / (3 * 64 * 64), rel=1e-5)
            assert torch.allclose(out["x_hat"][:1], intra["x_hat"], atol=1e-5)
            for name, values in intra["likelihoods"].items():
                assert torch.allclose(out["likelihoods"][f"intra {name}"], values, atol=1e-6)


def test_a_codec_can_be_trained_along(clips: Path) -> None:
    attached = temporal(image_codec="trained")
    before = state_of(attached.codec)
    result = nip.fit(attached, clips, steps=2, **TRAINING)
    assert result.metrics["mse"] > 0
    for name in ("g_a.0.weight", "g_s.0.weight", "h_a.0.weight"):
        assert not torch.equal(attached.codec.state_dict()[name], before[name])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of two sizes, which are no clip."""
    folder = tmp_path_factory.mktemp("photographs")
    for seed in range(4):
        write_png(frames(1, 70, 80 + 4 * seed, seed)[0][0], folder / f"{seed}.png")
    return folder


@pytest.mark.parametrize("kind", ["pruned", "narrow", "photographs"])
def test_an_interrupted_run_resumes_bit_for_bit(
    clips: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "photographs":
        clips = photographs

    def make() -> Attached:
        if kind == "photographs":
            return temporal(clips="photographs")
        decay = {"budget": {"macs": 0.5}, "decay_steps": 4, "round_to": 1}
        return slimmable() if kind == "narrow" else temporal(mask_decay=decay)

    whole, parts = make(), make()
    nip.fit(whole, clips, steps=5, **TRAINING)
    options = {**TRAINING, "folder": tmp_path, "checkpoint_every": 1}
    step = Attached.after_step

    def stopping(self: Attached) -> None:
        step(self)
        if (tmp_path / "checkpoint.pt").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(Attached, "after_step", stopping)
    with pytest.raises(InterruptedRun):
        nip.fit(parts, clips, steps=5, **options)
    monkeypatch.setattr(Attached, "after_step", step)
    again = make()
    assert nip.fit(again, clips, steps=5, **options).step == 5
    learnt = {name for name, _ in whole.named_parameters()}
    first, second = state_of(whole), state_of(again)
    assert same_state({n: first[n] for n in learnt}, {n: second[n] for n in learnt})
    settings = {"clips": "photographs"} if kind == "photographs" else {}
    other = attach(built("mbt2018")[0], "temporal_entropy_model", **settings)
    with pytest.raises(RecipeError, match="another run"):
        nip.fit(other, clips, steps=5, **options)
    if kind == "photographs":
        picture = photographs / "2.png"
        as_it_was = picture.read_bytes()
        write_png(frames(1, 70, 88, 9)[0][0], picture)
        with pytest.raises(RecipeError, match="another run"):
            nip.fit(make(), clips, steps=5, **options)
        picture.write_bytes(as_it_was)


def test_a_temporal_model_learns_from_photographs(photographs: Path) -> None:
    attached = temporal(clips="photographs")
    weight = attached.roles.temporal.network.h_a[0].weight
    before = weight.detach().clone()
    assert nip.fit(attached, photographs, steps=2, **TRAINING).metrics["bpp"] > 0
    assert not torch.equal(before, weight)
    with pytest.raises(DataError, match="a clip has frames of one size"):
        nip.fit(temporal(), photographs, steps=8, **TRAINING)


def test_a_recipe_asks_for_photographs() -> None:
    arm = {"name": "temporal_entropy_model", "label": "video", "clips": "photographs"}
    recipe = {
        "name": "video",
        "version": 1,
        "codec": "demo-hyperprior",
        "qualities": [3],
        "photographs": {"train": "samples", "test": "samples"},
        "training": {"batch_size": 1, "patch_size": 64},
        "sparsify": {"steps": 1},
        "finetune": {"steps": 1},
        "methods": [arm],
    }
    (found,) = parse_recipe(recipe, "recipe").methods
    assert found.stack[0].settings["clips"] == "photographs"
    with pytest.raises(RecipeError, match="clips: input should be 'files' or") as caught:
        parse_recipe({**recipe, "methods": [{**arm, "clips": "photos"}]}, "recipe")
    assert "\n" not in str(caught.value)


def test_what_is_written_of_settings_is_what_it_was_without_photographs() -> None:
    written = temporal().roles.temporal.config.model_dump(mode="json")
    assert "clips" not in written
    assert temporal(clips="files").roles.temporal.config.model_dump(mode="json") == written
    made = temporal(clips="photographs").roles.temporal.config_after_pruning()
    assert temporal(**made).roles.temporal.sampling.clips == "photographs"


def test_training_makes_a_clip_cheaper(clips: Path) -> None:
    attached = temporal(strides=[1])  # as the frames of the clip
    clip = frames(8, 64, 64)

    def size() -> int:
        sent, _ = code(video_coder(attached), clip)
        return sum(len(s[0]) for strings, _ in sent[1:] for s in strings)

    before = size()
    nip.fit(attached, clips, steps=80, **TRAINING | {"lr": 5e-3})
    assert size() < 0.9 * before


# -- widths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("latents", ["fixed", pytest.param("slim", marks=pytest.mark.slow)])
def test_each_width_is_a_codec_of_its_own_that_writes_the_same_bytes(
    latents: str, tmp_path: Path
) -> None:
    attached = slimmable(latents)
    loaded = nip.load(nip.save(attached, tmp_path / "all.safetensors"))
    clip, sizes, costs = frames(2), [], []
    for width in (0, 2, 3) if latents == "slim" else (0, 3):
        small = attached.extract(width)
        assert isinstance(small, Attached) and [m.name for m in small.methods] == [
            "temporal_entropy_model"
        ]
        again = nip.load(nip.save(small, tmp_path / f"{width}.safetensors"))
        sent, latents_sent = code(video_coder(attached, width), clip)
        for other in (video_coder(again), video_coder(loaded, width)):
            theirs, their_latents = code(other, clip)
            assert theirs == sent and equal(their_latents, latents_sent)
        attached.set_width(width)
        cost = attached.roles.temporal.predicted_totals()
        assert cost == small.roles.temporal.predicted_totals()
        costs.append(cost)
        sizes.append(latents_sent[0].shape[1])
    assert sizes == ([24] * 2 if latents == "fixed" else [24, 12, 6])
    for wider, narrower in zip(costs, costs[1:], strict=False):
        assert narrower.macs < wider.macs and narrower.params < wider.params


def test_latents_are_those_that_matter_where_the_codec_orders_them() -> None:
    settings = {"widths": [1.0, 0.5], "round_to": 1, "latents": "slim", "order": "importance"}
    attached = telling(
        attach(
            built("bmshj2018-hyperprior")[0],
            [("temporal_entropy_model", {"round_to": 1}), ("slimmable", settings)],
        )
    )
    attached.prepare(frames(2))
    method = attached.roles.temporal
    kept = attached.roles.multi_width.keep_at(1)["g_a.6"]
    assert kept != list(range(12)) and method._keep(1)["y"] == kept
    small = method.network_at(1)
    own, whole = small.temporal_prior[0].weight, method.network.temporal_prior[0].weight
    assert torch.equal(own, whole[: own.shape[0], kept])
    halves = [*kept, *(k + 24 for k in kept)]
    last = method.network.entropy_parameters[4]
    assert torch.equal(small.entropy_parameters[4].bias, last.bias[halves])
    clip = frames(3)
    sent = code(video_coder(attached, 1), clip)[0]
    assert sent == code(video_coder(attached.extract(1)), clip)[0]
    with torch.no_grad():
        assert attached.eval()(torch.stack(clip, 1), width=1)["likelihoods"]["y"].shape[1] == 12


@pytest.mark.parametrize("latents", ["slim", "fixed"])
def test_a_width_on_its_own_keeps_the_tables_of_the_file(latents: str, tmp_path: Path) -> None:
    """Made anew on another machine, they might differ in the last bit, and files not be read."""
    attached = slimmable(latents).eval()
    saved = nip.load(nip.save(attached, tmp_path / "c.safetensors"))
    for module in saved.modules():  # as another machine may have made them
        if is_bottleneck(module):
            module._quantized_cdf[:, 3] += 1
    for width in (1, 2):
        small = saved.extract(width)
        refresh_tables(small)
        for ours, theirs in (
            (small.codec.entropy_bottleneck, attached.extract(width).codec.entropy_bottleneck),
            (
                small.roles.temporal.network.entropy_bottleneck,
                attached.roles.temporal.network_at(width).entropy_bottleneck,
            ),
        ):
            moved = theirs._quantized_cdf.clone()
            moved[:, 3] += 1
            assert torch.equal(ours._quantized_cdf, moved)
    stale = copy.deepcopy(saved)
    with torch.no_grad():
        for module in stale.modules():
            if is_bottleneck(module):
                module.quantiles.add_(0.7)
    small = stale.extract(1)
    before = small.codec.entropy_bottleneck._quantized_cdf.clone()
    refresh_tables(small)
    assert not torch.equal(small.codec.entropy_bottleneck._quantized_cdf, before)


def test_what_runs_at_a_width_is_the_network_of_this_width() -> None:
    attached = slimmable().eval()
    method = attached.roles.temporal
    for width in range(len(WIDTHS)):
        small = method.network_at(width)
        attached.set_width(width)
        m = small.latents
        x = torch.randn(1, 2 * m, 8, 8, generator=torch.Generator().manual_seed(width))
        with torch.no_grad(), attached.active():
            mine = method.network(x)
        with torch.no_grad():
            alone = small(x)
        assert torch.allclose(mine["x_hat"], alone["x_hat"], atol=1e-5)
        assert torch.allclose(mine["likelihoods"]["z"], alone["likelihoods"]["z"], atol=1e-5)


# -- pruning --------------------------------------------------------------------------------------


def test_the_temporal_model_is_pruned_alone(clips: Path, tmp_path: Path) -> None:
    decay = {"budget": {"macs": 0.4}, "decay_steps": 6, "round_to": 1}
    attached = temporal(mask_decay=decay)
    before = attached.roles.temporal.predicted_totals()
    with pytest.raises(CodecError, match="harden"):
        video_coder(attached)
    nip.fit(attached, clips, steps=6, until_done=True, **TRAINING)
    assert attached.done
    codec = state_of(attached.codec)
    x = torch.stack(frames(3), 1)
    small = attached.harden()
    assert isinstance(small, Attached) and same_state(codec, small.codec.state_dict())
    network = small.roles.temporal.network
    method = attached.roles.temporal
    share = CostModel(network, type(small.groups)([])).totals().macs
    assert 0.3 < share / method.network_cost.totals().macs <= 0.4
    after = small.roles.temporal.predicted_totals()
    assert after.macs < before.macs and after.params < before.params
    with torch.no_grad():  # the masks are in the weights now
        mine, pruned = (
            copy.deepcopy(one).double().eval()(x.double())["likelihoods"]
            for one in (attached, small)
        )
    for name in mine:
        assert torch.allclose(mine[name].log(), pruned[name].log(), atol=1e-5)
    clip = frames(3)
    again = nip.load(nip.save(small, tmp_path / "small.safetensors"))
    assert code(video_coder(again), clip)[0] == code(video_coder(small), clip)[0]


def test_latents_may_go_with_the_codecs() -> None:
    stack = [
        ("magnitude", {"widths": {"g_a.6": 9}, "latents": True}),
        ("temporal_entropy_model", {"image_codec": "trained"}),
    ]
    attached = telling(attach(built("mbt2018-mean")[0], stack))
    kept = attached.keep()["g_a.6"]
    assert len(kept) == 9
    small = attached.harden()
    method = small.roles.temporal
    assert method.network.latents == len(kept)
    weight = attached.roles.temporal.network.temporal_prior[0].weight
    assert torch.equal(method.network.temporal_prior[0].weight, weight[:, kept])
    sent, latents = code(video_coder(small), frames(3))
    assert equal(latents, read(video_coder(small), sent)[1]) and latents[0].shape[1] == len(kept)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strides": [7]}, "a clip of 7 frames has no two that are 7 apart"),
        ({"strides": [0, 1]}, "different distances of 1 or more"),
        ({"strides": [2, 2]}, "different distances"),
        ({"clips": "photos"}, "clips: input should be 'files' or 'photographs' .got 'photos'"),
        ({"parameters": [4, 1]}, "2 or more"),
        ({"mask_decay": {"budget": {"mac": 0.5}}}, "unknown key 'budget.mac'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        temporal(**settings)


def test_combinations_that_would_learn_nothing_are_refused() -> None:
    decay = {"budget": {"macs": 0.5}, "decay_steps": 4, "round_to": 1}
    codec = built("bmshj2018-hyperprior")[0]
    with pytest.raises(RecipeError, match="mask_decay learns while the codec is trained"):
        attach(codec, [("mask_decay", decay), ("temporal_entropy_model", {})])
    narrow = {"widths": [1.0, 0.5], "round_to": 1}
    with pytest.raises(RecipeError, match="mask_decay or several widths, not both"):
        attach(codec, [("slimmable", narrow), ("temporal_entropy_model", {"mask_decay": decay})])
    attach(codec, "temporal_entropy_model").detach()


def test_it_goes_beside_widths_that_are_trained_already(clips: Path, tmp_path: Path) -> None:
    narrow = {"widths": WIDTHS, "round_to": 1, "latents": "slim"}
    alone = attach(built("bmshj2018-hyperprior")[0], [("slimmable", narrow)])
    together = attach(
        built("bmshj2018-hyperprior")[0],
        [("slimmable", narrow), ("temporal_entropy_model", {"round_to": 1})],
    )
    with torch.no_grad():  # as if trained: other than what `attach` starts from
        for parameter in alone.parameters():
            parameter.mul_(1.03)
    alone.set_width(2)
    before = state_of(alone)
    beside = attach(alone, "temporal_entropy_model", round_to=1)
    assert [method.name for method in beside.methods] == ["slimmable", "temporal_entropy_model"]
    assert same_state(state_of(alone), before)
    assert beside.state_dict().keys() == together.state_dict().keys()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (beside, together)]
    assert shapes[0] == shapes[1]
    nip.fit(beside, clips, steps=2, **TRAINING)
    again = nip.load(nip.save(beside, tmp_path / "beside.safetensors"))
    clip = frames(3)
    for width in range(len(WIDTHS)):
        sent, kept = code(video_coder(beside, width), clip)
        _, latents = read(video_coder(again, width), sent)
        assert equal(kept, latents)


def test_what_only_the_first_attach_takes_is_refused_beside() -> None:
    attached = attach(built("bmshj2018-hyperprior")[0], "slimmable", widths=[1.0, 0.5], round_to=1)
    with pytest.raises(RecipeError, match="go with the methods that are attached first"):
        attach(attached, "temporal_entropy_model", teacher=attached.codec)
    attach(attached, "temporal_entropy_model", round_to=1)


def test_the_narrower_the_width_the_less_memory_it_takes() -> None:
    video, clip = slimmable(), frames(2, 128, 128)
    peaks = []
    for width in range(len(WIDTHS)):
        coder = video_coder(video, width)
        _, _, latents = coder.compress(clip[0])
        peaks.append(
            [peak_bytes(lambda f=f, y=y, c=coder: c.compress(f, y)) for f, y in
             ((clip[0], None), (clip[1], latents))]
        )  # fmt: skip
    for wide, narrow in pairwise(peaks):
        assert all(less < more for less, more in zip(narrow, wide, strict=True))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("slimmable", {"widths": [1.0, 0.5], "round_to": 1}), ("magnitude", {"widths": {"*": 4}})),
        (("magnitude", {"widths": {"*": 4}}), ("temporal_entropy_model", {})),
        (("temporal_entropy_model", {}), ("temporal_entropy_model", {})),
    ],
)
def test_nothing_else_goes_beside_what_is_attached(first: Any, second: Any) -> None:
    attached = attach(built("bmshj2018-hyperprior")[0], [first])
    before = state_of(attached)
    with pytest.raises(CodecError, match="methods are attached to a codec already"):
        attach(attached, [second])
    assert same_state(state_of(attached), before)


class Bare(nn.Module):
    """No codec."""


def test_what_cannot_be_coded_is_refused(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="expected a compressai CompressionModel"):
        video_coder(Bare())
    decay = {"budget": {"macs": 0.5}, "decay_steps": 4, "round_to": 1}
    with pytest.raises(CodecError, match="harden"):
        video_coder(attach(built("bmshj2018-hyperprior")[0], "mask_decay", **decay))
    with pytest.raises(RecipeError, match="width 7"):
        video_coder(slimmable(), 7)
    plain = attach(built("bmshj2018-hyperprior")[0], "none")
    with pytest.raises(RecipeError, match="need a temporal model"):
        plain(torch.stack(frames(2), 1))
    with pytest.raises(DataError, match="no such video"):
        nip.fit(temporal(), tmp_path / "none", steps=1, **TRAINING)
