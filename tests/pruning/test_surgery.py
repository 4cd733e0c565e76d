"""A pruned codec is the same function as the masked one, and says so; a broken handler is
caught.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from compressai.layers import GDN
from helpers import ARCHITECTURES, built, hook_count, image, random_keep, same_state, state_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nicprune.channels.find_groups import find_groups
from nicprune.channels.groups import Group, Groups, Member
from nicprune.codecs.anatomy import forward_for_analysis
from nicprune.codecs.layer_kinds import is_bottleneck
from nicprune.codecs.layer_kinds.convolutions import MaskedConvPruner
from nicprune.codecs.layer_kinds.entropy import EntropyBottleneckPruner
from nicprune.codecs.layer_kinds.gdn import GDNPruner
from nicprune.codecs.layer_kinds.kind import kept_indices
from nicprune.codecs.layer_operations import remove
from nicprune.codecs.reinitialise import reinitialise
from nicprune.common.errors import RecipeError, SurgeryError
from nicprune.pruning import removal, verification
from nicprune.pruning.surgery import prune


class NoRounding(TorchFunctionMode):
    """Rounding off: a difference cannot be hidden or grown by it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (
            args[0].clone()
            if getattr(func, "__name__", "") == "round"
            else func(*args, **(kwargs or {}))
        )


def masked(codec: nn.Module, keep: dict[str, list[int]], groups: Groups) -> nn.Module:
    """A copy with every removed channel multiplied by zero behind its producers' bias: written
    apart from the package's own.
    """
    codec = copy.deepcopy(codec)
    modules = dict(codec.named_modules())
    for name, kept in keep.items():
        for member in groups[name].members:
            module = modules[member.module]
            gone = torch.from_numpy(np.delete(member.index, kept, axis=0).ravel())
            if is_bottleneck(module):
                with torch.no_grad():
                    module.quantiles[gone, :, 1] = 0
            elif member.axis == "out":
                # In the weights, since autoregressive codecs read them without calling the layer.
                rows = (
                    module.weight.data.transpose(0, 1)
                    if isinstance(module, nn.ConvTranspose2d)
                    else module.weight.data
                )
                rows[gone] = 0
                module.bias.data[gone] = 0
    return codec


def run(codec: nn.Module, dtype: torch.dtype, rounding: bool) -> Tensor:
    codec = copy.deepcopy(codec).to(dtype).eval()
    with torch.no_grad():
        if rounding:
            return forward_for_analysis(codec, image(codec, 3))["x_hat"]
        with NoRounding():
            return forward_for_analysis(codec, image(codec, 3))["x_hat"]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def decoded(codec: nn.Module) -> tuple[Tensor, int]:
    """Write and read a real bitstream (in float64: whether a latent rounds up must not depend on
    the order of a sum).
    """
    codec = copy.deepcopy(codec).double().eval()
    torch.set_default_dtype(torch.float64)  # decoders make room for latents in the default type
    try:
        with torch.no_grad():
            codec.update(force=True)
            sent = codec.compress(image(codec, 3))
            found = codec.decompress(sent["strings"], sent["shape"])["x_hat"]
    finally:
        torch.set_default_dtype(torch.float32)
    return found, sum(len(s) for s in verification._byte_strings(sent["strings"]))


@pytest.mark.parametrize("seed", [0, 1, "minimal"])
def test_pruned_is_masked(architecture: str, seed: int | str) -> None:
    codec, groups = built(architecture)
    keep = random_keep(groups, 7 if seed == "minimal" else int(seed), minimal=seed == "minimal")
    small, wide = prune(codec, keep, groups, verify=False), masked(codec, keep, groups)
    assert relative(run(wide, torch.float64, True), run(small, torch.float64, True)) <= 1e-10
    assert relative(run(wide, torch.float64, False), run(small, torch.float64, False)) <= 1e-10
    assert relative(run(wide, torch.float32, False), run(small, torch.float32, False)) <= 1e-5
    verification.verify_same(codec, small, groups.check(keep), groups)
    gone: dict[tuple[str, str], int] = {}
    for name, kept in keep.items():
        for member in groups[name].members:
            gone[member.module, member.axis] = gone.get(
                (member.module, member.axis), 0
            ) + member.index.shape[1] * (groups[name].width - len(kept))
    for (name, axis), count in gone.items():
        before, after = codec.get_submodule(name), small.get_submodule(name)
        if isinstance(before, (nn.Conv2d, nn.ConvTranspose2d)):
            side = "out_channels" if axis == "out" else "in_channels"
            dim = int(axis == "in") ^ isinstance(before, nn.ConvTranspose2d)
            assert getattr(after, side) == after.weight.shape[dim] == getattr(before, side) - count


def test_bitstreams_decode_to_the_masked_image(architecture: str) -> None:
    codec, groups = built(architecture)
    keep = random_keep(groups, 4)
    small, wide = prune(codec, keep, groups, verify=False), masked(codec, keep, groups)
    first, second = decoded(small), decoded(wide)
    assert first[1] > 30, "the bitstream carries next to nothing; the test would show nothing"
    assert torch.isfinite(first[0]).all()
    assert float((first[0] - second[0]).abs().max()) <= 1e-9


def test_pruning_twice_is_pruning_once(architecture: str) -> None:
    codec, groups = built(architecture)
    first = random_keep(groups, 5)
    once = prune(codec, first, groups, verify=False)
    again = find_groups(once)
    second = {
        g.name: list(range(0, g.width, 2)) if g.width > 3 else list(range(g.width))
        for g in again.prunable(latents=True)
    }
    assert [(g.width, g.pinned, [m.module for m in g.members]) for g in again] == [
        (len(first.get(g.name, range(g.width))), g.pinned, [m.module for m in g.members])
        for g in groups
    ]
    renamed = dict(zip([g.name for g in again], [g.name for g in groups], strict=True))
    composed = {
        renamed[name]: [first[renamed[name]][i] for i in kept] for name, kept in second.items()
    }
    assert same_state(
        prune(once, second, again, verify=False).state_dict(),
        prune(codec, composed, groups, verify=False).state_dict(),
    )


def attributes(codec: nn.Module) -> list[Any]:
    return [
        [
            (n, getattr(m, k))
            for n, m in codec.named_modules()
            for k in ("in_channels", "out_channels", "channels", "groups", "M", "groups_acc")
            if hasattr(m, k)
        ],
        [m.training for m in codec.modules()],
        [(n, p.requires_grad, id(p)) for n, p in codec.named_parameters()],
        hook_count(codec),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_original_is_untouched(
    architecture: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, groups = built(architecture)
    codec.train()
    next(codec.parameters()).requires_grad_(False)
    state, before, keep = (
        state_of(codec),
        copy.deepcopy(attributes(codec)[:2]) + attributes(codec)[2:],
        random_keep(groups, 6),
    )
    if fails:
        calls = []

        def breaks(*args: Any) -> None:
            calls.append(args)
            if len(calls) > 4:
                raise SurgeryError("midway")
            remove(*args)

        monkeypatch.setattr(removal, "remove", breaks)
        with pytest.raises(SurgeryError, match="midway"):
            prune(codec, keep, groups)
    else:
        small = prune(codec, keep, groups, verify=False)
        assert not any(p is q for p in codec.parameters() for q in small.parameters())
        assert [p.requires_grad for p in small.parameters()] == [
            p.requires_grad for p in codec.parameters()
        ]
        assert all(m.training for m in small.modules())
    assert same_state(state, codec.state_dict())
    assert attributes(codec) == before


def test_the_result_is_a_plain_codec() -> None:
    codec, groups = built("mbt2018")
    small = prune(codec, random_keep(groups, 1), groups)
    assert type(small) is type(codec) and hook_count(small) == 0
    assert list(small.state_dict()) == list(codec.state_dict())
    assert small.M == small.g_s[0].in_channels == small.context_prediction.in_channels


def test_already_written_cdf_tables_follow() -> None:
    codec, groups = built("bmshj2018-hyperprior")
    codec.update(force=True)
    small = prune(codec, random_keep(groups, 2), groups)
    fresh = copy.deepcopy(small)
    fresh.update(force=True)
    assert same_state(small.state_dict(), fresh.state_dict())


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ({"g_a.7": [0]}, "did you mean"),
        ({"g_a.0": []}, "at least 1"),
        ({"g_a.0": [1, 0]}, "increasing"),
        ({"g_a.0": [0, 0]}, "increasing"),
        ({"g_a.0": [-1, 2]}, "increasing"),
        ({"g_a.0": [3, 16]}, "increasing"),
        ({"g_a.6": [3]}, "at least 2"),
    ],
)
def test_wrong_keep_lists_are_refused(keep: dict[str, list[int]], says: str) -> None:
    codec, groups = built("bmshj2018-hyperprior")
    with pytest.raises(RecipeError, match=says):
        prune(codec, keep, groups)


# -- negative controls: each handler broken on purpose must be caught -----------------------------


def one_axis(self: Any, layer: Any, idxs: Any) -> Any:
    kept = kept_indices(layer.beta.numel(), idxs)
    layer.beta = self._prune_parameter_and_grad(layer.beta, kept, 0)
    layer.gamma = self._prune_parameter_and_grad(layer.gamma, kept, 1)
    return layer


def wrong_gdn(self: Any, layer: GDN, idxs: Any) -> Any:
    kept = kept_indices(layer.beta.numel(), idxs)
    width = layer.beta.numel()
    layer.beta = self._prune_parameter_and_grad(layer.beta, kept, 0)
    layer.gamma = self._prune_parameter_and_grad(layer.gamma, kept, 0)
    layer.gamma = self._prune_parameter_and_grad(layer.gamma, [(k + 1) % width for k in kept], 1)
    return layer


@pytest.mark.parametrize("broken", [one_axis, wrong_gdn])
def test_a_broken_gdn_handler_is_caught(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, groups = built("bmshj2018-hyperprior")
    monkeypatch.setattr(GDNPruner, "prune_out_channels", broken)
    with pytest.raises(SurgeryError):
        prune(codec, {"g_a.0": [0, 2, 3, 5, 7, 11]}, groups)


@pytest.mark.parametrize("what", ["unsliced", "shifted"])
def test_medians_of_other_channels_are_caught(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, groups = built("bmshj2018-hyperprior")
    right = EntropyBottleneckPruner.prune_out_channels

    def broken(self: Any, layer: Any, idxs: Any) -> Any:
        before = layer.quantiles
        layer = right(self, layer, idxs)
        layer.quantiles = (
            before
            if what == "unsliced"
            else nn.Parameter(before[: layer.channels].detach().clone())
        )
        return layer

    monkeypatch.setattr(EntropyBottleneckPruner, "prune_out_channels", broken)
    with pytest.raises(SurgeryError):
        prune(codec, {"h_a.4": [3, 5, 9, 15]}, groups)


def test_a_likelihood_of_other_channels_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, groups = built("bmshj2018-hyperprior")
    right = EntropyBottleneckPruner.prune_out_channels

    def broken(self: Any, layer: Any, idxs: Any) -> Any:
        before = layer.biases[1]
        layer = right(self, layer, idxs)
        layer.biases[1] = nn.Parameter(before[: layer.channels].detach().clone())
        return layer

    monkeypatch.setattr(EntropyBottleneckPruner, "prune_out_channels", broken)
    with pytest.raises(SurgeryError):
        prune(codec, {"h_a.4": [3, 5, 9, 15]}, groups)


@pytest.mark.parametrize("architecture", ["mbt2018", "cheng2020-anchor-checkerboard"])
def test_an_unpruned_context_mask_is_caught(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, groups = built(architecture)
    monkeypatch.setattr(
        MaskedConvPruner,
        "prune_out_channels",
        tp.pruner.function.ConvPruner.prune_out_channels,
    )
    name = next(
        g.name
        for g in groups
        if any("context_prediction" in m.module and m.axis == "out" for m in g.members)
    )
    with pytest.raises(SurgeryError):
        prune(codec, {name: [0, 4, 5]}, groups)


SHIFTED = ["bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018", "elic2022-chandelier"]


@pytest.mark.parametrize("architecture", SHIFTED)
def test_consumers_one_channel_off_are_caught(architecture: str) -> None:
    """Also in the hyper-synthesis, where the image does not show it."""
    codec, groups = built(architecture)
    names = [g.name for g in groups.prunable() if g.width > 3 and g.members[-1].axis == "in"]
    wanted = (
        [n for n in names if not n.startswith("latent_codec")]
        if len(names) < 20
        else [next(n for n in names if part in n) for part in ("g_a", "h_s", "entropy")]
    )
    assert wanted
    for name in wanted:
        shifted = []
        for group in groups:
            members = tuple(
                (
                    Member(m.module, m.axis, np.roll(m.index, 1, axis=0))
                    if group.name == name and m is group.members[-1]
                    else m
                )
                for m in group.members
            )
            shifted.append(Group(group.name, group.width, members, group.latent, group.pinned))
        with pytest.raises(SurgeryError):
            prune(codec, {name: [0, 1, groups[name].width - 2]}, Groups(shifted))


def test_a_codec_starts_anew_as_its_class_makes_it(architecture: str) -> None:
    codec, groups = built(architecture)
    small = prune(codec, random_keep(groups, 3), groups)
    before = state_of(small)
    reinitialise(small)
    after = dict(small.named_parameters())
    assert {k: v.shape for k, v in after.items()} == {k: before[k].shape for k in after}
    same = {key for key, value in after.items() if torch.equal(value, before[key])}
    assert all(key.endswith(("quantiles", "Gain")) or "factor" in key for key in same), (
        f"left as it was: {sorted(same)[:5]}"
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        fresh = ARCHITECTURES[architecture]()
        torch.manual_seed(7)
        twin = ARCHITECTURES[architecture]()
        for parameter in twin.parameters():
            parameter.data.fill_(0.123)
        reinitialise(twin)
    for (key, one), (_, other) in zip(
        fresh.named_parameters(), twin.named_parameters(), strict=True
    ):
        one, other = one.detach().double(), other.detach().double()
        if one.numel() >= 64:  # of fewer, mean and spread tell little
            spread = float(one.std())
            assert (
                abs(float(one.mean() - other.mean())) <= 7 * spread / one.numel() ** 0.5 + 1e-6
            ), key
            assert 0.6 * spread - 1e-6 <= float(other.std()) <= 1.6 * spread + 1e-6, key
    x = image(small, 0)
    assert bool(torch.isfinite(forward_for_analysis(small, x)["x_hat"]).all())
