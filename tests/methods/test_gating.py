"""Channel gating: which channels are open, what is computed, what it costs, and what is left when
closed ones are removed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressai.layers import GDN1
from compressai.models import FactorizedPrior, MeanScaleHyperprior
from fvcore.nn import FlopCountAnalysis
from helpers import N, built, hook_count, make_telling, same_state, state_of
from torch import Tensor, nn

from nicprune.codecs.anatomy import transform_of
from nicprune.common.errors import (
    BudgetError,
    CodecError,
    NicpruneError,
    RecipeError,
    TrainingError,
)
from nicprune.methods import Attached, attach
from nicprune.methods.gating.execution import set_skipping
from nicprune.methods.gating.gate import START, Gate, recording
from nicprune.methods.gating.method import ChannelGating
from nicprune.pruning.budget import Budget
from nicprune.pruning.cost import count_modules
from nicprune.training.trained_parameters import frozen, frozen_parameters

CODECS = [
    "bmshj2018-hyperprior",
    "mbt2018-mean",
    "mbt2018",
    "cheng2020-attn",
    "elic2022-chandelier",
]
QUICK = {"alpha": 1.0, "gating_steps": 2, "round_to": 1}
NO_GDN = "bmshj2018-factorized-relu"
TRANSFORMS = ("g_a", "h_a", "h_s", "g_s")


def picture(codec: nn.Module, seed: int, size: int = 64) -> Tensor:
    """Coarse or fine noise of much or little contrast: energies differ from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    cells = 2 ** (1 + seed % 6)
    x = F.interpolate(
        torch.rand(1, 3, cells, cells, generator=generator),
        (size, size),
        mode="bilinear",
        align_corners=False,
    )
    return (x * (0.3 + 0.7 * torch.rand(1, generator=generator))).to(next(codec.parameters()).dtype)


def gating(attached: Attached) -> ChannelGating:
    return next(m for m in attached.methods if isinstance(m, ChannelGating))


def gates_of(attached: Attached) -> dict[str, Gate]:
    return gating(attached).each()


@torch.no_grad()
def see(attached: Attached, count: int = 6) -> None:
    """Let gates learn what energies are usual."""
    attached.train()
    for seed in range(count):
        attached(picture(attached.codec, seed))


@torch.no_grad()
def close_some(attached: Attached, seed: int = 0, always: float = 0.25) -> Attached:
    """End the learning with thresholds that close some channels on all pictures, some on a few, and
    some on none.
    """
    method = gating(attached)
    see(attached)
    while not attached.done:
        attached.after_step()
    attached.eval()
    with recording(method.each(), {}):
        for number in range(6):
            attached.codec(picture(attached.codec, number))
        scores = {
            name: torch.cat(gate.recorded or []) + gate.threshold
            for name, gate in method.each().items()
        }
    generator = torch.Generator().manual_seed(seed)
    for name, gate in method.each().items():
        low, high = scores[name].amin(0), scores[name].amax(0)
        between = low + (high - low) * (0.1 + 0.8 * torch.rand(gate.channels, generator=generator))
        drawn = torch.rand(gate.channels, generator=generator)
        gate.threshold.copy_(
            torch.where(drawn < always, high + 10, torch.where(drawn > 0.75, low - 10, between))
        )
        gate.threshold[int(torch.randint(gate.channels, (1,), generator=generator))] = -10
    return attached


_gated: dict[str, Attached] = {}


def gated(name: str) -> Attached:
    """A codec with gates that are closed in part, a copy of the test's own."""
    if name not in _gated:
        _gated[name] = close_some(attach(built(name)[0], "channel_gating", **QUICK))
    return copy.deepcopy(_gated[name])


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / first.abs().max())


def opened(attached: Attached) -> dict[str, list[int]]:
    """Which channels were open at the last image."""
    return {
        name: gate.open.nonzero().flatten().tolist() for name, gate in gates_of(attached).items()
    }


def shadows(codec: nn.Module) -> list[str]:
    """Layers in front of whose parameters others stand."""
    return [
        name for name, m in codec.named_modules() if "weight" in m.__dict__ or "bias" in m.__dict__
    ]


@contextmanager
def input_widths(attached: Attached) -> Iterator[dict[str, int]]:
    """How many channels each gated convolution is really given inside the block."""
    found: dict[str, int] = {}
    handles = []
    for name in gates_of(attached):
        layer = attached.codec.get_submodule(name)
        handles.append(
            layer.register_forward_hook(
                lambda _, args, out, name=name: found.__setitem__(name, args[0].shape[1])
            )
        )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def one_line(error: pytest.ExceptionInfo[NicpruneError], *parts: str) -> None:
    told = str(error.value)
    assert "\n" not in told and all(part in told for part in parts), told


# -- gates themselves -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_every_convolution_has_a_gate_but_those_of_context_models(name: str) -> None:
    attached = gated(name)
    expected = {
        layer
        for layer, module in attached.codec.named_modules()
        if type(module) in (nn.Conv2d, nn.ConvTranspose2d)
        and module.in_channels != 3
        and module.groups == 1
        and transform_of(layer) in TRANSFORMS  # type: ignore[union-attr]
    }
    assert set(gates_of(attached)) == expected and len(expected) >= 13
    with_hooks = {
        layer for layer, module in attached.codec.named_modules() if module._forward_pre_hooks
    }
    assert not {
        layer
        for layer in with_hooks
        if transform_of(layer)
        in ("context_prediction", "entropy_parameters", "channel_context", "entropy_bottleneck")
    }


def test_gates_start_open_and_stay_so_until_they_learn() -> None:
    attached = attach(built("mbt2018-mean")[0], "channel_gating", **QUICK)
    see(attached)
    assert all(bool((gate.open_rate == 1).all()) for gate in gates_of(attached).values())
    attached.eval()
    with torch.no_grad():
        for seed in range(6, 12):  # pictures that it has not seen
            attached(picture(attached.codec, seed))
            assert all(bool(gate.open.all()) for gate in gates_of(attached).values())


@pytest.mark.parametrize("energy", ["mean", "max"])
def test_scales_are_means_over_images_of_the_energies(energy: str) -> None:
    attached = attach(built(NO_GDN)[0], "channel_gating", **QUICK, energy=energy)
    seen: list[Tensor] = []
    layer: Any = attached.codec.get_submodule("g_a.2")
    pooled = torch.mean if energy == "mean" else torch.amax
    handle = layer.register_forward_pre_hook(
        lambda _, args: seen.append(pooled(args[0].square(), (0, 2, 3)))
    )
    see(attached)
    handle.remove()
    assert (
        len(seen) == 6
        and relative(torch.stack(seen).mean(0), gates_of(attached)["g_a.2"].scale) <= 1e-5
    )


@pytest.mark.parametrize("kernel", [0, 1, 3, 5])
@pytest.mark.parametrize("relative_to", ["channel", "layer"])
def test_scores_are_mixed_across_neighbours(kernel: int, relative_to: Any) -> None:
    gate = Gate(7, "mean", kernel, relative_to)
    generator = torch.Generator().manual_seed(0)
    gate.scale.copy_(0.5 + torch.rand(7, generator=generator))
    gate.seen.fill_(1)
    energies = torch.rand(3, 7, generator=generator)
    own = gate.scores(energies)  # at the start, a channel's own alone
    alone = Gate(7, "mean", 0, relative_to)
    alone.load_state_dict({k: v for k, v in gate.state_dict().items() if k != "mix"})
    assert torch.equal(own, alone.scores(energies))
    # What does not exceed its usual energy does not exceed a score of 1, and more energy is a
    # higher score.
    usual = gate.scale
    assert torch.allclose(gate.scores(usual[None]), torch.ones(1, 7), atol=1e-6)
    assert bool((gate.scores(1.1 * energies) > own).all())
    if not kernel:
        return
    taps = torch.rand(kernel, generator=generator)
    assert gate.mix is not None
    gate.mix.data.copy_(taps)
    padded = F.pad(own.detach(), (kernel // 2, kernel // 2))
    expected = torch.stack([padded[:, i : i + kernel] @ taps for i in range(7)], 1)
    assert torch.allclose(gate.scores(energies), expected, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("threshold", [10.0, 1e6, float("inf")])
def test_one_channel_at_least_is_open(threshold: float, training: bool) -> None:
    gate = Gate(9, "mean", 5, "channel").train(training)
    x = torch.rand(4, 9, 5, 5, generator=torch.Generator().manual_seed(0)) * torch.rand(4, 9, 1, 1)
    gate.train()(x)
    gate.train(training).threshold.data.fill_(threshold)
    for batch in (x, 0 * x, 1e-30 * x):
        found = gate(batch).detach()
        assert (found.count_nonzero(1) == 1).all() and (found.sum(1) == 1).all()


def test_one_channel_is_wholly_open_while_the_others_fade() -> None:
    gate = Gate(9, "mean", 5, "channel").train()
    x = torch.rand(4, 9, 5, 5, generator=torch.Generator().manual_seed(0))
    gate(x)
    gate.threshold.data.fill_(1.05)
    gate.softness.fill_(0.5)
    found = gate(x * torch.rand(4, 9, 1, 1, generator=torch.Generator().manual_seed(1))).detach()
    assert bool(((found > 0) & (found < 1)).any()) and bool((found.amax(1) == 1).all())
    gate.threshold.data.fill_(1e6)
    found = gate(x).detach()
    assert bool((found.amax(1) == 1).all()) and bool((found.count_nonzero(1) == 1).all())


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018"])
def test_a_codec_with_all_gates_closed_runs_on_one_channel_each(name: str) -> None:
    attached = gated(name)
    for gate in gates_of(attached).values():
        gate.threshold.data.fill_(1e9)
    with torch.no_grad(), input_widths(attached) as widths:
        out = attached(picture(attached.codec, 1))["x_hat"]
    assert (
        bool(torch.isfinite(out).all())
        and set(widths.values()) == {1}
        and len(widths) == len(gates_of(attached))
    )
    attached.update(force=True)
    with torch.no_grad():
        sent = attached.compress(picture(attached.codec, 1))
        assert torch.equal(
            *(attached.decompress(sent["strings"], sent["shape"])["x_hat"] for _ in range(2))
        )


# -- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_leaving_channels_out_is_multiplying_them_by_zero(name: str) -> None:
    attached = gated(name).double()
    ran = 0
    # From 192 on, maps are sampled to be pooled, and GDNs in front of gates skip channels too.
    for seed, size in ((1, 64), (4, 64), (5, 64), (30, 192), (4, 192)):
        x = picture(attached.codec, seed, size)
        with torch.no_grad():
            set_skipping(attached.codec, True)
            with input_widths(attached) as widths:
                short = attached(x)
            which, cost = opened(attached), attached.image_cost()
            assert not shadows(attached.codec)
            # Hardly any channel closed is not worth gathering the others; all that is gathered is
            # what is open.
            full = {layer: gate.channels for layer, gate in gates_of(attached).items()}
            assert all(width in (len(which[layer]), full[layer]) for layer, width in widths.items())
            assert all(
                width == len(which[layer])
                for layer, width in widths.items()
                if len(which[layer]) <= 0.9 * full[layer]
            )
            ran += sum(width < full[layer] for layer, width in widths.items())
            set_skipping(attached.codec, False)
            with input_widths(attached) as widths:
                masked = attached(x)
            assert widths == full and opened(attached) == which and attached.image_cost() == cost
        assert relative(masked["x_hat"], short["x_hat"]) <= 1e-10
        assert all(
            relative(value, short["likelihoods"][key]) <= 1e-10
            for key, value in masked["likelihoods"].items()
        )
    assert ran >= 2 * len(gates_of(attached))


@torch.no_grad()
def test_a_decoder_keeps_the_memory_format_of_its_weights() -> None:
    attached = (
        close_some(attach(built("bmshj2018-hyperprior")[0], "channel_gating", **QUICK))
        .eval()
        .to(memory_format=torch.channels_last)
    )
    codec: Any = attached.codec
    formats = {}
    for name, layer in codec.g_s.named_children():
        layer.register_forward_hook(
            lambda _, args, out, name=name: formats.update(
                {name: out.is_contiguous(memory_format=torch.channels_last)}
            )
        )
    codec.g_s(torch.rand(1, codec.M, 4, 6))
    assert (
        min(
            float(gate.open.float().mean())
            for name, gate in gates_of(attached).items()
            if name.startswith("g_s")
        )
        < 0.95
    ), "some are left out"
    assert len(formats) == 7 and all(formats.values()), (
        "kernels for the other format take twice as long"
    )


@pytest.mark.parametrize("energy", ["mean", "max"])
def test_a_large_map_is_pooled_over_some_of_its_pixels(energy: Any) -> None:
    gate, x = (
        Gate(3, energy, 0, "channel"),
        torch.rand(2, 3, 130, 71, generator=torch.Generator().manual_seed(0)),
    )
    gate.decide(torch.ones(1, 3))  # a usual energy of 1
    some = x[:, :, ::2, ::2]  # 65 x 36 = 2340, of at most 4096; 9230 would be too many
    with recording({"": gate}, {}):
        gate.eval()(x)
        assert gate.recorded is not None
        found = gate.recorded[0] + gate.threshold.detach()
    energies = some.square().mean((2, 3)) if energy == "mean" else some.square().amax((2, 3))
    assert torch.allclose(found, energies**0.25, atol=1e-6) and gate.fraction == pytest.approx(
        2340 / 9230
    )
    gate(x[:, :, :64, :64])
    assert gate.fraction == 1


def test_a_norm_computes_no_more_than_is_read() -> None:
    attached = gated("bmshj2018-hyperprior")
    codec: Any = attached.codec
    widths: dict[str, int] = {}
    for name in ("g_a.1", "g_s.5"):
        codec.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: widths.__setitem__(name, out.shape[1])
        )
    for size, narrow in ((64, False), (192, True)):
        with torch.no_grad():
            attached(picture(codec, 1, size))
        which = opened(attached)
        for pool, reader in (("g_a.1", "g_a.2"), ("g_s.5", "g_s.6")):
            assert widths[pool] == (len(which[reader]) if narrow else N) and len(which[reader]) < N
    # Not where something between the two needs all of them.
    attached = close_some(
        attach(
            built("bmshj2018-hyperprior")[0],
            [("channel_gating", QUICK), rate_of("modulated_autoencoder")],
        )
    )
    attached.codec.get_submodule("g_s.5").register_forward_hook(
        lambda m, args, out: widths.__setitem__("g_s.5", out.shape[1])
    )
    with torch.no_grad():
        attached(picture(attached.codec, 1, 192))
    assert widths["g_s.5"] == N > len(opened(attached)["g_s.6"])


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018"])
@pytest.mark.parametrize("layer", ["g_a.2", "g_s.2", "h_s.0"])
@pytest.mark.parametrize("where", ["inside", "before", "behind"])
def test_a_layer_that_raises_keeps_its_own_weight(name: str, layer: str, where: str) -> None:
    attached = gated(name)
    module: Any = attached.codec.get_submodule(layer)
    own, x = module.weight, picture(attached.codec, 1)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt if where == "behind" else ValueError

    with torch.no_grad():
        before = attached(x)["x_hat"]
        assert not gates_of(attached)[layer].open.all()
        if where == "inside":
            module.forward = fail
        else:
            handle = (
                module.register_forward_pre_hook(fail)
                if where == "before"
                else module.register_forward_hook(fail)
            )
        with pytest.raises((ValueError, KeyboardInterrupt)):
            attached(x)
        assert not shadows(attached.codec) and module.weight is own
        if where == "inside":
            del module.forward
        else:
            handle.remove()
        assert torch.equal(attached(x)["x_hat"], before)


@pytest.mark.parametrize("name", CODECS)
def test_images_of_a_batch_have_their_own_gates(name: str) -> None:
    attached = gated(name).double()
    pictures = [picture(attached.codec, seed) for seed in (0, 5)]
    with torch.no_grad():
        together, alone, which = attached(torch.cat(pictures)), [], []
        for x in pictures:
            alone.append(attached(x))
            which.append(opened(attached))
    assert which[0] != which[1]
    for number, one in enumerate(alone):
        assert relative(one["x_hat"], together["x_hat"][number : number + 1]) <= 1e-10
        assert all(
            relative(value, together["likelihoods"][key][number : number + 1]) <= 1e-10
            for key, value in one["likelihoods"].items()
        )


@pytest.mark.parametrize("name", CODECS)
def test_bitstreams_decode_with_gates_partly_closed(name: str) -> None:
    attached = gated(name)
    attached.update(force=True)
    receiver = copy.deepcopy(attached)
    with torch.no_grad():
        for seed in (1, 4):
            x = picture(attached.codec, seed)
            shown = attached(x)["x_hat"].clamp(0, 1)
            at_forward = opened(attached)
            sent = attached.compress(x)
            receiver(picture(attached.codec, seed + 1))  # what it saw last is of no account
            first, second = (
                receiver.decompress(sent["strings"], sent["shape"])["x_hat"] for _ in range(2)
            )
            assert torch.equal(first, second)
            at_encoder, at_decoder = opened(attached), opened(receiver)
            shared = [layer for layer in at_encoder if transform_of(layer) == "h_s"]
            assert shared and all(
                at_encoder[layer] == at_decoder[layer] == at_forward[layer] for layer in shared
            )
            if name in ("bmshj2018-hyperprior", "mbt2018-mean"):
                assert float((first - shown).abs().mean()) <= 1e-5
                assert all(
                    at_decoder[layer] == which
                    for layer, which in at_forward.items()
                    if transform_of(layer) == "g_s"
                )


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "elic2022-chandelier"])
def test_an_image_is_coded_the_same_in_a_batch_and_alone(name: str) -> None:
    """Closed channels are left out of the computation, or multiplied by zero: other roundings."""
    attached = attach(built(name)[0], "channel_gating", **QUICK)
    images = torch.cat([picture(attached.codec, seed, 128) for seed in range(3)])
    with torch.no_grad():
        for seed in range(3):
            attached.train()(picture(attached.codec, seed))
        for gate in attached.methods[0].each().values():  # type: ignore[operator]
            gate.threshold.fill_(0.9)
    attached.eval().update(force=True)
    whole = attached.compress(images)
    decoded = attached.decompress(whole["strings"], whole["shape"])["x_hat"]

    def of_image(strings: Any, index: int) -> Any:
        if all(isinstance(string, bytes) for string in strings):
            return [strings[index]]
        return [of_image(one, index) for one in strings]

    for index in range(3):
        alone = attached.compress(images[index : index + 1])
        assert alone["shape"] == whole["shape"]
        assert alone["strings"] == of_image(whole["strings"], index)
        one = attached.decompress(of_image(whole["strings"], index), whole["shape"])["x_hat"]
        assert torch.equal(one[0], decoded[index])
    assert any(not bool(m.open.all()) for m in attached.modules() if hasattr(m, "open")), (
        "no gate closed anything: this test shows nothing"
    )


def test_both_sides_compute_the_same_whether_or_not_gradients_are_kept() -> None:
    """The tables that strings are written with are h_s's output: a rounding apart, they may not
    decode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec: Any = make_telling(MeanScaleHyperprior(48, 64))
    attached = close_some(attach(codec, "channel_gating", **QUICK))
    attached.update(force=True)
    found: list[Tensor] = []
    codec.h_s.register_forward_hook(lambda m, a, out: found.append(out.detach().clone()))
    x = picture(codec, 1)
    sent = attached.compress(x)
    with torch.no_grad():
        attached.decompress(sent["strings"], sent["shape"])
    assert torch.equal(*found)


# -- what it costs --------------------------------------------------------------------------------


def counted(attached: Attached, which: Mapping[str, list[int]], size: int) -> dict[str, float]:
    """MACs at 64x64 of each module with these channels open, by hand: from shapes, and fvcore for
    all that has no gate.
    """
    codec, sizes = attached.codec, {}

    def measure(name: str) -> Any:
        return lambda _, args, out: sizes.__setitem__(
            name, (args[0].shape[2:].numel(), out.shape[2:].numel())
        )

    handles = [codec.get_submodule(name).register_forward_hook(measure(name)) for name in which]
    set_skipping(codec, False)
    with torch.no_grad():
        codec(torch.full((1, 3, 64, 64), 0.5))
    set_skipping(codec, True)
    for handle in handles:
        handle.remove()
    counts = count_modules(codec)
    leaves = {name for name, m in codec.named_modules() if not list(m.children())}
    found = {
        name: float(counts.get(name, 0))
        for name in counts
        if name in leaves or hasattr(codec.get_submodule(name), "gamma")
    }
    found = {
        name: n
        for name, n in found.items()
        if not any(hasattr(codec.get_submodule(name.rpartition(".")[0]), "gamma") for _ in [0])
    }
    found["rest"] = counts[""] - sum(found.values())
    for name, channels in which.items():
        layer: Any = codec.get_submodule(name)
        taps = layer.kernel_size[0] * layer.kernel_size[1]
        places = sizes[name][0 if isinstance(layer, nn.ConvTranspose2d) else 1]
        assert found[name] == places * taps * layer.in_channels * layer.out_channels
        kernel = gating(attached).config.kernel
        found[name] = (
            places * taps * len(channels) * layer.out_channels + layer.in_channels * kernel
        )
        # Square and add at every pixel, or at some of a large map's.
        side = math.isqrt(sizes[name][0]) * size // 64
        step = next(s for s in range(1, side + 1) if math.ceil(side / s) ** 2 <= 4096)
        looked_at = sizes[name][0] * (math.ceil(side / step) / side) ** 2
        found[name] += layer.in_channels * looked_at
        pool = {
            "g_a.2": "g_a.1",
            "g_a.4": "g_a.3",
            "g_a.6": "g_a.5",
            "g_s.2": "g_s.1",
            "g_s.4": "g_s.3",
            "g_s.6": "g_s.5",
        }.get(name)
        if step > 1 and pool is not None and hasattr(codec.get_submodule(pool), "gamma"):
            # Its output at those pixels comes first, to see what is open; then the open ones,
            # everywhere.
            found[pool] = found[pool] / layer.in_channels * len(channels)
            found[name] += layer.in_channels**2 * looked_at
    return found


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018", "elic2022-chandelier"])
def test_the_cost_of_an_image_is_that_of_its_open_channels(name: str) -> None:
    attached = gated(name)
    totals = []
    for seed, size in ((0, 64), (5, 64), (5, 128), (5, 192), (3, 320)):
        with torch.no_grad():
            attached(picture(attached.codec, seed, size))
        cost = attached.image_cost()
        assert cost is not None
        by_hand = counted(attached, opened_before := opened(attached), size)
        with torch.no_grad():
            attached(picture(attached.codec, seed, size))
        assert opened(attached) == opened_before
        total, by_transform = cost
        assert total["macs"] == pytest.approx(sum(by_hand.values()), rel=1e-9)
        assert total["encoder"] == pytest.approx(
            sum(n for layer, n in by_hand.items() if transform_of(layer) != "g_s"), rel=1e-9
        )
        assert total["decoder"] == pytest.approx(
            sum(n for layer, n in by_hand.items() if transform_of(layer) not in ("g_a", "h_a")),
            rel=1e-9,
        )
        for transform in TRANSFORMS:
            assert by_transform[transform] == pytest.approx(
                sum(n for layer, n in by_hand.items() if transform_of(layer) == transform), rel=1e-9
            )
        totals.append(total["macs"])
    assert totals[0] != totals[1] and max(totals) < attached.cost.totals().macs


def test_the_cost_is_fvcores_of_a_layer_that_is_as_narrow() -> None:
    attached = gated("bmshj2018-hyperprior")
    with torch.no_grad():
        attached(picture(attached.codec, 1))
    cost = attached.image_cost()
    assert cost is not None
    layer: Any = attached.codec.get_submodule("g_a.2")
    gate = gates_of(attached)["g_a.2"]
    assert 1 <= int(gate.open.sum()) < N

    def layer_cost(channels: int) -> int:
        narrow = nn.Conv2d(
            channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
        )
        analysis = FlopCountAnalysis(narrow, torch.zeros(1, channels, 32, 32))
        return analysis.unsupported_ops_warnings(False).total()

    gate.open.fill_(True)
    wider = attached.image_cost()
    assert wider is not None
    open_then = len(opened(gated("bmshj2018-hyperprior"))["g_a.2"])
    with torch.no_grad():
        attached(picture(attached.codec, 1))
    open_then = int(gate.open.sum())
    assert wider[0]["macs"] - cost[0]["macs"] == layer_cost(N) - layer_cost(open_then)


def train(
    attached: Attached,
    steps: int,
    batch: int = 2,
    lr: float = 1e-4,
    *,
    all_parameters: bool = False,
) -> None:
    """Train with noise and all; `all_parameters`: an optimiser that is given thresholds too."""
    own = set() if all_parameters else {id(p) for p in attached.manually_updated()}
    optimizer = torch.optim.Adam(
        [
            p
            for n, p in attached.named_parameters()
            if id(p) not in own and not n.endswith("quantiles")
        ],
        lr=lr,
    )
    attached.train()
    for number in range(steps):
        torch.manual_seed(number)
        x = torch.cat([picture(attached.codec, 7 * number + i) for i in range(batch)])
        optimizer.zero_grad()
        out = attached(x)
        rate = sum(-torch.log2(value).mean() for value in out["likelihoods"].values())
        (100 * (out["x_hat"] - x).square().mean() + 0.1 * rate + attached.loss(out, x)).backward()
        optimizer.step()
        attached.after_step()


@torch.no_grad()
def mean_cost(attached: Attached, pictures: list[Tensor]) -> dict[str, float]:
    """What these pictures cost on average, as shares of the original codec."""
    attached.eval()
    costs = []
    for x in pictures:
        attached(x)
        cost = attached.image_cost()
        assert cost is not None
        costs.append(cost[0])
    return {
        what: float(np.mean([c[what] for c in costs])) / getattr(attached.cost.original, what)
        for what in costs[0]
    }


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("bmshj2018-hyperprior", {"macs": 0.6}),
        ("mbt2018", {"encoder": 0.8, "decoder": 0.6}),
        (NO_GDN, {"macs": 0.4}),
    ],
)
def test_calibrating_meets_the_budget_on_the_images_given(
    name: str, budget: dict[str, float]
) -> None:
    # No width is a multiple of 64: nothing is removed, and what is measured is what the gates
    # leave.
    attached = attach(built(name)[0], "channel_gating", budget=budget, gating_steps=6, round_to=64)
    train(attached, 6)
    pictures = [picture(attached.codec, seed) for seed in range(100, 108)]
    attached.calibrate(pictures)
    assert attached.keep() == {}
    found = mean_cost(attached, pictures)
    assert all(found[what] <= share for what, share in budget.items()), found
    # One budget at least is used to the full, but for the step that the next channel to open would
    # be.
    assert max(found[what] / share for what, share in budget.items()) >= 0.93, found


@pytest.mark.parametrize(("name", "over"), [(NO_GDN, 0.0), ("bmshj2018-hyperprior", 0.02)])
def test_what_is_hardened_meets_the_budget_too(name: str, over: float) -> None:
    attached = attach(
        built(name)[0],
        "channel_gating",
        budget={"macs": 0.5},
        gating_steps=6,
        round_to=1,
        freeze=0.0,
        kernel=0,
    )
    train(attached, 6)
    pictures = [picture(attached.codec, seed) for seed in range(100, 108)]
    attached.calibrate(pictures)
    assert attached.keep() != {}
    small = attached.harden()
    # GDN's pool is the removed channels' on average only, so that energies behind it may differ a
    # little.
    assert 0.93 * 0.5 <= mean_cost(small, pictures)["macs"] <= 0.5 + over
    small.calibrate(pictures)
    assert 0.93 * 0.5 <= mean_cost(small, pictures)["macs"] <= 0.5


def test_calibrating_where_the_budget_is_met_already_changes_nothing() -> None:
    attached = attach(
        built("bmshj2018-hyperprior")[0], "channel_gating", budget={"macs": 0.9}, gating_steps=2
    )
    train(attached, 2)
    pictures = [picture(attached.codec, seed) for seed in range(4)]
    attached.calibrate(pictures)
    for gate in gates_of(attached).values():  # all are open, and the budget leaves more
        gate.threshold.data.fill_(START + 0.1)
        gate.importance.copy_(torch.rand(gate.channels))
    method: Any = gating(attached)
    loose = Budget(macs=0.9).model_copy(update={"macs": 1.5})
    method.config = method.config.model_copy(update={"budget": loose})
    thresholds = [gate.threshold.data.clone() for gate in gates_of(attached).values()]
    forwards: list[int] = []
    attached.codec.get_submodule("g_a.0").register_forward_hook(lambda *_: forwards.append(1))
    attached.calibrate(pictures)
    assert len(forwards) <= 2 * len(pictures)
    for gate, threshold in zip(gates_of(attached).values(), thresholds, strict=True):
        assert torch.equal(gate.threshold.data, threshold)


@pytest.mark.parametrize("energies", [0.1, 10.0])
def test_calibrating_moves_least_what_matters_most_for_its_macs(energies: float) -> None:
    attached = attach(
        built("bmshj2018-hyperprior")[0],
        "channel_gating",
        budget={"macs": 0.6},
        gating_steps=6,
        round_to=64,
    )
    train(attached, 6)
    pictures = [picture(attached.codec, seed) for seed in range(6)]
    attached.calibrate(pictures)
    method, generator = gating(attached), torch.Generator().manual_seed(0)
    for gate in gates_of(attached).values():
        gate.importance.copy_(torch.rand(gate.channels, generator=generator) ** 4)
        # More channels, or fewer, are open than the budget leaves.
        gate.scale.mul_(1 / energies)
    before = torch.cat([gate.threshold.data.clone() for gate in gates_of(attached).values()])
    attached.calibrate(pictures)
    ways = torch.cat([gate.threshold.data for gate in gates_of(attached).values()]) - before
    importance = torch.cat([gate.importance for gate in gates_of(attached).values()])
    per_mac = importance / torch.from_numpy(method._prices).to(importance)
    order = per_mac.argsort()
    if energies > 1:  # the least important for their MACs go furthest towards closed
        assert bool((ways > 0).all()) and bool((ways[order].diff() <= 1e-6).all())
    else:  # the most important go furthest towards open
        assert bool((ways <= 0).all()) and float(ways.min()) < 0
        away = before + ways > START + 1e-6  # others are open whatever comes
        assert bool((ways[order][away[order]].diff() <= 1e-6).all())
    moved = ways[ways != 0].abs()
    assert float(moved.max() / moved.min()) > 10


def test_calibrating_measures_and_changes_nothing_else() -> None:
    attached = gated("bmshj2018-hyperprior").train()
    pictures = [picture(attached.codec, seed) for seed in range(100, 105)]
    codec, thresholds = (
        state_of(attached.codec),
        {n: g.threshold.clone() for n, g in gates_of(attached).items()},
    )
    scales = {n: g.scale.clone() for n, g in gates_of(attached).items()}
    modes = {name: m.training for name, m in attached.named_modules()}
    attached.calibrate(pictures)
    assert same_state(codec, state_of(attached.codec)) and modes == {
        name: m.training for name, m in attached.named_modules()
    }
    assert all(
        torch.equal(gate.threshold, thresholds[n]) and torch.equal(gate.scale, scales[n])
        for n, gate in gates_of(attached).items()
    )
    attached.eval()
    rates = {name: torch.zeros(gate.channels) for name, gate in gates_of(attached).items()}
    pools: list[Tensor] = []
    attached.codec.get_submodule("g_a.1").register_forward_pre_hook(
        lambda _, args: pools.append(args[0].square().mean((0, 2, 3)))
    )
    with torch.no_grad():
        for x in pictures:
            attached(x)
            for name, gate in gates_of(attached).items():
                rates[name] += gate.open.float() / len(pictures)
    for name, gate in gates_of(attached).items():
        assert torch.allclose(gate.open_rate, rates[name], atol=1e-6), name
    meter: Any = gating(attached).powers["g_a/1"]
    assert relative(torch.stack(pools).mean(0), meter.value) <= 1e-5


def test_each_image_is_counted_once_whatever_is_skipped() -> None:
    """A GDN that decides for the gate behind it, and finds that leaving out does not pay, leaves
    the decision as it is.
    """
    attached = gated("bmshj2018-hyperprior")
    gates_of(attached)["g_a.2"].threshold.data.fill_(
        -10
    )  # everything is open: behind a norm of a large map that is sampled
    with torch.no_grad(), recording(gates_of(attached), {}):
        for seed in range(3):
            attached(picture(attached.codec, seed, 192))
        rows = {
            name: [tuple(r.shape) for r in gate.recorded or []]
            for name, gate in gates_of(attached).items()
        }
    assert all(
        found == [(1, gates_of(attached)[name].channels)] * 3 for name, found in rows.items()
    ), rows


def test_a_channel_open_because_one_must_be_is_counted() -> None:
    attached = gated("bmshj2018-hyperprior")
    gate = gates_of(attached)["g_s.2"]
    gate.threshold.data.fill_(1e6)
    pictures = [picture(attached.codec, seed) for seed in range(3)]
    attached.calibrate(pictures)
    assert float(gate.open_rate.sum()) == pytest.approx(1, abs=1e-6)


# -- learning -------------------------------------------------------------------------------------


def thresholds_of(attached: Attached) -> Tensor:
    return torch.cat([gate.threshold.detach() for gate in gates_of(attached).values()])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_thresholds_are_drawn_to_alpha(alpha: float) -> None:
    attached = attach(built(NO_GDN)[0], "channel_gating", alpha=alpha, gating_steps=20)
    see(attached)
    distances = [float((thresholds_of(attached) - alpha).abs().max())]
    while not attached.done:
        with pytest.raises(TrainingError) as error:
            attached.harden()
        one_line(error, f"step {20 - attached.steps_left} of 20", "train on until")
        attached.after_step()
        distances.append(float((thresholds_of(attached) - alpha).abs().max()))
    assert len(distances) == 21 and all(
        after < before for before, after in zip(distances, distances[1:], strict=False)
    )
    assert distances[-1] <= 0.02 * distances[0]
    attached.after_step()
    assert float((thresholds_of(attached) - alpha).abs().max()) == distances[-1]


def test_gamma_is_how_fast() -> None:
    reached = []
    for gamma in (0.005, 0.02, 0.1):
        attached = attach(
            built(NO_GDN)[0], "channel_gating", alpha=1.0, gamma=gamma, gating_steps=10
        )
        for _ in range(10):
            attached.after_step()
        reached.append(float(thresholds_of(attached).mean()))
        # The gradient step of gamma (alpha - alpha_t)^2, ten times.
        start = float(thresholds_of(attach(built(NO_GDN)[0], "channel_gating", alpha=1.0)).mean())
        assert reached[-1] == pytest.approx(1 + (start - 1) * (1 - 2 * gamma) ** 10, rel=1e-4)
    assert reached[0] < reached[1] < reached[2] < 1


def test_a_larger_alpha_is_sparser() -> None:
    open_shares, costs = [], []
    for alpha in (0.4, 0.9, 1.2):
        attached = attach(
            built("mbt2018-mean")[0], "channel_gating", alpha=alpha, gating_steps=6, round_to=64
        )
        train(attached, 6)
        pictures = [picture(attached.codec, seed) for seed in range(100, 104)]
        attached.calibrate(pictures)
        open_shares.append(attached.metrics()["channel_gating/density"])
        costs.append(mean_cost(attached, pictures)["macs"])
    assert open_shares[0] > open_shares[1] > open_shares[2] and costs[0] > costs[1] > costs[2]


def test_training_learns_thresholds_mixing_and_importance() -> None:
    attached = attach(
        built("bmshj2018-hyperprior")[0], "channel_gating", **{**QUICK, "gating_steps": 4}
    )
    before, codec = state_of(gating(attached)), state_of(attached.codec)
    train(attached, 2)
    after = state_of(gating(attached))
    for key in before:
        if key.endswith(("threshold", "mix", "scale", "seen", "importance", "value")):
            assert not torch.equal(before[key], after[key]), key
    # Not all thresholds alike: the gradient has a say.
    assert all(float(gate.threshold.detach().std()) > 0 for gate in gates_of(attached).values())
    assert not same_state(codec, state_of(attached.codec))


def test_a_gradient_that_is_not_finite_moves_nothing_by_itself() -> None:
    attached = attach(built(NO_GDN)[0], "channel_gating", **{**QUICK, "gating_steps": 4})
    for number, gate in enumerate(gates_of(attached).values()):
        gate.threshold.grad = torch.full_like(
            gate.threshold, [float("nan"), float("inf"), 1.0][number % 3]
        )
    attached.after_step()
    assert (
        bool(torch.isfinite(thresholds_of(attached)).all())
        and float(thresholds_of(attached).std()) < 1e-6
    )


def test_an_optimiser_that_also_steps_the_thresholds_changes_nothing() -> None:
    found = []
    for outside in (False, True):
        attached = attach(built(NO_GDN)[0], "channel_gating", **{**QUICK, "gating_steps": 4})
        train(attached, 6, lr=1e-2, all_parameters=outside)
        found.append(state_of(attached))
    assert same_state(*found)


@pytest.mark.parametrize("resumed", [False, True])
def test_once_done_gates_stay_as_they_are_while_the_codec_trains_on(resumed: bool) -> None:
    attached = attach(built("bmshj2018-hyperprior")[0], "channel_gating", **QUICK)
    train(attached, 2)
    assert attached.done
    if resumed:
        fresh = attach(built("bmshj2018-hyperprior")[0], "channel_gating", **QUICK)
        fresh.load_state_dict(copy.deepcopy(attached.state_dict()))
        attached = fresh
    attached.zero_grad()
    before, codec = state_of(gating(attached)), state_of(attached.codec)
    train(attached, 3, lr=1e-2)
    # Running means follow the codec; nothing else does.
    running = (".scale", ".seen", ".open_rate", ".value")
    after = state_of(gating(attached))
    learnt = [{k: v for k, v in one.items() if not k.endswith(running)} for one in (before, after)]
    assert same_state(*learnt)
    assert not same_state(codec, state_of(attached.codec))
    assert all(p.grad is None for p in gating(attached).parameters())
    # They gate all the same, hard.
    gate = gates_of(attached)["g_a.2"].train()
    assert set(gate(torch.rand(4, N, 3, 3) * torch.rand(4, N, 1, 1)).unique().tolist()) <= {
        0.0,
        1.0,
    }


@pytest.mark.parametrize("energy", ["mean", "max"])
@pytest.mark.parametrize("relative_to", ["channel", "layer"])
def test_gates_follow_weights_that_grow_while_the_codec_trains_on(
    energy: Any, relative_to: Any
) -> None:
    gate, generator = Gate(9, energy, 3, relative_to), torch.Generator().manual_seed(0)
    images = [torch.rand(2, 9, 4, 4, generator=generator) * (1 + n % 3) for n in range(12)]
    usual = torch.rand(2, 9, 4, 4, generator=generator) * 2
    gate.train()(usual)
    gate.threshold.data.copy_(gate.scores(gate.pool(images[4])).mean(0))
    gate.learns = False  # what follows is fine-tuning

    def decisions(factor: float) -> Tensor:
        with torch.no_grad():
            return torch.cat([gate.eval()(factor * x) for x in images])

    before = decisions(1)
    assert 0.1 < float(before.mean()) < 0.9 and not torch.equal(decisions(5), before)
    for _ in range(400):
        rate = gate.train()(5 * usual).mean(0)
    assert torch.equal(decisions(5), before)
    assert torch.allclose(gate.open_rate, rate, atol=1e-6)
    # One batch that is not finite leaves the means as they were.
    means = gate.scale.clone(), gate.open_rate.clone()
    for bad in (float("inf"), float("nan")):
        gate.train()(torch.full((2, 9, 4, 4), bad))
    assert torch.equal(gate.scale, means[0]) and torch.equal(gate.open_rate, means[1])


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_gates_follow_on_the_side_that_is_trained_alone(side: Any) -> None:
    attached = attach(built("bmshj2018-hyperprior")[0], "channel_gating", **QUICK)
    train(attached, 2)
    assert attached.done
    before = {n: state_of(gate) for n, gate in gates_of(attached).items()}
    meters = {n: m.value.clone() for n, m in gating(attached)._meters().items()}
    with frozen(frozen_parameters(attached, side)):
        train(attached, 2)
    trains = ("g_a", "h_a") if side == "encoder" else ("g_s",)
    for name, gate in gates_of(attached).items():
        assert same_state(before[name], state_of(gate)) == (not name.startswith(trains)), name
    for name, meter in gating(attached)._meters().items():
        assert torch.equal(meters[name], meter.value) == (not name.startswith(trains)), name


def test_a_state_of_learning_is_taken_up_where_it_was() -> None:
    done = attach(built("bmshj2018-hyperprior")[0], "channel_gating", **QUICK)
    early = copy.deepcopy(done.state_dict())
    train(done, 2)
    done.load_state_dict(early)
    assert not done.done and all(gate.learns for gate in gates_of(done).values())
    train(done, 2)
    assert done.done


# -- removing what never opens --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "cheng2020-attn", "elic2022-chandelier"])
@pytest.mark.parametrize(("freeze", "round_to"), [(0.0, 1), (0.3, 4), (0.3, 16)])
def test_only_what_no_reader_opens_is_removed(name: str, freeze: float, round_to: int) -> None:
    attached = gated(name)
    method = gating(attached)
    method.config = method.config.model_copy(update={"freeze": freeze, "round_to": round_to})
    generator = torch.Generator().manual_seed(3)
    for gate in gates_of(attached).values():
        rates = torch.rand(gate.channels, generator=generator)
        gate.open_rate.copy_(
            torch.where(rates < 0.8, 0.0, rates)
            if name != "bmshj2018-hyperprior"
            else torch.where(rates < 0.5, rates * freeze, rates)
        )
    keep = attached.keep()
    removed = 0
    for group in attached.groups:
        readers = [m for m in group.members if m.axis == "in"]
        gated_alone = bool(readers) and all(m.module in gates_of(attached) for m in readers)
        if group.pinned or group.latent or not gated_alone:
            assert group.name not in keep
            continue
        rate = [
            max(
                float(gates_of(attached)[m.module].open_rate[i])
                for m in readers
                for i in m.index[c]
            )
            for c in range(group.width)
        ]
        kept = keep.get(group.name, list(range(group.width)))
        gone = sorted(set(range(group.width)) - set(kept))
        assert kept == sorted(set(kept)) and kept and all(rate[c] <= freeze for c in gone)
        opens = sum(r > freeze for r in rate)
        multiple = min(round_to, group.width)
        assert len(kept) == min(group.width, -(-max(opens, 1) // multiple) * multiple)
        assert not gone or max(rate[c] for c in gone) <= min(rate[c] for c in kept)
        removed += len(gone)
    assert removed >= (1 if round_to == 16 else 10) or (
        round_to == 16 and name == "bmshj2018-hyperprior"
    )


def test_channels_that_others_read_without_a_gate_stay() -> None:
    attached = attach(built("mbt2018")[0], "channel_gating", **QUICK, transforms=["g_a", "h_s"])
    assert {transform_of(layer) for layer in gates_of(attached)} == {"g_a", "h_s"}
    for gate in gates_of(attached).values():
        gate.open_rate.zero_()
    # h_s's last output goes into the entropy parameters, h_a's and g_s's have no gate behind them.
    assert {transform_of(name) for name in attached.keep()} == {"g_a", "h_s"}
    assert set(attached.keep()) == {"g_a.0", "g_a.2", "g_a.4", "h_s.0", "h_s.2"}


def constant(codec: Any, layer: str, channels: list[int]) -> None:
    """Let some output channels of a convolution be constants."""
    module = codec.get_submodule(layer)
    with torch.no_grad():
        module.weight.index_fill_(
            1 if isinstance(module, nn.ConvTranspose2d) else 0, torch.tensor(channels), 0.0
        )
        module.bias[channels] = torch.linspace(1.5, 4.0, len(channels))


def with_gdn1() -> nn.Module:
    codec: Any = FactorizedPrior(16, 24)
    for transform, inverse in (("g_a", False), ("g_s", True)):
        for number in (1, 3, 5):
            codec.get_submodule(transform)[number] = GDN1(16, inverse=inverse)
    return make_telling(codec)


@pytest.mark.parametrize(
    "make", [lambda: built("bmshj2018-factorized")[0], with_gdn1], ids=["GDN", "GDN1"]
)
def test_what_removed_channels_added_to_a_pool_is_made_up_for(
    make: Callable[[], nn.Module],
) -> None:
    """Where it was the same for all images, exactly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec: Any = make()
    gone = {"g_a.0": [1, 5, 6, 11], "g_a.2": [0, 15], "g_s.0": [3, 4], "g_s.4": [2, 7, 8]}
    readers = {"g_a.0": "g_a.2", "g_a.2": "g_a.4", "g_s.0": "g_s.2", "g_s.4": "g_s.6"}
    for layer, channels in gone.items():
        constant(codec, layer, channels)
    attached = attach(codec, "channel_gating", **QUICK, freeze=0.0)
    see(attached)
    while not attached.done:
        attached.after_step()
    for name, gate in gates_of(attached).items():
        gate.threshold.data.fill_(-10)
        for layer, reader in readers.items():
            if reader == name:
                gate.threshold.data[gone[layer]] = 1e6
    pictures = [picture(codec, seed) for seed in range(100, 103)]
    attached.eval().calibrate(pictures)
    assert attached.keep() == {
        layer: [c for c in range(16) if c not in channels] for layer, channels in gone.items()
    }
    small, plain = attached.harden(), attached.plain()
    assert small.codec.g_a[0].out_channels == 12
    with torch.no_grad():
        for x in [*pictures, picture(codec, 7)]:
            # The running mean of what is pooled is in float32.
            wide = attached(x)["x_hat"]
            assert (
                relative(wide, small(x)["x_hat"]) <= 1e-4
                and relative(wide, plain(x)["x_hat"]) <= 1e-4
            )
        # It is not by chance: without their share, the result would be another.
        for number in (1, 3):
            plain.g_a[number].beta.copy_(codec.g_a[number].beta)
        assert relative(wide, plain(x)["x_hat"]) > 1e-2


@pytest.mark.parametrize(("relative_to", "kernel"), [("channel", 0), ("channel", 5), ("layer", 0)])
def test_without_a_pool_removing_what_never_opens_is_exact(relative_to: str, kernel: int) -> None:
    attached = attach(
        built(NO_GDN)[0], "channel_gating", **QUICK, freeze=0.0, relative=relative_to, kernel=kernel
    )
    close_some(attached)
    pictures = [picture(attached.codec, seed) for seed in range(6)]
    attached.calibrate(pictures)
    small = attached.harden().double()
    gone = {n: attached.groups[n].width - len(kept) for n, kept in attached.keep().items()}
    assert sum(gone.values()) >= 8
    before, after = gates_of(attached), gates_of(small)
    assert all(
        after[n].channels + gone.get(f"g_a.{int(n[-1]) - 2}", 0) == before[n].channels
        for n in ("g_a.2", "g_a.4")
    )
    wide = copy.deepcopy(attached).double()
    with torch.no_grad():
        for x in pictures:
            assert relative(wide(x.double())["x_hat"], small(x.double())["x_hat"]) <= 1e-10
            wide_open, small_open = opened(wide), opened(small)
            assert {n: len(c) for n, c in wide_open.items()} == {
                n: len(c) for n, c in small_open.items()
            }
    for name, gate in gates_of(small).items():
        kept = attached.keep().get(
            {
                "g_a.2": "g_a.0",
                "g_a.4": "g_a.2",
                "g_a.6": "g_a.4",
                "g_s.2": "g_s.0",
                "g_s.4": "g_s.2",
                "g_s.6": "g_s.4",
            }.get(name, "")
        )
        own = gates_of(attached)[name].threshold
        assert torch.equal(gate.threshold.float(), own if kept is None else own[kept])


def test_removing_is_exact_behind_a_gate_that_is_closed_throughout() -> None:
    """One channel is open all the same, the best of those closed: it is not removed."""
    attached = gated(NO_GDN)
    method = gating(attached)
    method.config = method.config.model_copy(update={"freeze": 0.0})
    for name in ("g_a.4", "g_s.2", "g_s.6"):
        gates_of(attached)[name].threshold.data.fill_(1e6)
    pictures = [picture(attached.codec, seed) for seed in range(6)]
    attached.calibrate(pictures)
    small = attached.harden()
    with torch.no_grad():
        for x in pictures:
            assert relative(attached(x)["x_hat"], small(x)["x_hat"]) <= 1e-5


def test_gates_in_the_hyper_transforms_are_removed_exactly_beside_gdn() -> None:
    """h_a and h_s have none."""
    attached = attach(
        built("cheng2020-attn")[0],
        "channel_gating",
        **QUICK,
        freeze=0.0,
        kernel=0,
        transforms=["h_a", "h_s"],
    )
    close_some(attached)
    pictures = [picture(attached.codec, seed) for seed in range(6)]
    attached.calibrate(pictures)
    small = attached.harden()
    assert sum(attached.groups[n].width - len(kept) for n, kept in attached.keep().items()) >= 8
    assert {transform_of(n) for n in attached.keep()} == {"h_a", "h_s"}
    with torch.no_grad():
        for x in pictures:
            wide, narrow = attached(x), small(x)
            assert relative(wide["x_hat"], narrow["x_hat"]) <= 1e-5
            assert all(
                relative(v, narrow["likelihoods"][k]) <= 1e-4
                for k, v in wide["likelihoods"].items()
            )


def test_a_hardened_codec_is_hardened_again() -> None:
    attached = gated("bmshj2018-hyperprior")
    method = gating(attached)
    method.config = method.config.model_copy(update={"freeze": 0.0})
    attached.calibrate([picture(attached.codec, seed) for seed in range(6)])
    small = attached.harden()
    # Fewer images: more channels never open.
    small.calibrate([picture(attached.codec, 0)])
    smaller = small.harden()
    assert smaller.cost.totals().macs < small.cost.totals().macs < attached.cost.totals().macs
    assert smaller.cost.original == attached.cost.original
    smaller.eval().update(force=True)
    with torch.no_grad():
        sent = smaller.compress(picture(attached.codec, 0))
        assert torch.equal(
            *(smaller.decompress(sent["strings"], sent["shape"])["x_hat"] for _ in range(2))
        )


# -- beside other methods -------------------------------------------------------------------------

GATES: tuple[str, dict[str, Any]] = ("channel_gating", {**QUICK, "freeze": 0.0})
MASKS: tuple[str, dict[str, Any]] = (
    "mask_decay",
    {"budget": {"macs": 0.6}, "round_to": 1, "decay_steps": 2},
)


def rate_of(name: str) -> tuple[str, dict[str, Any]]:
    return name, {"qualities": [1, 2, 3]}


STACKS = {
    "masks, gates": [MASKS, GATES],
    "gates, masks": [GATES, MASKS],
    "gates, BM": [GATES, rate_of("bit_rate_modulator")],
    "BM, gates": [rate_of("bit_rate_modulator"), GATES],
    "gates, MAE": [GATES, rate_of("modulated_autoencoder")],
    "MAE, gates": [rate_of("modulated_autoencoder"), GATES],
    "gates, cAE": [GATES, rate_of("conditional_autoencoder")],
    "masks, gates, steps": [MASKS, GATES, rate_of("quantisation_steps")],
}


DAILY = ("masks, gates", "BM, gates", "gates, MAE", "gates, cAE", "masks, gates, steps")
"""Every method beside gates, in one order."""


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in DAILY else pytest.mark.slow) for name in STACKS]
)
def stack(request: pytest.FixtureRequest) -> Attached:
    """Several methods on one codec, trained for as long as they need, with gates closed in part."""
    attached = attach(built("mbt2018-mean")[0], copy.deepcopy(STACKS[request.param]))
    train(attached, 2)
    assert attached.done
    return close_some(attached)


def rates_of(attached: Attached) -> list[dict[str, float]]:
    return [{}] if attached.levels is None else [{"level": 0.0}, {"level": 0.6}, {"level": 2.0}]


def test_methods_beside_gates_see_what_they_would_without(stack: Attached) -> None:
    """Computing with the open channels alone is the same as multiplying by zero, with masks and
    rates around it.
    """
    double = copy.deepcopy(stack).double()
    with torch.no_grad():
        for rate in rates_of(double):
            for seed in (1, 4):
                x = picture(double.codec, seed)
                set_skipping(double.codec, False)
                masked = double(x, **rate)["x_hat"]
                which = opened(double)
                assert sum(map(len, which.values())) < sum(
                    g.channels for g in gates_of(double).values()
                )
                set_skipping(double.codec, True)
                for _ in range(2):  # nothing is left behind by the first
                    assert relative(masked, double(x, **rate)["x_hat"]) <= 1e-10
                    assert not shadows(double.codec) and opened(double) == which


def test_methods_beside_gates_are_hardened_together(stack: Attached) -> None:
    pictures = [picture(stack.codec, seed) for seed in range(3)]
    stack.calibrate(pictures)
    small = stack.harden()
    staying = [m.name for m in stack.methods if m.stays]
    assert (
        isinstance(small, Attached)
        and [m.name for m in small.methods] == staying
        and "channel_gating" in staying
    )
    assert small.cost.totals().macs < stack.cost.totals().macs
    small.update(force=True)
    with torch.no_grad():
        for rate in rates_of(small):
            sent = small.compress(pictures[0], **rate)
            first, second = (
                small.decompress(sent["strings"], sent["shape"])["x_hat"] for _ in range(2)
            )
            assert torch.equal(first, second) and bool(torch.isfinite(first).all())
        # So are they while they are still apart.
        stack.update(force=True)
        sent = stack.compress(pictures[0])
        assert torch.equal(
            *(stack.decompress(sent["strings"], sent["shape"])["x_hat"] for _ in range(2))
        )
        assert not shadows(stack.codec)


@pytest.mark.parametrize(
    "modulator",
    [
        "bit_rate_modulator",
        "modulated_autoencoder",
        "conditional_autoencoder",
        "quantisation_steps",
    ],
)
def test_gates_see_the_same_energies_when_a_rate_is_folded_in(modulator: str) -> None:
    attached = close_some(
        attach(
            built("bmshj2018-hyperprior")[0],
            [rate_of(modulator), ("channel_gating", {**QUICK, "round_to": 64})],
        )
    )
    assert attached.keep() == {}
    x = picture(attached.codec, 1)
    with torch.no_grad():
        for level in (0, 0.6, 2):
            small = attached.harden(level=level)
            assert [m.name for m in small.methods] == ["channel_gating"] and small.levels is None
            wide = attached(x, level=level)["x_hat"]
            which = opened(attached)
            found = small(x)["x_hat"]
            assert opened(small) == which, f"level {level}"
            assert relative(wide, found) <= 1e-4


def test_hooks_of_each_go_with_it() -> None:
    codec, _ = built("mbt2018-mean")
    attached = attach(codec, [GATES, rate_of("modulated_autoencoder"), MASKS])
    total = hook_count(codec)
    counts = []
    for method in attached.methods:
        method.detach(codec)
        counts.append(hook_count(codec))
    assert total > counts[0] > counts[1] > counts[2] == 0


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({}, RecipeError, "give either budget: {macs: 0.5} or alpha: 1.0"),
        ({"alpha": 1.0, "budget": {"macs": 0.5}}, RecipeError, "give either budget"),
        ({"alpha": 1.0, "kernel": 4}, RecipeError, "kernel must be odd"),
        ({"alpha": 1.0, "kernel": 17}, RecipeError, "kernel"),
        ({"alpha": 0.0}, RecipeError, "alpha"),
        ({"alpha": -1.0}, RecipeError, "alpha"),
        ({"alpha": 1.0, "gamma": 0.0}, RecipeError, "gamma"),
        ({"budget": {"macs": 0.5}, "gamma": 0.1}, RecipeError, "gamma adapts to a budget"),
        ({"alpha": 1.0, "transforms": []}, RecipeError, "transforms"),
        ({"alpha": 1.0, "transforms": ["g_x"]}, RecipeError, "g_x"),
        ({"alpha": 1.0, "transforms": ["context_prediction"]}, RecipeError, "context_prediction"),
        ({"alpha": 1.0, "energy": "min"}, RecipeError, "energy"),
        ({"alpha": 1.0, "freeze": 1.0}, RecipeError, "freeze"),
        ({"alpha": 1.0, "gating_steps": 0}, RecipeError, "gating_steps"),
        ({"budget": {}}, RecipeError, "a budget names"),
        (
            {"budget": {"macs": 0.05}},
            BudgetError,
            "budget macs: 0.05 cannot be met by gating alone",
        ),
        (
            {"budget": {"macs": 0.9, "decoder": 0.01}},
            BudgetError,
            "budget decoder: 0.01 cannot be met",
        ),
        ({"budget": {"params": 0.5}}, NicpruneError, "params"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: dict[str, Any], kind: type[NicpruneError], said: str
) -> None:
    codec, _ = built("bmshj2018-hyperprior")
    state = state_of(codec)
    with pytest.raises(kind) as error:
        attach(codec, "channel_gating", **settings)
    one_line(error, said)
    assert hook_count(codec) == 0 and same_state(state, codec.state_dict())


def test_a_budget_that_is_just_met_by_one_open_channel_each_is_taken() -> None:
    with pytest.raises(BudgetError) as error:
        attach(built("bmshj2018-hyperprior")[0], "channel_gating", budget={"macs": 0.1})
    least = float(str(error.value).partition(" of the original")[0].split()[-1])
    with pytest.raises(BudgetError):
        attach(built("bmshj2018-hyperprior")[0], "channel_gating", budget={"macs": least - 0.001})
    attach(built("bmshj2018-hyperprior")[0], "channel_gating", budget={"macs": least + 0.001})


@pytest.mark.parametrize("transforms", [["h_a"], ["h_a", "h_s"], ["g_a", "h_a"], ["h_s", "g_s"]])
def test_a_transform_that_the_codec_does_not_have_is_refused(transforms: list[str]) -> None:
    codec, _ = built("bmshj2018-factorized")
    with pytest.raises(NicpruneError) as error:
        attach(codec, "channel_gating", **QUICK, transforms=transforms)
    one_line(error, transforms[0] if transforms[0].startswith("h") else transforms[1])
    assert hook_count(codec) == 0


def test_a_codec_without_hyper_transforms_is_gated_where_it_can_be() -> None:
    assert {transform_of(n) for n in gates_of(gated("bmshj2018-factorized"))} == {"g_a", "g_s"}


def test_a_codec_with_nothing_to_gate_is_refused() -> None:
    codec: Any = FactorizedPrior(8, 6)
    codec.g_a = nn.Sequential(nn.Conv2d(3, 6, 5, 16, 2))
    codec.g_s = nn.Sequential(
        nn.ConvTranspose2d(6, 6, 4, 4, groups=6), nn.ConvTranspose2d(6, 3, 4, 4, groups=3)
    )
    with pytest.raises(CodecError) as error:
        attach(codec.eval(), "channel_gating", **QUICK)
    one_line(error)
    assert hook_count(codec) == 0


def test_calibrating_without_images_is_refused() -> None:
    with pytest.raises(NicpruneError) as error:
        gated("bmshj2018-hyperprior").calibrate([])
    one_line(error, "image")


def test_an_optimiser_that_is_given_thresholds_does_not_move_them() -> None:
    found = []
    for given in (False, True):
        torch.manual_seed(0)
        attached = attach(
            built("bmshj2018-hyperprior")[0],
            "channel_gating",
            budget={"macs": 0.5},
            gating_steps=20,
        ).train()
        gates = list(gates_of(attached).values())
        own = {id(p) for p in attached.manually_updated()}
        optimizer = torch.optim.Adam(
            [p for p in attached.parameters() if given or id(p) not in own], lr=1e-2
        )
        for number in range(4):
            x = picture(attached.codec, number)
            torch.manual_seed(number)
            optimizer.zero_grad()
            (attached(x)["x_hat"] - x).square().mean().backward()
            optimizer.step()
            attached.after_step()
        found.append(torch.cat([gate.threshold.detach() for gate in gates]))
        assert float(found[-1].std()) > 0
        gates[0].load_state_dict(
            gates[0].state_dict() | {"threshold": torch.full((gates[0].channels,), 0.25)}
        )
        assert torch.equal(gates[0].current(), torch.full((gates[0].channels,), 0.25))
    assert torch.equal(*found)
