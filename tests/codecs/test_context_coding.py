"""Context models in one kernel: the bytes of CompressAI's loop, on both sides, where the codec has
the form that the kernel computes; the loop itself everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compressai.entropy_models import GaussianConditional
from compressai.layers import MaskedConv2d
from compressai.models import JointAutoregressiveHierarchicalPriors
from helpers import METHOD_SETTINGS, M, N, built, image, make_telling, random_keep
from torch import Tensor, nn

from nicprune.codecs import kernels
from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.fast_coding import LARGEST_SYMBOL, fast_indexes
from nicprune.codecs.float64_coding import Coder
from nicprune.codecs.layer_kinds.pixel_context import pixel_context
from nicprune.codecs.rans import recorded_symbols, uncompiled
from nicprune.common.errors import CodecError, FileError
from nicprune.methods import attach
from nicprune.pruning.surgery import prune
from nicprune.storage.container import decode, encode

pytestmark = pytest.mark.skipif(not kernels.COMPILED, reason="numba is not installed")

NAMES = ["mbt2018", "cheng2020-anchor", "cheng2020-attn"]


@contextmanager
def counted() -> Iterator[list[bool]]:
    """How the kernel is called: True to read."""
    calls: list[bool] = []
    own = kernels.code_positions

    def code(reading: bool, *args: Any) -> Any:
        calls.append(reading)
        return own(reading, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "code_positions", code)
        yield calls


def both_ways(coder: Coder, x: Tensor, telling: int = 20, **rate: Any) -> list[bool]:
    """Code images by the kernel and by CompressAI's loop; each reads what the other wrote. Return
    how the kernel was called. Strings have more than so many different bytes.
    """
    with counted() as calls, torch.no_grad():
        with recorded_symbols() as written:
            sent = coder.compress(x, **rate)
        with uncompiled(), recorded_symbols() as expected:
            again = coder.compress(x, **rate)
        assert sent["strings"] == again["strings"], "the bytes are the same"
        digest = expected.digest(again["strings"])
        assert digest and written.digest(sent["strings"]) == digest
        assert written.written == expected.written
        with recorded_symbols() as read:
            x_hat = coder.decompress(sent["strings"], sent["shape"], x)
        with uncompiled(), recorded_symbols() as loop:
            other = coder.decompress(sent["strings"], sent["shape"], x)
        assert read.digest(sent["strings"]) == loop.digest(sent["strings"]) == digest
        assert torch.allclose(x_hat, other, atol=1e-5)
    assert any(len(set(string)) > telling for string in sent["strings"][-2]), (
        "strings that say little"
    )
    return calls


def coder_of(codec: Any) -> Coder:
    refresh_tables(codec)
    return Coder(copy_codec(codec))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_loop(name: str) -> None:
    coder = coder_of(built(name)[0])
    x = torch.cat([image(coder.model, 1, 128), image(coder.model, 2, 128)])[..., :64, :]
    assert both_ways(coder, x) == [False, False, True, True]


@pytest.mark.parametrize("seed", range(8))
def test_pruned_codecs_are_coded_by_the_kernel(seed: int) -> None:
    codec, groups = built(NAMES[seed % 2])
    keep = random_keep(groups, seed, minimal=seed == 7)
    small = prune(codec, keep, verify=False) if seed else codec
    telling = 1 if seed == 7 else 20
    assert both_ways(coder_of(small), image(codec, seed), telling) == [False, True]


class Own(JointAutoregressiveHierarchicalPriors):
    """A codec of other widths, layers and activations."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(N, M)
        bias, act = seed % 2 == 0, nn.ReLU if seed % 3 == 0 else nn.LeakyReLU
        self.context_prediction = MaskedConv2d(M, 7 + seed, 5, padding=2, bias=bias)
        widths = [2 * M + 7 + seed, *(11 + i for i in range(seed)), 2 * M]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(inputs, outputs, 1, bias=bias), act()]
        self.entropy_parameters = nn.Sequential(*layers[:-1])


def own(change: Callable[[Any], object] = lambda codec: None, seed: int = 1) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        codec: Any = Own(seed)
        change(codec)
        return make_telling(codec, seed)


@pytest.mark.parametrize("seed", range(4))
def test_layers_of_any_width_and_number(seed: int) -> None:
    assert both_ways(coder_of(own(seed=seed)), image(own(seed=seed), seed)) == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_many_random_codecs(seed: int) -> None:
    codec = own(seed=seed % 6)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for layer in (codec.context_prediction, *codec.entropy_parameters):
            for value in layer.parameters():
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
    assert both_ways(coder_of(codec), image(codec, seed)) == [False, True]


def test_weights_that_float32_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    coder = coder_of(built("mbt2018")[0])
    with torch.no_grad():
        for layer in coder.model.entropy_parameters:
            for value in layer.parameters():
                value.mul_(1 + 1e-12)
    assert both_ways(coder, image(coder.model, 3)) == [False, True]


@pytest.mark.parametrize("method", ["bit_rate_modulator", "slimmable", "quantisation_steps"])
def test_codecs_with_methods(method: str) -> None:
    """Whether or not the kernel serves, bytes are the same."""
    attached = attach(built("mbt2018")[0], method, **METHOD_SETTINGS.get(method, {})).eval()
    coder = coder_of(attached)
    for point in attached.operating_points()[:2]:
        both_ways(coder, image(attached.codec, 2), **point.keywords())


class Unusual(GaussianConditional):
    """It finds other tables."""

    def build_indexes(self, scales: Tensor) -> Tensor:
        found: Tensor = super().build_indexes(scales * 1.1)
        return found


def unmasked(codec: Any) -> None:
    codec.context_prediction = MaskedConv2d(M, 8, 5, padding=2, mask_type="B")


def unusual(codec: Any) -> None:
    codec.gaussian_conditional = Unusual(None)


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda m, args, out: out * 1.01)


def replaced(module: Any) -> None:
    module.forward = lambda x: type(module).forward(module, x) * 1.01


def quantised(codec: Any) -> None:
    conditional = codec.gaussian_conditional
    conditional.quantize = lambda x, mode, means=None: type(conditional).quantize(
        conditional, x, mode, means
    )


class Loud(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * super().forward(x)


OTHER_FORMS: dict[str, Callable[[Any], object]] = {
    "another layer": lambda c: c.entropy_parameters.__setitem__(1, nn.Tanh()),
    "a derived layer": lambda c: c.entropy_parameters.__setitem__(
        0, Loud(c.entropy_parameters[0].in_channels, c.entropy_parameters[0].out_channels, 1)
    ),
    "an activation at the end": lambda c: c.entropy_parameters.append(nn.LeakyReLU()),
    "a wider kernel": lambda c: c.entropy_parameters.__setitem__(
        2, nn.Conv2d(c.entropy_parameters[2].in_channels, 2 * M, 3, padding=1)
    ),
    "groups": lambda c: c.entropy_parameters.__setitem__(
        2, nn.Conv2d(c.entropy_parameters[2].in_channels, 2 * M, 1, groups=3)
    ),
    "a hook": lambda c: hooked(c.entropy_parameters[0]),
    "a hook on all": lambda c: hooked(c.entropy_parameters),
    "another forward": lambda c: replaced(c.entropy_parameters[0]),
    "another forward of an activation": lambda c: replaced(c.entropy_parameters[1]),
    "another way to tables": unusual,
    "another way to symbols": quantised,
}


@pytest.mark.parametrize("what", OTHER_FORMS)
def test_other_forms_are_coded_by_the_loop(what: str) -> None:
    codec = own(seed=2)
    with torch.no_grad():
        codec.entropy_parameters[2] = nn.Conv2d(12, 2 * M, 1)
        codec.entropy_parameters[0] = nn.Conv2d(2 * M + 9, 12, 1)
    codec.entropy_parameters = codec.entropy_parameters[:3]
    modules = "context_prediction", "entropy_parameters", "gaussian_conditional"
    assert pixel_context(*(getattr(codec, name) for name in modules)) is None  # no tables yet
    refresh_tables(codec)
    assert pixel_context(*(getattr(codec, name) for name in modules)) is not None
    OTHER_FORMS[what](codec)
    codec.update(force=True)
    assert pixel_context(*(getattr(codec, name) for name in modules)) is None
    if "kernel" not in what:  # CompressAI's loop knows 1x1 layers alone
        assert both_ways(Coder(codec), image(codec, 1)) == []


def test_a_mask_that_shows_what_is_not_decoded_yet_is_not_taken() -> None:
    codec = own(unmasked)
    refresh_tables(codec)
    assert (
        pixel_context(
            codec.context_prediction, codec.entropy_parameters, codec.gaussian_conditional
        )
        is None
    )


@torch.no_grad()
def test_float32_is_coded_by_the_loop() -> None:
    codec: Any = built("mbt2018")[0]
    refresh_tables(codec)
    with counted() as calls, fast_indexes():
        sent = codec.compress(image(codec))
        codec.decompress(sent["strings"], sent["shape"])
        Coder(copy_codec(codec), float64=False).compress(image(codec))
    assert calls == [] and sent["strings"] == codec.compress(image(codec))["strings"]


def test_an_own_loop_stays() -> None:
    class Mine(JointAutoregressiveHierarchicalPriors):
        def _compress_ar(self, *args: Any) -> Any:
            return super()._compress_ar(*args)[::-1]

        def _decompress_ar(self, y_string: Any, *args: Any) -> Any:
            return super()._decompress_ar(y_string[::-1], *args)

    codec: Any = built("mbt2018")[0]
    codec.__class__ = Mine
    coder = coder_of(codec)
    assert both_ways(coder, image(codec, 1)) == [False, True] if coder.has_digest else True


@torch.no_grad()
def test_a_changed_way_to_symbols_or_tables_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the classes, not of this codec."""
    coder, x = coder_of(built("mbt2018")[0]), image(built("mbt2018")[0], 1)
    before = coder.compress(x)["strings"]
    for name in ("build_indexes", "quantize"):
        own_way = getattr(GaussianConditional, name)
        with monkeypatch.context() as patch, counted() as calls:
            patch.setattr(
                GaussianConditional, name, lambda self, *args, f=own_way: f(self, *args) * 0
            )
            assert coder.compress(x)["strings"] != before and calls == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e9])
def test_what_cannot_be_coded_is_refused_by_the_kernel(value: float) -> None:
    coder = coder_of(built("mbt2018")[0])
    x = image(coder.model, 1)
    with torch.no_grad(), counted() as calls:
        coder.model.entropy_parameters[-1].bias[0] = value
        if abs(value) != 1e9:
            with pytest.raises(CodecError, match="scales of this codec are not finite"):
                coder.compress(x)
        coder.model.entropy_parameters[-1].bias[0] = 0
        coder.model.entropy_parameters[-1].bias[-1] = value
        with pytest.raises(CodecError, match="latents of this codec are not finite"):
            coder.compress(x)
    assert calls and LARGEST_SYMBOL < 1e9


def photo(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize("name", ["mbt2018", "bmshj2018-hyperprior", "elic2022-official"])
def test_files_are_read_with_and_without_numba(name: str) -> None:
    codec = built(name)[0]
    with uncompiled():
        data = encode(codec, photo())
        picture = decode(codec, data)
    assert encode(codec, photo()) == data
    assert torch.equal(decode(codec, data), picture)


def test_other_symbols_than_the_encoders_are_refused() -> None:
    """As by a processor that rounds otherwise."""
    codec = built("mbt2018")[0]
    data, own_kernel = encode(codec, photo()), kernels.code_positions

    def elsewhere(reading: bool, *args: Any) -> Any:
        changed = list(args)
        if reading:
            changed[8] = args[8] + 0.01
        return own_kernel(reading, *changed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "code_positions", elsewhere)
        with pytest.raises(FileError, match="cannot be decoded here"):
            decode(codec, data)
