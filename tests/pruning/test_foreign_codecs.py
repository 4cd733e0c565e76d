"""Codecs of somebody else's: what is odd about them is said, or does no harm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from channelwise_codec import ChannelwiseCodec
from compressai.models import CompressionModel, FactorizedPrior, ScaleHyperprior
from compressai.ops.bound_ops import LowerBoundFunction
from helpers import built, image, make_telling, random_keep, same_state, state_of
from torch import Tensor, nn
from zoo_of_blocks import BlockCodec, Small, SmallWithNorm

from nicprune.channels.find_groups import find_groups
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.float64_coding import Coder
from nicprune.codecs.float64_types import float64_throughout
from nicprune.codecs.reinitialise import reinitialise
from nicprune.common.errors import CodecError
from nicprune.methods import attach
from nicprune.pruning import surgery
from nicprune.pruning.cost import CostModel, measure
from nicprune.pruning.masks import importance
from nicprune.pruning.surgery import analyse, has_foreign_code, prune
from nicprune.pruning.target import Target


class Run(nn.Module):
    """Layers by name, and what they do together."""

    def __init__(self, run: Any, **layers: nn.Module):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(i: int = 8, o: int = 8, k: int = 1, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **settings)


def codec_of(run: Any, **layers: nn.Module) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_telling(BlockCodec(Run(run, **layers)))


# -- names ----------------------------------------------------------------------------------------


def test_no_two_groups_have_one_name() -> None:
    """A convolution behind what is not understood has inputs that nobody makes, and outputs."""
    codec = codec_of(lambda s, x: s.b(torch.cumsum(x, 1)), b=conv())
    groups = analyse(codec)
    names = [g.name for g in groups]
    assert len(set(names)) == len(names)
    assert groups["g_a.1.b.in"].pinned and not groups["g_a.1.b"].pinned
    keep = {"g_a.1.b": [1, 4, 6]}
    assert CostModel(codec, groups).totals(keep) == measure(prune(codec, keep, groups))


def test_every_name_is_a_pattern_for_itself(architecture: str) -> None:
    groups = built(architecture)[1]
    for group in groups.prunable(latents=True):
        target = Target(widths={group.name: group.width}, latents=True)
        assert list(target.fixed_widths(groups)) == [group.name]
        only = Target(budget={"macs": 0.5}, latents=True, only=[group.name])  # type: ignore[arg-type]
        assert [g.name for g in only.open(groups)] == [group.name]


def test_patterns_may_hold_sets() -> None:
    groups = built("bmshj2018-hyperprior")[1]
    target = Target(budget={"macs": 0.5}, only=["g_[as].*"])  # type: ignore[arg-type]
    assert {g.name[:3] for g in target.open(groups)} == {"g_a", "g_s"}


# -- images ---------------------------------------------------------------------------------------


def checked(least: int) -> Any:
    def run(s: Any, x: Tensor) -> Tensor:
        assert x.shape[-1] * 4 >= least, f"images of {least} pixels and more"
        return s.b(F.relu(x))

    return run


@pytest.mark.parametrize("least", [65, 129])
def test_codecs_of_larger_images(least: int) -> None:
    codec, small = codec_of(checked(0), b=conv()), None
    codec.g_a[1].run = checked(least)
    groups = analyse(codec)
    keep = random_keep(groups, 1)
    small = prune(codec, keep, groups)
    cost = CostModel(codec, groups)
    assert cost.totals(keep) == measure(small)
    # A multiply-add per pixel is one at every size.
    codec.g_a[1].run = checked(0)
    plain = copy.deepcopy(codec)
    del plain.__dict__["_nicprune_image"]
    assert CostModel(plain, groups).totals(keep) == cost.totals(keep)
    assert cost.by_transform(keep) == CostModel(plain, groups).by_transform(keep)
    assert cost.soft(cost.widths(keep).astype(float)) == cost.totals(keep).macs


def test_a_codec_that_runs_on_nothing_is_told_where_it_fails() -> None:
    codec = codec_of(checked(0), b=conv())
    codec.g_a[1].run = checked(4096)
    with pytest.raises(CodecError, match=r"64, 128, 256, 512 .*g_a\.1 raised AssertionError"):
        analyse(codec)


@pytest.mark.parametrize("colours", [1, 4])
def test_images_of_other_colours(colours: int) -> None:
    codec = BlockCodec(nn.Sequential(nn.ReLU(), conv()), colours=colours).eval()
    groups = analyse(codec)
    keep = random_keep(groups, 0)
    assert CostModel(codec, groups).totals(keep) == measure(prune(codec, keep, groups))


# -- trials ---------------------------------------------------------------------------------------


def test_tensors_made_in_float32_do_no_harm() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.b(x) * s.c(torch.ones(1, 2, *x.shape[2:])).mean()

    groups = analyse(codec_of(run, b=conv(), c=conv(2, 4)))
    assert groups["g_a.1.b"].pinned is None


def weighed(weights: Tensor, x: Tensor) -> Tensor:
    """Each place's values by what the others' are, (B, C, H, W) -> the same."""
    return (x.flatten(2) @ weights.transpose(1, 2)).view_as(x)


TABLE, KERNEL = torch.eye(512).flip(0), torch.full((8, 8, 1, 1), 0.1)
"""Tensors that are no buffers: `double` does not reach them."""
IN_LESS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "float": lambda s, x: s.b(s.a(x).float()),
    "half and back": lambda s, x: s.b(s.a(x).half().float()),
    "to": lambda s, x: s.b(s.a(x).to(torch.float32)),
    "to, by name": lambda s, x: s.b(s.a(x).to(device="cpu", dtype=torch.bfloat16).to(x.dtype)),
    "to another's": lambda s, x: s.b(s.a(x).to(TABLE)),
    "type as": lambda s, x: s.b(s.a(x).type_as(other=TABLE)),
    "type": lambda s, x: s.b(s.a(x).type(torch.float32).type(torch.FloatTensor)),
    "type, by name": lambda s, x: s.b(s.a(x).type("torch.FloatTensor")),
    "sum": lambda s, x: s.b(s.a(x) * s.a(x).mean((2, 3), keepdim=True, dtype=torch.float32)),
    "softmax": lambda s, x: s.b(
        weighed(
            x.flatten(2).transpose(1, 2).matmul(x.flatten(2)).softmax(-1, torch.float32), s.a(x)
        )
    ),
    "made": lambda s, x: s.b(s.a(x)) @ torch.eye(x.shape[-1], dtype=torch.float32),
    "an attribute": lambda s, x: s.b(s.a(x)) @ TABLE[-x.shape[-1] :, : x.shape[-1]],
    "a kernel": lambda s, x: F.conv2d(s.b(s.a(x)), KERNEL),
    "autocast": lambda s, x: in_bfloat16(s.a, s.b, x),
}


def in_bfloat16(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = a(x)
    return b(y.float())


@pytest.mark.parametrize("name", sorted(IN_LESS))
def test_what_code_computes_in_float32_is_compared_in_float64(name: str) -> None:
    codec = codec_of(IN_LESS[name], a=conv(), b=conv())
    groups = analyse(codec)
    assert groups["g_a.1.a"].pinned is None
    small: Any = prune(codec, {"g_a.1.a": [0, 3, 5]}, groups)  # fails unless it is so to 1e-10
    assert small.g_a[1].b.in_channels == 3
    with torch.no_grad():
        assert torch.isfinite(small(torch.rand(1, 3, 64, 64))["x_hat"]).all()


class Spectral(nn.Module):
    """A product of spectra, between two convolutions."""

    def __init__(self, form: str):
        super().__init__()
        self.form, self.a, self.b = form, conv(), conv()
        kernel = torch.randn(8, 8, dtype=torch.complex64)
        if form == "a buffer":
            self.register_buffer("kernel", kernel)
        else:
            self.kernel = kernel if form == "an attribute" else nn.Parameter(kernel)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, norm="ortho")
        if self.form == "converted":
            spectrum = spectrum.cfloat().to(torch.complex64).to(KERNEL.cfloat())
        spectrum = torch.einsum("bixy,io->boxy", spectrum, self.kernel)
        return self.b(self.a(x)) + torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")


@pytest.mark.parametrize("form", ["a parameter", "a buffer", "an attribute", "converted"])
def test_complex_values_are_compared_in_complex128(form: str) -> None:
    codec: Any = make_telling(BlockCodec(Spectral(form)))
    groups = analyse(codec)
    assert groups["g_a.1.a"].pinned is None
    small: Any = prune(codec, {"g_a.1.a": [0, 3, 5]}, groups)  # fails unless it is so to 1e-10
    assert small.g_a[1].b.in_channels == 3 and small.g_a[1].kernel.dtype == torch.complex64
    assert small.g_a[1].kernel.equal(codec.g_a[1].kernel)
    small.update()
    assert Coder(copy_codec(small), everything=True).in_float64


def test_complex_values_that_both_sides_compute_with_are_coded_in_complex128() -> None:
    codec: Any = make_telling(ScaleHyperprior(8, 12))
    codec.h_s = nn.Sequential(Spectral("a parameter"), *codec.h_s)
    codec.update()
    coder = Coder(copy_codec(codec))
    assert coder.in_float64 and coder.has_digest
    assert coder.model.h_s[0].kernel.dtype == torch.complex128
    assert coder.model.g_s[0].weight.dtype == torch.float32


def test_inside_alone_types_are_others() -> None:
    other = torch.zeros(1)
    with float64_throughout():
        x = torch.rand(3)
        for moved in (x.to(other), x.type_as(other), x.type_as(other=other)):
            assert moved.equal(x), "no digit is lost on the way"
        for kind in (torch.FloatTensor, torch.HalfTensor, "torch.BFloat16Tensor"):
            assert x.type(kind).equal(x)
        assert torch.tensor([1], dtype=torch.int32).view(torch.float32).dtype == torch.float32
        made = torch.ones(2, dtype=torch.float32)
        assert made.dtype == torch.zeros(2).float().dtype == torch.float64
        assert made.view(torch.int64).view(torch.float64).equal(made)
        assert made.long().dtype == torch.int64 and made.numpy().dtype == "float64"
    assert torch.zeros(2).dtype == torch.ones(2).double().float().dtype == torch.float32


def test_widths_that_training_alone_holds_are_found_there_too() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x).float()
        return s.b(y.view(1, 8, *y.shape[2:]) if s.training else y)

    groups = analyse(codec_of(run, a=conv(), b=conv()))
    assert "in training" in str(groups["g_a.1.a"].pinned)


class Gated(nn.Module):
    """Attention whose weight in the sum is zero until training opens it (SAGAN, ReZero)."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.gate = nn.Parameter(torch.full((1,), gate))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
        attention = torch.softmax(q.transpose(1, 2) @ k * q.shape[1] ** -0.5, -1)
        return x + self.gate * (v @ attention.transpose(1, 2)).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("trained", [True, False])
def test_what_a_closed_gate_hides_is_found(trained: bool) -> None:
    found = [
        analyse(
            BlockCodec(nn.Sequential(nn.ReLU(), conv(), Gated(gate))).eval().requires_grad_(trained)
        )
        for gate in (0.0, 1.0)
    ]
    closed, opened = ([(g.name, g.pinned is None) for g in groups] for groups in found)
    assert closed == opened
    (reason,) = [group.pinned for group in found[0] if ".q" in group.name]
    assert reason and "depends on this width" in reason


class Counting(nn.Module):
    """Count calls, and draw a number, in evaluation mode too."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = self.mean + x.detach().float().mean() + 0 * torch.rand(())
        return x


def test_what_running_a_codec_changes_is_undone() -> None:
    codec: Any = make_telling(BlockCodec(nn.Sequential(nn.ReLU(), Counting(), conv())))
    state, random = state_of(codec), torch.random.get_rng_state()
    buffers = [id(buffer) for buffer in codec.buffers()]
    for work in (
        measure,
        analyse,
        lambda one: attach(one, "magnitude", budget={"macs": 0.8}, round_to=1),
    ):
        work(codec)
        assert same_state(state, codec.state_dict())
        assert torch.equal(random, torch.random.get_rng_state())
    assert buffers == [id(buffer) for buffer in codec.buffers()]


class Silent(CompressionModel):
    """A codec that cannot code."""

    def __init__(self) -> None:
        super().__init__()
        inner = BlockCodec(nn.Sequential(nn.ReLU(), conv()))
        self.g_a, self.g_s = inner.g_a, inner.g_s
        self.entropy_bottleneck = inner.entropy_bottleneck

    forward = BlockCodec.forward


def test_a_codec_without_compress_is_pruned_by_its_forward_pass() -> None:
    codec = make_telling(Silent())
    groups = analyse(codec)
    small = prune(codec, random_keep(groups, 0), groups)
    assert "no bitstream" in small.__dict__["_nicprune_provenance"]["verified"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("compress", "before any pruning, .*bitstream of Faulty does not decode: KeyError"),
        ("random", "returns something else each time"),
        ("float64", "does not run in float64 as it is, before any pruning"),
        ("output", "does not return a dictionary"),
    ],
)
def test_faults_of_the_codec_itself_are_not_blamed_on_widths(fault: str, says: str) -> None:
    class Faulty(BlockCodec):
        def forward(self, x: Tensor) -> Any:
            if fault == "random":
                x = x + torch.rand_like(x)
            if fault == "float64" and x.dtype == torch.float64:
                raise RuntimeError("float32 only")
            out = super().forward(x)
            return out["x_hat"] if fault == "output" else out

        def compress(self, x: Tensor) -> dict[str, Any]:
            return {} if fault == "compress" else super().compress(x)

    with pytest.raises(CodecError, match=says) as error:
        analyse(Faulty(nn.Sequential(nn.ReLU(), conv())).eval())
    assert "\n" not in str(error.value)


def test_numbers_where_only_bitstreams_are_written_are_found() -> None:
    class Coded(BlockCodec):
        def compress(self, x: Tensor) -> dict[str, Any]:
            y = self.g_a[1](self.g_a[0](x)).view(1, 8, 16, 16)
            y = self.g_a[2](y)
            return {"strings": [self.entropy_bottleneck.compress(y)], "shape": y.shape[-2:]}

    groups = analyse(make_telling(Coded(nn.Sequential(conv(), nn.ReLU(), conv()))))
    assert "bitstream of Coded does not decode" in str(groups["g_a.1.2"].pinned)
    assert groups["g_a.1.0"].pinned is None and groups["g_a.0"].pinned is None


def test_few_trials_find_the_widths_that_code_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of four attentions go whole, among sixty groups: nothing is left for trials to find."""
    tried: list[int] = []
    own = surgery._Trials.failure

    def counting(self: Any, keep: Any, codes: bool) -> Any:
        tried.append(len(keep))
        return own(self, keep, codes)

    monkeypatch.setattr(surgery._Trials, "failure", counting)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = ChannelwiseCodec(16, 24, 2, 1, (8,), heads=2).eval()
    groups = analyse(codec)
    assert not [g.name for g in groups if "depends on this width" in str(g.pinned)]
    assert len(groups) > 60 and len(tried) <= 40, len(tried)
    keep = random_keep(groups, 0)
    assert CostModel(codec, groups).totals(keep) == measure(prune(codec, keep, groups))


def test_a_part_of_ones_own_in_a_codec_of_the_zoo_is_tried() -> None:
    codec: Any = FactorizedPrior(8, 12)
    codec.g_a[2] = nn.Sequential(
        codec.g_a[2], Run(lambda s, x: x.view(1, 8, *x.shape[2:]).contiguous())
    )
    groups = analyse(make_telling(codec))
    assert "depends on this width" in str(groups["g_a.2.0"].pinned)
    assert groups["g_a.0"].pinned is None


def test_a_forward_of_ones_own_on_an_instance_is_tried() -> None:
    codec: Any = FactorizedPrior(8, 12).eval()
    codec.g_a.forward = copy.deepcopy(codec.g_a).forward
    # A copy of the codec computes with the weights of another module still.
    with pytest.raises(CodecError, match="before any pruning"):
        analyse(codec)


def test_codecs_of_the_zoo_are_not_tried(architecture: str) -> None:
    assert not has_foreign_code(built(architecture)[0])


# -- sides ----------------------------------------------------------------------------------------


class Renamed(CompressionModel):
    """A codec whose transforms have other names."""

    def __init__(self) -> None:
        super().__init__()
        inner = BlockCodec(nn.Sequential(nn.ReLU(), conv(), nn.ReLU(), conv()))
        self.encoder, self.decoder = inner.g_a, inner.g_s
        self.entropy_bottleneck = inner.entropy_bottleneck

    def forward(self, x: Tensor) -> dict[str, Any]:
        y_hat, likelihoods = self.entropy_bottleneck(self.encoder(x))
        return {"x_hat": self.decoder(y_hat), "likelihoods": {"y": likelihoods}}

    def compress(self, x: Tensor) -> dict[str, Any]:
        y = self.encoder(x)
        return {"strings": [self.entropy_bottleneck.compress(y)], "shape": y.shape[-2:]}

    def decompress(self, strings: Any, shape: Any) -> dict[str, Tensor]:
        y_hat = self.entropy_bottleneck.decompress(strings[0], shape)
        return {"x_hat": self.decoder(y_hat).clamp(0, 1)}


def test_layers_count_on_the_side_where_they_run() -> None:
    codec = make_telling(Renamed())
    groups = analyse(codec)
    keep = random_keep(groups, 0)
    for one, kept in ((codec, None), (codec, keep)):
        total = CostModel(one, groups).totals(kept)
        known = BlockCodec(nn.Identity())
        known.g_a, known.g_s = codec.encoder, codec.decoder
        known.entropy_bottleneck = codec.entropy_bottleneck
        if kept is None:
            assert (total.encoder, total.decoder) == (
                measure(known).encoder,
                measure(known).decoder,
            )
        assert total.encoder < total.macs and total.decoder < total.macs
    small = prune(codec, keep, groups)
    assert CostModel(codec, groups).totals(keep) == measure(small)


# -- counting -------------------------------------------------------------------------------------


def test_an_operator_without_a_handle_is_named() -> None:
    codec = codec_of(lambda s, x: s.b(x) * (1 + torch.cdist(x, x).mean()), b=conv())
    with pytest.warns(UserWarning, match="MACs of .*cdist.* are not counted"):
        measure(codec)


class Convolve(torch.autograd.Function):
    """A convolution of one's own, as memory-saving ones are written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError


class Nested(Convolve):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(Convolve.apply(x, weight, bias))  # type: ignore[no-any-return]


class Twice(Convolve):
    """Within it one that holds another, and then another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        once = LowerBoundFunction.apply(Nested.apply(x, weight, bias), x.new_zeros(1))
        return Convolve.apply(once, weight, bias)  # type: ignore[no-any-return]


class Distances(Convolve):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x + torch.cdist(x, x).mean() * weight.mean() + bias.mean()


def through(*functions: Any) -> Any:
    """A codec with a convolution, and functions that are given its weights once more."""

    def run(s: Any, x: Tensor) -> Tensor:
        y: Tensor = s.b(x)
        for function in functions:
            y = function.apply(y, s.b.weight, s.b.bias)
        return y

    return codec_of(run, b=conv())


@pytest.mark.parametrize(
    ("functions", "times"),
    [((Convolve,), 1), ((Nested,), 1), ((Twice,), 2), ((Twice, Convolve, Nested, Twice), 6)],
)
def test_what_an_autograd_function_runs_is_counted(
    functions: Any, times: int, recwarn: Any
) -> None:
    one, two = measure(through()), measure(codec := through(*functions))
    assert two.macs - one.macs == two.encoder - one.encoder == times * 8 * 8 * 16 * 16
    assert not [w for w in recwarn if "not counted" in str(w.message)]
    groups = analyse(codec)
    keep = random_keep(groups, seed=0)
    assert keep and CostModel(codec, groups).totals(keep) == measure(prune(codec, keep, groups))


def test_an_operator_without_a_handle_is_named_in_a_function_too() -> None:
    with pytest.warns(UserWarning, match=r"MACs of .*cdist.* in BlockCodec are not counted"):
        measure(through(Distances))


@torch.library.custom_op("nicprune_tests::convolve", mutates_args=())
def convolve(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight)


@convolve.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


def test_operators_of_other_libraries_are_named() -> None:
    codec = codec_of(lambda s, x: convolve(s.b(x), s.b.weight), b=conv())
    with pytest.warns(UserWarning, match="MACs of nicprune_tests::convolve in"):
        measure(codec)


def test_a_straight_through_rounding_is_nothing_to_tell(recwarn: Any) -> None:
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients

    measure(codec_of(lambda s, x: Round.apply(s.b(x)), b=conv()))
    assert not [w for w in recwarn if "not counted" in str(w.message)]


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_a_word_is_counted(padding: str) -> None:
    def body(padding: Any, k: int) -> Any:
        torch.manual_seed(0)
        return codec_of(lambda s, x: s.b(x), b=nn.Conv2d(8, 8, k, padding=padding))

    k = 3 if padding == "same" else 1
    assert measure(body(padding, k)).macs == measure(body(k // 2, k)).macs


def test_resampling_and_pooling_are_no_multiply_adds() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = F.interpolate(s.b(x), scale_factor=2, mode="bilinear")
        return F.adaptive_avg_pool2d(s.c(y), x.shape[2:])

    codec = codec_of(run, b=conv(), c=conv())
    groups = find_groups(codec)
    keep = random_keep(groups, 0)
    assert CostModel(codec, groups).totals(keep) == measure(prune(codec, keep, groups))
    assert (
        measure(codec).macs
        == measure(codec_of(lambda s, x: s.c(s.b(x)), b=conv(), c=conv())).macs
        + 3 * 8 * 8 * 16 * 16
    )


# -- layers with more than weights ----------------------------------------------------------------


def test_looking_at_importance_does_not_train_running_statistics() -> None:
    codec = make_telling(Small()).train()
    codec.g_a[1].norm.eval()
    groups, before = analyse(codec), state_of(codec)
    modes = [m.training for m in codec.modules()]
    found = importance(codec, groups, groups.prunable(), [image(codec, 1)], 0.01, "mse")
    assert all(bool((value > 0).all()) for value in found.values())
    assert same_state(before, state_of(codec))
    assert modes == [m.training for m in codec.modules()]


def test_parameters_of_a_module_start_anew_as_its_class_makes_them() -> None:
    codec = make_telling(Small())
    with torch.no_grad():
        codec.g_a[1].gamma.fill_(9.0)
    groups = analyse(codec)
    small: Any = prune(codec, {"g_a.0": [1, 4, 6]}, groups)
    reinitialise(small)
    assert small.g_a[1].gamma.tolist() == [0.5] * 3
    assert small.g_a[1].norm.running_mean.tolist() == [0.0] * 3


def test_norms_by_hand_start_anew_as_their_class_makes_them() -> None:
    codec = make_telling(SmallWithNorm())
    small: Any = prune(codec, {"g_a.0": [1, 4, 6]}, analyse(codec, "adapt"))
    with torch.no_grad():
        small.g_a[1].norm.bias.fill_(3.0)
    reinitialise(small)
    assert small.g_a[1].norm.weight.tolist() == [1.0] * 3
    assert small.g_a[1].norm.bias.tolist() == [0.0] * 3


# -- scales that are never zero -------------------------------------------------------------------


class ByFunction(ScaleHyperprior):
    """Its scales are a function of what h_s returns."""

    def __init__(self, function: Any):
        super().__init__(8, 12)
        self.h_s[-1] = function


@pytest.mark.parametrize(("function", "held"), [(nn.ReLU(), False), (nn.Softplus(), True)])
def test_latents_whose_scales_are_never_zero_stay_and_say_why(function: Any, held: bool) -> None:
    """The masked codec codes zeros at their scale; the pruned one codes nothing."""
    groups = analyse(make_telling(ByFunction(function)))
    reason = groups["g_a.6"].pinned
    assert bool(reason) == held
    if held:
        assert "the scale must be zero too, and softplus or exp never is" in str(reason)
    assert all(group.pinned is None for group in groups if group.name != "g_a.6")
