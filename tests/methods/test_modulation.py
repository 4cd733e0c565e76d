"""Modulators: one codec, many rates."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.losses import RateDistortionLoss
from compressai.models import CompressionModel
from helpers import built, hook_count, image, same_state, state_of
from torch import Tensor, nn

from nicprune.codecs.provenance import provenance
from nicprune.codecs.zoo import LAMBDAS
from nicprune.common.errors import CodecError, FileError, NicpruneError, RecipeError
from nicprune.data.images import read_image, sample_photographs
from nicprune.methods import METHODS, Attached, attach
from nicprune.methods.levels import Levels
from nicprune.methods.variable_rate.modulation import Modulation
from nicprune.storage.named import load_codec

MODULATORS = sorted(name for name in METHODS if METHODS[name].rates_field)

LAMBDAS_3 = LAMBDAS["mse"][:3]

EVERYWHERE = ["conditional_autoencoder", "modulated_autoencoder"]
"""Modulators that scale at every convolution, not latents alone."""

ENDING_IN_BLOCKS = ["cheng2020-attn", "elic2022-chandelier"]
"""Codecs in which the last convolution of g_a is not the last thing it does."""


@pytest.fixture(params=MODULATORS)
def modulator(request: pytest.FixtureRequest) -> str:
    return request.param


def modulated(modulator: str, name: str, *, double: bool = False, learnt: bool = False) -> Attached:
    """A codec with a modulator for three rates; `learnt`: with parameters that are anywhere but at
    the start.
    """
    codec = built(name)[0]
    attached = attach(codec.double() if double else codec, modulator, qualities=[1, 2, 3])
    if double:
        attached.double()
    if learnt:
        move(attached)
    return attached.eval()


def move(attached: Attached, size: float = 0.2) -> None:
    """Let the modulator's parameters be what training may make of them."""
    generator = torch.Generator().manual_seed(5)
    method = modulation(attached)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(
                (size * (torch.rand(parameter.shape, generator=generator) - 0.5)).to(parameter)
            )


def modulation(attached: Attached) -> Modulation:
    return next(m for m in attached.methods if isinstance(m, Modulation))


def levels_of(attached: Attached) -> Levels:
    assert attached.levels is not None
    return attached.levels


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / first.abs().max())


def one_line(error: pytest.ExceptionInfo[NicpruneError], *parts: str) -> None:
    told = str(error.value)
    assert "\n" not in told and all(part in told for part in parts), told


def test_these_are_all() -> None:
    assert MODULATORS == [
        "bit_rate_modulator",
        "bottleneck_scaling",
        "conditional_autoencoder",
        "modulated_autoencoder",
        "quantisation_steps",
    ]


# -- where they start -----------------------------------------------------------------------------


def test_at_the_highest_rate_the_codec_is_what_it_was(modulator: str) -> None:
    codec, _ = built("mbt2018-mean")
    x = torch.cat([image(codec, seed) for seed in (2, 3)])
    with torch.no_grad():
        before = codec(x)
        attached = attach(codec, modulator, qualities=[1, 2, 3])
        assert levels_of(attached).lambdas == LAMBDAS_3
        attached(x, level=0)
        for rate in ({}, {"level": 2}, {"lmbda": LAMBDAS_3[-1]}):
            after = attached(x, **rate)
            assert torch.equal(after["x_hat"], before["x_hat"])
            assert all(
                torch.equal(after["likelihoods"][k], v) for k, v in before["likelihoods"].items()
            )
        assert not torch.equal(attached(x, level=1.9)["x_hat"], before["x_hat"])


@pytest.mark.parametrize(
    ("modulator", "name"),
    [
        *(
            (m, c)
            for m in MODULATORS
            for c in ("bmshj2018-hyperprior", "bmshj2018-factorized-relu")
        ),
        *((m, c) for m in EVERYWHERE for c in ENDING_IN_BLOCKS),
    ],
)
def test_lower_rates_start_with_the_step_that_suits_their_lambda(modulator: str, name: str) -> None:
    """Latents are scaled by the root of lambda over the highest, and the synthesis sees them scaled
    back, whatever g_a ends with.
    """
    attached = modulated(modulator, name, double=True)
    codec: Any = attached.codec
    x = image(codec, 2)
    with torch.no_grad():
        levels_of(attached).assign(levels_of(attached).top)
        y = codec.g_a(x)
        back = codec.g_s(y)
        for level in (0, 0.4, 1, 1.7):
            levels_of(attached).assign(level)
            factor = math.sqrt(
                float(levels_of(attached).lmbda(torch.tensor(float(level)))) / LAMBDAS_3[-1]
            )
            off = relative(y * factor, codec.g_a(x)), relative(back, codec.g_s(y * factor))
            assert factor < 1 and max(off) <= 1e-5, f"g_a, g_s at level {level} are off by {off}"


def photograph(size: int = 128) -> Tensor:
    picture = read_image(sample_photographs("test")[0])
    return (picture[:, :size, 100 : 100 + size].float() / 255).unsqueeze(0)


def test_an_untrained_modulator_has_a_rate_for_every_level(modulator: str) -> None:
    attached = attach(load_codec("demo-hyperprior", 3), modulator, qualities=[1, 2, 3]).eval()
    x, rates, errors = photograph(), [], []
    with torch.no_grad():
        for level in torch.linspace(0, 2, 9).tolist():
            out = attached(x, level=level)
            rates.append(
                float(sum(-torch.log2(v).sum() for v in out["likelihoods"].values()))
                / x[0, 0].numel()
            )
            errors.append(float((out["x_hat"] - x).square().mean()))
    assert all(low < high for low, high in zip(rates, rates[1:], strict=False)), rates
    assert all(low > high for low, high in zip(errors, errors[1:], strict=False)), errors
    assert rates[0] < 0.8 * rates[-1] and errors[0] > 1.3 * errors[-1]
    # Quality 1 is a codec of its own; this one, untrained, need not be as good there, but it codes
    # about as much.
    with torch.no_grad():
        own = (
            sum(
                -torch.log2(v).sum()
                for v in load_codec("demo-hyperprior", 1)(x)["likelihoods"].values()
            )
            / x[0, 0].numel()
        )
    assert 0.6 * float(own) < rates[0] < 1.8 * float(own)


# -- what they do ---------------------------------------------------------------------------------


def test_each_image_has_its_own_rate(modulator: str) -> None:
    attached = modulated(modulator, "mbt2018", double=True, learnt=True)
    codec: Any = attached.codec
    x = torch.cat([image(codec, seed) for seed in range(4)])
    places = [0.0, 0.7, 1.3, 2.0]
    with torch.no_grad():
        levels_of(attached).now = torch.tensor(places)
        together = codec(x)
        for number, level in enumerate(places):
            alone = attached(x[number : number + 1], level=level)
            assert relative(alone["x_hat"], together["x_hat"][number : number + 1]) <= 1e-10
            for key, value in alone["likelihoods"].items():
                assert relative(value, together["likelihoods"][key][number : number + 1]) <= 1e-10


def test_training_draws_a_rate_for_each_image(modulator: str) -> None:
    attached = modulated(modulator, "bmshj2018-hyperprior").train()
    x = torch.cat([image(attached.codec, seed) for seed in range(4)])
    torch.manual_seed(0)
    attached(x)
    first = levels_of(attached).now
    assert first.shape == (4,) and len(set(first.tolist())) == 4
    attached(x)
    assert not torch.equal(levels_of(attached).now, first)
    attached(x, level=1)
    assert levels_of(attached).now.tolist() == [1.0]


def test_all_that_can_learn_does(modulator: str) -> None:
    attached = modulated(modulator, "bmshj2018-hyperprior").train()
    start, frozen = state_of(modulation(attached)), state_of(attached.codec)
    parameters = [p for n, p in attached.named_parameters() if not n.endswith("quantiles")]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    losses = []
    for number in range(4):
        torch.manual_seed(number)
        x = torch.cat([image(attached.codec, seed) for seed in range(4)])
        optimizer.zero_grad()
        objective = attached.objective(attached(x), x)
        assert objective is not None
        losses.append(float(objective["loss"].detach()))
        objective["loss"].backward()
        optimizer.step()
        attached.after_step()
    assert all(math.isfinite(loss) for loss in losses)
    moved = [
        name
        for name, value in state_of(modulation(attached)).items()
        if not torch.equal(value, start[name])
    ]
    assert sorted(moved) == sorted(name for name, _ in modulation(attached).named_parameters())
    codec_moved = not same_state(frozen, state_of(attached.codec))
    assert codec_moved == (modulator != "bottleneck_scaling")
    assert attached.done and attached.steps_left == 0


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018"])
def test_folding_a_rate_is_the_hooks(modulator: str, name: str) -> None:
    attached = modulated(modulator, name, double=True, learnt=True)
    state, x = state_of(attached), image(attached.codec, 2)
    with torch.no_grad():
        found = []
        for rate in ({"level": 0}, {"level": 0.6}, {"lmbda": 0.005}, {"level": 2}, {}):
            plain: Any = attached.plain(**rate)
            assert type(plain) is type(attached.codec) and hook_count(plain) == 0
            mine, folded = attached(x, **rate), plain(x)
            assert relative(mine["x_hat"], folded["x_hat"]) <= 1e-10
            for key, value in mine["likelihoods"].items():
                assert relative(value, folded["likelihoods"][key]) <= 1e-9
            found.append(mine["x_hat"])
    assert relative(found[0], found[3]) > 1e-2 and relative(found[1], found[3]) > 1e-2
    assert same_state(state, attached.state_dict())


def test_a_rate_that_no_convolution_can_take_is_refused() -> None:
    attached = modulated("bit_rate_modulator", "cheng2020-anchor")
    state, hooks = state_of(attached), hook_count(attached.codec)
    for call in (attached.plain, attached.harden):
        with pytest.raises(CodecError) as error:
            call(level=1)
        one_line(error, "ResidualBlock", "g_s", "save the codec with its modulator on")
    assert same_state(state, attached.state_dict()) and hook_count(attached.codec) == hooks


# -- bitstreams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018-mean"])
def test_a_bitstream_says_its_rate(modulator: str, name: str) -> None:
    attached = modulated(modulator, name, learnt=True)
    attached.update(force=True)
    receiver = copy.deepcopy(attached)
    x, sizes = image(attached.codec, 2, 128), []
    with torch.no_grad():
        for level in (0, 0.6, 1, 1.5, 2):
            sent = attached.compress(x, level=level)
            assert len(sent["strings"][0][0]) == 2
            receiver(x, level=2 if level < 1 else 0)
            received = receiver.decompress(sent["strings"], sent["shape"])["x_hat"]
            assert (
                float(levels_of(receiver).now)
                == float(levels_of(attached).now)
                == pytest.approx(level, abs=1e-4)
            )
            # What was sent is what the forward pass shows, at the very level that the header can
            # say.
            shown = attached(x, level=float(levels_of(receiver).now))["x_hat"].clamp(0, 1)
            assert float((received - shown).abs().mean()) < 1e-4
            sizes.append(sum(len(s) for strings in sent["strings"] for s in strings))
        assert sizes[0] < sizes[2] < sizes[4]
        assert attached.compress(x)["strings"] == attached.compress(x, level=2)["strings"]
        by_lambda = attached.compress(x, lmbda=LAMBDAS_3[1])["strings"]
        assert by_lambda == attached.compress(x, level=1)["strings"]


@pytest.mark.parametrize(
    ("modulator", "name"),
    [("modulated_autoencoder", "elic2022-chandelier"), ("conditional_autoencoder", "mbt2018")],
)
def test_context_models_code_at_any_rate(modulator: str, name: str) -> None:
    attached = modulated(modulator, name, learnt=True)
    attached.update(force=True)
    receiver, x = copy.deepcopy(attached), image(attached.codec, 2)
    with torch.no_grad():
        sent = attached.compress(x, level=0.4)
        first, second = (
            receiver.decompress(sent["strings"], sent["shape"])["x_hat"] for _ in range(2)
        )
    assert torch.equal(first, second) and bool(torch.isfinite(first).all())
    assert levels_of(receiver).now.tolist() == levels_of(attached).now.tolist()


def test_a_bitstream_without_a_rate_is_refused() -> None:
    attached = modulated("bit_rate_modulator", "bmshj2018-hyperprior")
    attached.update(force=True)
    with torch.no_grad():
        sent = attached.compress(image(attached.codec, 2))
        body = sent["strings"][1:]
        for strings in (
            body,
            [],
            [[]],
            [[b"\x00"], *body],
            [[b"\x00\x00\x00"], *body],
            ["ab", *body],
            None,
        ):
            with pytest.raises(FileError) as error:
                attached.decompress(strings, sent["shape"])
            one_line(error, "does not start with a rate")
        assert attached.decompress(sent["strings"], sent["shape"])["x_hat"].shape == (1, 3, 64, 64)


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_with_one_rate_for_all_the_loss_is_compressais(metric: str) -> None:
    codec, _ = built("mbt2018-mean")
    provenance(codec).metric = metric
    attached = attach(codec, "quantisation_steps", qualities=[1, 2, 3])
    assert levels_of(attached).lambdas == LAMBDAS[metric][:3]
    size = 64 if metric == "mse" else 192
    x = torch.cat([image(codec, seed, size) for seed in range(3)])
    with torch.no_grad():
        for level in (0, 1.4, 2):
            out = attached(x, level=level)
            mine = attached.objective(out, x, metric)
            assert mine is not None
            lmbda = float(levels_of(attached).lmbda(torch.tensor(float(level))))
            theirs = RateDistortionLoss(lmbda=lmbda, metric=metric)(out, x)
            expected = {key: float(value) for key, value in theirs.items() if value is not None}
            assert {key: float(value) for key, value in mine.items()} == pytest.approx(
                expected, rel=1e-5
            )


def test_each_image_counts_by_its_own_lambda(modulator: str) -> None:
    attached = modulated(modulator, "bmshj2018-hyperprior").train()
    x = torch.cat([image(attached.codec, seed) for seed in range(3)])
    torch.manual_seed(3)
    out = attached(x)
    mine = attached.objective(out, x)
    assert mine is not None
    losses = []
    for number, lmbda in enumerate(levels_of(attached).lmbda(levels_of(attached).now).tolist()):
        error = (out["x_hat"][number] - x[number]).square().mean()
        bits = sum(-torch.log2(value[number]).sum() for value in out["likelihoods"].values())
        losses.append(lmbda * 255**2 * error + bits / (64 * 64))
    assert mine["loss"].requires_grad and float(mine["loss"].detach()) == pytest.approx(
        float(torch.stack(losses).mean().detach()), rel=1e-5
    )


# -- the codec beside them ------------------------------------------------------------------------


def test_bottleneck_scaling_freezes_the_codec(modulator: str) -> None:
    codec, _ = built("bmshj2018-hyperprior")
    before = state_of(codec)
    attached = attach(codec, modulator, qualities=[1, 3])
    own = {name: p.detach().clone() for name, p in attached.methods.named_parameters()}
    optimizer, aux = (
        torch.optim.Adam(one, 1e-3)
        for one in (attached.parameters(), [codec.entropy_bottleneck.quantiles])
    )
    attached.train()
    x = image(codec, 0)
    for _ in range(2):
        optimizer.zero_grad()
        found: Any = attached.objective(attached(x), x)
        found["loss"].backward()
        optimizer.step()
        aux.zero_grad()
        attached.aux_loss().backward()
        aux.step()
    moved = {name for name, p in codec.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set() if modulator == "bottleneck_scaling" else len(moved) > 20
    assert any(not torch.equal(p, own[name]) for name, p in attached.methods.named_parameters())
    # Nothing of it is left on a copy, on what is folded, and on what was attached to.
    plain = (attached.plain(level=0), copy.deepcopy(attached).detach(), attached.detach())
    for one in plain:
        one.train()(x)["x_hat"].sum().backward()
        assert one.g_a[0].weight.grad is not None


def decayed_with(modulator: str, first: str) -> Attached:
    """A learnt modulator beside masks that are decayed to the end, in every group, the latents'
    too.
    """
    pair = [
        ("mask_decay", {"widths": {"*": 9}, "decay_steps": 4, "latents": True}),
        (modulator, {"qualities": [1, 2, 3]}),
    ]
    attached = attach(built("mbt2018-mean")[0], pair if first == "masks" else pair[::-1])
    move(attached)
    # Which channels go is drawn: without, it would be the last ones everywhere.
    masks: Any = next(m for m in attached.methods if m.name == "mask_decay")
    masks.current.copy_(
        0.5 + torch.rand(masks.current.shape, generator=torch.Generator().manual_seed(9))
    )
    for _ in range(4):
        attached.after_step()
    return attached


@pytest.mark.parametrize("first", ["masks", "modulator"])
def test_a_modulator_loses_the_channels_that_its_codec_loses(modulator: str, first: str) -> None:
    attached = decayed_with(modulator, first)
    small, keep = attached.harden(), attached.keep()
    assert {len(keep[g.name]) for g in attached.groups.prunable(latents=True)} == {9}
    assert any(kept != list(range(9)) for kept in keep.values())
    assert isinstance(small, Attached) and [m.name for m in small.methods] == [modulator]
    x = image(attached.codec, 2).double()
    wide, narrow = copy.deepcopy(attached).double().eval(), copy.deepcopy(small).double().eval()
    with torch.no_grad():
        for level in (0, 0.4, 1, 2):
            # Weights times masks are rounded to float32.
            off = relative(wide(x, level=level)["x_hat"], narrow(x, level=level)["x_hat"])
            assert off <= 1e-5, f"level {level}"


def test_a_pruned_modulator_codes(modulator: str) -> None:
    attached = decayed_with(modulator, "masks")
    small = attached.harden()
    with torch.no_grad():
        small.eval().update(force=True)
        x = image(small.codec, 2)
        sent = small.compress(x, level=0.4)
        assert torch.equal(
            *(small.decompress(sent["strings"], sent["shape"])["x_hat"] for _ in range(2))
        )
        # Before it is hardened too, the masks folded into a copy for it.
        attached.eval()
        sent = attached.compress(x, level=0.4)
        attached(x, level=2)
        assert len(sent["strings"][0][0]) == 2
        received = attached.decompress(sent["strings"], sent["shape"])["x_hat"]
        shown = attached(x, level=0.4)["x_hat"].clamp(0, 1)
    assert float((received - shown).abs().mean()) < 1e-3


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"level": 2.5}, "2.5"),
        ({"level": -1}, "-1"),
        ({"lmbda": 0.02}, "0.02"),
        ({"level": 1, "lmbda": 0.0035}, "level or lmbda, not both"),
    ],
)
def test_a_rate_that_was_not_trained_for_is_refused(wish: dict[str, float], said: str) -> None:
    attached = modulated("bit_rate_modulator", "bmshj2018-hyperprior")
    attached.update(force=True)
    x = image(attached.codec, 2)
    for call in (
        lambda: attached(x, **wish),
        lambda: attached.compress(x, **wish),
        lambda: attached.plain(**wish),
        lambda: attached.harden(**wish),
    ):
        with pytest.raises(RecipeError) as error:
            call()
        one_line(error, said)


def test_a_rate_needs_a_modulator() -> None:
    attached = attach(built("bmshj2018-hyperprior")[0], "none").eval()
    x = image(attached.codec, 2)
    for wish in ({"level": 0}, {"lmbda": 0.0035}):
        for call in (attached, attached.compress):
            with pytest.raises(RecipeError) as error:
                call(x, **wish)
            one_line(error, "need a modulator", *MODULATORS)
        for call in (attached.plain, attached.harden):
            with pytest.raises(RecipeError) as error:
                call(**wish)
            one_line(error, "need a modulator", *MODULATORS)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({}, "give either lambdas"),
        ({"lambdas": [0.001, 0.01], "qualities": [1, 3]}, "give either lambdas"),
        ({"lambdas": [0.01]}, "two or more"),
        ({"lambdas": []}, "two or more"),
        ({"lambdas": [0.01, 0.001]}, "increasing"),
        ({"lambdas": [0.01, 0.01]}, "increasing"),
        ({"lambdas": [0.0, 0.01]}, "positive"),
        ({"lambdas": [-0.1, 0.01]}, "positive"),
        ({"lambdas": [0.01, float("inf")]}, "lambdas"),
        ({"qualities": [3]}, "two or more"),
        ({"qualities": [3, 1]}, "increasing"),
        ({"qualities": [0, 1]}, "1 to 8"),
        ({"qualities": [1, 9]}, "1 to 8"),
        ({"qualities": [1, 2], "hidden": 0}, "hidden"),
    ],
)
def test_rates_that_are_none_are_refused(rates: dict[str, Any], said: str) -> None:
    codec, _ = built("bmshj2018-hyperprior")
    state = state_of(codec)
    with pytest.raises(RecipeError) as error:
        attach(codec, "bit_rate_modulator", **rates)
    one_line(error, said)
    assert hook_count(codec) == 0 and same_state(state, codec.state_dict())


def test_a_level_is_a_number() -> None:
    attached = attach(built("bmshj2018-hyperprior")[0], "bottleneck_scaling", qualities=[1, 3])
    with pytest.raises(RecipeError) as error:
        attached.compress(image(attached.codec), level="best")
    one_line(error, "is a number, 0 to 1", "scalable encoders")


def test_a_codec_has_one_modulator() -> None:
    codec, _ = built("bmshj2018-hyperprior")
    with pytest.raises(RecipeError) as error:
        attach(
            codec,
            [
                ("quantisation_steps", {"qualities": [1, 2]}),
                ("bottleneck_scaling", {"qualities": [1, 2]}),
            ],
        )
    one_line(error, "one modulator", "quantisation_steps", "bottleneck_scaling")
    attach(codec, "quantisation_steps", qualities=[1, 2])
    hooks = hook_count(codec)
    with pytest.raises(RecipeError) as error:
        attach(codec, "bottleneck_scaling", qualities=[1, 2])
    one_line(error, "attached already")
    assert hook_count(codec) == hooks and all(p.requires_grad for p in codec.parameters())


class Foreign(CompressionModel):
    """A codec whose transforms have other names, or no convolution."""

    def __init__(self, names: tuple[str, str], *, empty: bool = False):
        super().__init__()
        self.names = names
        analysis = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, 6, 5, 4, 2))
        synthesis = nn.Sequential(
            nn.ConvTranspose2d(6, 8, 4, 4), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 4)
        )
        self.add_module(names[0], analysis)
        self.add_module(names[1], synthesis)
        if empty:
            self.g_s = nn.Identity()
        self.entropy_bottleneck = EntropyBottleneck(6)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y_hat, likelihoods = self.entropy_bottleneck(self.get_submodule(self.names[0])(x))
        return {
            "x_hat": self.get_submodule(self.names[1])(y_hat),
            "likelihoods": {"y": likelihoods},
        }

    def compress(self, x: Tensor) -> dict[str, Any]:
        y = self.get_submodule(self.names[0])(x)
        return {"strings": [self.entropy_bottleneck.compress(y)], "shape": y.shape[-2:]}

    def decompress(self, strings: Any, shape: Any) -> dict[str, Any]:
        return {
            "x_hat": (
                self.get_submodule(self.names[1])(
                    self.entropy_bottleneck.decompress(strings[0], shape)
                ).clamp(0, 1)
            )
        }


@pytest.mark.parametrize("names", [("g_a", "g_s"), ("g_a", "body"), ("encoder", "decoder")])
def test_a_codec_of_its_own_making_is_modulated(modulator: str, names: tuple[str, str]) -> None:
    codec = Foreign(names, empty=names[1] == "body").eval()
    x = image(codec, 2)
    with torch.no_grad():
        before = codec(x)["x_hat"]
        attached = attach(codec, modulator, qualities=[1, 2, 3]).eval()
        assert torch.equal(attached(x)["x_hat"], before)
        move(attached)
        assert (
            relative(attached(x, level=0.5)["x_hat"], attached.plain(level=0.5)(x)["x_hat"]) <= 1e-5
        )
        attached.update(force=True)
        sent = attached.compress(x, level=0.5)
        assert torch.equal(
            *(attached.decompress(sent["strings"], sent["shape"])["x_hat"] for _ in range(2))
        )
