"""What encoder and decoder must compute alike is computed in float64, on every architecture; where
kernels differ, symbols are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compressai.models import ScaleHyperprior
from helpers import ARCHITECTURES, METHOD_SETTINGS, M, N, built, image, make_telling, same_state
from torch import Tensor, nn

from nicprune.codecs.cdf import refresh_tables
from nicprune.codecs.copying import copy_codec
from nicprune.codecs.evc import EVC
from nicprune.codecs.float64_coding import Coder
from nicprune.codecs.rans import recorded_symbols
from nicprune.methods import Attached, attach

ENCODER, DECODER = ("g_a", "h_a"), ("g_s",)


def ready(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec: Any = make_telling(EVC([16, 16, 16, 16])) if name == "evc" else built(name)[0]
    refresh_tables(codec.eval())
    return codec


def parts(name: str) -> set[str]:
    return set(name.split("."))


def in_type(model: nn.Module, dtype: torch.dtype) -> set[str]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name for name, value in named if value.dtype == dtype}


@contextmanager
def other_kernels(sign: float) -> Iterator[None]:
    """Let every convolution round as other kernels might: off by 1e5 times what its type resolves,
    so that the few symbols of a small image are enough to see what it does.
    """
    own = torch.conv2d, torch.conv_transpose2d

    def changed(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = function(*args, **kwargs)
            return out * (1 + sign * 1e5 * torch.finfo(out.dtype).eps)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "conv2d", changed(own[0]))
        patch.setattr(nn.functional, "conv_transpose2d", changed(own[1]))
        yield


@torch.no_grad()
def symbols_elsewhere(coder: Coder, x: Tensor) -> tuple[bytes, bytes]:
    """The digests of what is encoded, and of what is decoded with other kernels."""
    with other_kernels(1), recorded_symbols() as written:
        sent = coder.compress(x)
    try:
        with other_kernels(-1), recorded_symbols() as read:
            coder.decompress(sent["strings"], sent["shape"])
    except Exception:  # noise may hold anything
        return written.digest(sent["strings"]), b""
    return written.digest(sent["strings"]), read.digest(sent["strings"])


@pytest.mark.parametrize("name", [*ARCHITECTURES, "evc"])
def test_what_both_sides_compute_is_in_float64_and_nothing_else(name: str) -> None:
    codec = ready(name)
    before = {key: value.clone() for key, value in codec.state_dict().items()}
    coder = Coder(codec)
    assert coder.in_float64 and coder.has_digest and coder.failure is None
    double = in_type(codec, torch.float64)
    assert not [key for key in double if parts(key).intersection((*ENCODER, *DECODER))]
    shared = {"h_s", "context_prediction", "entropy_parameters", "channel_context", "spatial_prior"}
    weights = [key for key, _ in codec.named_parameters() if parts(key) & shared]
    assert bool(weights) == ("factorized" not in name) and double.issuperset(weights)
    after = {k: v.float() if v.is_floating_point() else v for k, v in codec.state_dict().items()}
    assert same_state(before, after), "float64 holds float32"
    x = image(codec, 3).float()
    sent = coder.compress(x)
    decoded = coder.decompress(sent["strings"], sent["shape"])
    assert decoded.dtype == torch.float32
    exact = Coder(ready(name), everything=True)
    assert not in_type(exact.model, torch.float32)
    assert torch.allclose(exact.decompress(sent["strings"], sent["shape"]), decoded, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "bmshj2018-hyperprior",
        "mbt2018",
        "cheng2020-anchor-checkerboard",
        "elic2022-official",
        "evc",
    ],
)
def test_other_kernels_decode_the_same_symbols(name: str) -> None:
    x = image(ready(name), 1, 128).float()
    written, read = symbols_elsewhere(Coder(ready(name)), x)
    assert written and written == read
    written, read = symbols_elsewhere(Coder(ready(name), float64=False), x)
    assert written and written != read, "these kernels change nothing: the test shows nothing"


METHODS = ["channel_gating", "slimmable", "scalable_encoder", "bit_rate_modulator"]


@pytest.mark.parametrize("name", [*METHODS, "conditional_autoencoder", "quantisation_steps"])
def test_methods_on_the_codec_take_part(name: str) -> None:
    """At every operating point, also those that were not watched."""
    attached = attach(built("mbt2018-mean")[0], name, **METHOD_SETTINGS.get(name, {})).eval()
    refresh_tables(attached)
    coder = Coder(copy_codec(attached))
    assert coder.in_float64 and coder.has_digest
    x = image(attached.codec, 2, 128)
    points = [point.keywords() for point in attached.operating_points()]
    assert len(points) > 1 or name == "channel_gating"
    with torch.no_grad():
        for rate in points:
            sent = coder.compress(x, **rate)
            decoded = coder.decompress(sent["strings"], sent["shape"])
            expected = attached.compress(x, **rate)
            found = attached.decompress(expected["strings"], expected["shape"])["x_hat"]
            assert torch.allclose(decoded, found, atol=1e-3)
    slow = [key for key in in_type(coder.model, torch.float64) if key.startswith("codec.g_")]
    assert not slow


class Foreign(ScaleHyperprior):
    """A codec of somebody's own, whose parts have other names and other places."""

    def __init__(self) -> None:
        super().__init__(N, M)
        self.first, self.last = self.g_a, self.g_s
        self.prior = self.h_s
        del self.g_a, self.g_s, self.h_s
        self.gain = nn.Parameter(torch.linspace(0.8, 1.2, M)[:, None, None])

    def side(self, z_hat: Tensor) -> Tensor:
        """What both sides compute, in part without a module."""
        scales: Tensor = self.prior(z_hat)
        noise = torch.linspace(0.9, 1.1, M, device=scales.device)[:, None, None]
        return self.gaussian_conditional.build_indexes(scales * self.gain * noise)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.first(x)
        z_hat, z_likelihoods = self.entropy_bottleneck(self.h_a(y.abs()))
        y_hat, likelihoods = self.gaussian_conditional(y, self.prior(z_hat))
        return {"x_hat": self.last(y_hat), "likelihoods": {"y": likelihoods, "z": z_likelihoods}}

    def compress(self, x: Tensor) -> dict[str, Any]:
        y = self.first(x)
        z = self.h_a(y.abs())
        z_strings = self.entropy_bottleneck.compress(z)
        indexes = self.side(self.entropy_bottleneck.decompress(z_strings, z.shape[-2:]))
        return {
            "strings": [self.gaussian_conditional.compress(y, indexes), z_strings],
            "shape": z.shape[-2:],
        }

    def decompress(self, strings: Any, shape: Any) -> dict[str, Any]:
        z_hat = self.entropy_bottleneck.decompress(strings[1], shape)
        y_hat = self.gaussian_conditional.decompress(strings[0], self.side(z_hat))
        return {"x_hat": self.last(y_hat).clamp(0, 1)}


def foreign(cls: type[Foreign] = Foreign) -> Foreign:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        codec = make_telling(cls())
    refresh_tables(codec)
    assert isinstance(codec, Foreign)
    return codec


def test_sides_are_found_by_what_runs_not_by_names() -> None:
    codec = foreign()
    assert Coder(codec).in_float64
    double = in_type(codec, torch.float64)
    assert {"gain", "prior.0.weight"} <= double
    assert not [key for key in double if key.startswith(("first.", "last.", "h_a."))]
    codec = foreign()
    x = image(codec, 1, 128)
    written, read = symbols_elsewhere(Coder(codec), x)
    assert written and written == read


class Making(Foreign):
    """It makes tensors, outside of modules and in the encoder."""

    made: set[tuple[str, torch.dtype]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.first.register_forward_hook(lambda module, args, out: self.note("encoder"))

    def note(self, place: str) -> None:
        for made in (torch.zeros(1), torch.tensor([0.5]), torch.full((1,), 0.5), torch.ones(2)):
            self.made.add((place, made.dtype))
        assert torch.tensor([1]).dtype == torch.arange(3).dtype == torch.int64
        assert torch.zeros(1, dtype=torch.float32).dtype == torch.float32

    def side(self, z_hat: Tensor) -> Tensor:
        self.note("both")
        return super().side(z_hat)


def test_new_tensors_are_in_float64_outside_one_sided_modules() -> None:
    codec = foreign(Making)
    coder = Coder(codec)
    codec.made.clear()
    coder.compress(image(codec))
    assert codec.made == {("encoder", torch.float32), ("both", torch.float64)}


class Shared(Foreign):
    """The encoder's module computes in it what the decoder computes in another one."""

    class Around(nn.Module):
        def __init__(self, codec: Any):
            super().__init__()
            self.hidden = [codec]

        def forward(self, x: Tensor) -> Any:
            return Foreign.compress(self.hidden[0], x)

    def compress(self, x: Tensor) -> dict[str, Any]:
        if "around" not in self._modules:
            self.around = self.Around(self)
        found: dict[str, Any] = self.around(x)
        return found


def test_a_module_that_codes_is_not_one_sided() -> None:
    codec = foreign(Shared)
    codec.compress(image(codec))
    coder = Coder(codec)
    assert coder.in_float64 and "prior.0.weight" in in_type(codec, torch.float64)
    assert "first.0.weight" in in_type(codec, torch.float32)
    assert codec.first._forward_pre_hooks and not codec.around._forward_pre_hooks
    written, read = symbols_elsewhere(coder, image(codec, 1, 128))
    assert written and written == read


class Mixing(Foreign):
    """It uses the encoder's weights beside the modules that hold them."""

    def side(self, z_hat: Tensor) -> Tensor:
        return super().side(z_hat + self.first[0].weight.mean())


def test_a_weight_that_both_sides_use_is_in_float64_wherever_it_is() -> None:
    codec = foreign(Mixing)
    assert Coder(codec).in_float64
    double = in_type(codec, torch.float64)
    assert "first.0.weight" in double and "first.2.weight" not in double


class Stubborn(Foreign):
    """It takes float32 alone."""

    def side(self, z_hat: Tensor) -> Tensor:
        if z_hat.dtype != torch.float32:
            raise TypeError("float32, please")
        return super().side(z_hat)


def test_a_codec_that_takes_float32_alone_codes_in_float32() -> None:
    codec = foreign(Stubborn)
    coder = Coder(codec)
    assert not coder.in_float64 and coder.has_digest
    assert not in_type(codec, torch.float64)
    with torch.no_grad():
        sent = coder.compress(image(codec))
        expected = foreign(Stubborn).compress(image(codec))
    assert sent["strings"] == expected["strings"]


class Astray(Foreign):
    """In float64 it reads other symbols than it writes."""

    def decompress(self, strings: Any, shape: Any) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            if self.gain.dtype == torch.float64:
                patch.setattr(self.gain, "data", 3 * self.gain.data)
            return super().decompress(strings, shape)


def test_a_codec_that_goes_astray_in_float64_codes_in_float32() -> None:
    coder = Coder(foreign(Astray))
    assert not coder.in_float64 and coder.has_digest


class Broken(Foreign):
    def decompress(self, strings: Any, shape: Any) -> dict[str, Any]:
        raise KeyError("nothing to be had")


def test_a_codec_that_cannot_code_says_what_it_raised() -> None:
    coder = Coder(foreign(Broken))
    assert isinstance(coder.failure, KeyError) and not coder.has_digest


def test_hooks_and_types_of_the_callers_own_codec_stay() -> None:
    attached = attach(built("mbt2018-mean")[0], "bit_rate_modulator", qualities=[1, 2])
    refresh_tables(attached)
    coder = Coder(copy_codec(attached))
    assert isinstance(coder.model, Attached)
    assert not in_type(attached, torch.float64)
    assert torch.get_default_dtype() == torch.float32
