"""A saved codec is loaded as the same function, or it is not saved: whatever its class and the
attributes that it keeps do not say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressai.models import CompressionModel, FactorizedPrior, FactorizedPriorReLU
from helpers import built, image, random_keep, same_state, state_of
from torch import Tensor, nn
from zoo_of_blocks import BlockCodec, C

from nicprune.codecs.layer_operations import resize
from nicprune.codecs.provenance import provenance
from nicprune.codecs.structure import differences, structure
from nicprune.common.errors import CodecError, FileError, NicpruneError
from nicprune.methods import attach
from nicprune.pruning.surgery import prune
from nicprune.storage.checkpoint import check_savable, load, read_header, save

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class Own(CompressionModel):
    """A codec of a user's own, whose attributes do not say how it was made."""

    def __init__(self, N: int = 8, act: str = "relu", gain: float = 1.0, scale: float = 1.0):
        super().__init__()
        inner = FactorizedPriorReLU(N, 12)
        self.g_a, self.g_s, self.entropy_bottleneck = inner.g_a, inner.g_s, inner.entropy_bottleneck
        self.N = N
        self.function = ACTIVATIONS[act]
        self.gain = gain**0.5
        self.factor = torch.tensor(scale)
        self.leak = 0.2

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.function(self.g_a(x)) * 40 * self.gain * self.factor
        y_hat, likelihoods = self.entropy_bottleneck(F.leaky_relu(y - 1, self.leak))
        return {"x_hat": self.g_s(y_hat), "likelihoods": {"y": likelihoods}}

    def compress(self, x: Tensor) -> dict[str, Any]:
        y = self.function(self.g_a(x)) * 40 * self.gain * self.factor
        y = F.leaky_relu(y - 1, self.leak)
        return {"strings": [self.entropy_bottleneck.compress(y)], "shape": y.shape[-2:]}

    def decompress(self, strings: Any, shape: Any) -> dict[str, Any]:
        return {"x_hat": self.g_s(self.entropy_bottleneck.decompress(strings[0], shape))}


def own(**arguments: Any) -> Any:
    torch.manual_seed(0)
    return Own(**arguments).eval()


def stock(kind: Callable[..., Any] = FactorizedPrior) -> Any:
    torch.manual_seed(0)
    return kind(8, 12).eval()


def swapped() -> Any:
    codec = stock(FactorizedPriorReLU)
    codec.g_a[1] = nn.LeakyReLU(0.1)
    return codec


def with_setting(path: str, name: str, value: Any, codec: Any) -> Any:
    setattr(codec.get_submodule(path), name, value)
    return codec


def reflecting() -> Any:
    codec = stock()
    codec.g_a[0] = nn.Conv2d(3, 8, 5, 2, 2, padding_mode="reflect")
    return codec


def turned(codec: Any) -> Any:
    codec.g_a.forward = lambda x: nn.Sequential.forward(codec.g_a, x.flip(-1))
    return codec


MADE: dict[str, Callable[[], Any]] = {
    "a layer of another type": swapped,
    "padding_mode": reflecting,
    "padding_mode, set later": lambda: with_setting("g_a.0", "padding_mode", "circular", stock()),
    "inverse of a GDN": lambda: with_setting("g_a.1", "inverse", True, stock()),
    "a slope": lambda: with_setting("g_s.1", "negative_slope", 0.3, leaky()),
    "an argument that is not kept": lambda: own(act="gelu"),
    "an argument kept as something else": lambda: own(gain=4.0),
    "a tensor that is no buffer": lambda: own(scale=2.0),
    "an attribute that is no argument": lambda: with_setting("", "leak", 0.5, own()),
    "a function put in the place of another": lambda: with_setting("", "function", F.silu, own()),
    "a method of an instance": lambda: turned(stock()),
}


class Leaky(FactorizedPriorReLU):
    def __init__(self, N: int, M: int):
        super().__init__(N, M)
        self.g_s[1] = nn.LeakyReLU(0.2)


def leaky() -> Any:
    return stock(Leaky)


@pytest.mark.parametrize("kind", sorted(MADE))
def test_a_codec_that_would_load_as_another_function_is_refused(kind: str, tmp_path: Path) -> None:
    codec, file = MADE[kind](), tmp_path / "a.safetensors"
    for refused in (
        lambda: save(codec, file),
        lambda: check_savable(codec),
        lambda: check_savable(codec, stock if isinstance(codec, FactorizedPrior) else own),
    ):
        with pytest.raises(CodecError, match="cannot be saved.*(factory=|made this codec)") as told:
            refused()
        assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())
    check_savable(codec, MADE[kind])
    save(codec, file, factory=MADE[kind])
    with pytest.raises(CodecError, match="pass factory="):
        load(file)
    again = load(file, factory=MADE[kind])
    assert same_state(state_of(codec), state_of(again))
    with torch.no_grad():
        assert torch.equal(codec(image(codec))["x_hat"], again(image(codec))["x_hat"])
    with pytest.raises(CodecError, match="pass factory="):  # what came from one needs one
        save(again, tmp_path / "b.safetensors")


def test_what_the_check_does_is_not_noticed(tmp_path: Path) -> None:
    codec = own().train()
    provenance(codec)
    before, state = state_of(codec), torch.get_rng_state()
    check_savable(codec)
    assert same_state(before, state_of(codec)) and codec.training
    save(codec, tmp_path / "a.safetensors")
    assert torch.equal(state, torch.get_rng_state()), "training would go on otherwise"
    masked = attach(
        built("bmshj2018-hyperprior")[0], "mask_decay", budget={"macs": 0.5}, round_to=1
    )
    check_savable(masked)
    assert masked.keep()


def test_whatever_the_codec_is_at_the_time(tmp_path: Path) -> None:
    """Precision, memory format and mode are no reasons to refuse."""
    for change in (
        lambda codec: codec.train(),
        lambda codec: codec.to(memory_format=torch.channels_last),
        lambda codec: codec.double(),
        lambda codec: codec.bfloat16(),
        lambda codec: codec.requires_grad_(False),
    ):
        codec = change(built("mbt2018-mean")[0])
        save(codec, tmp_path / "a.safetensors")
        save(codec, tmp_path / "b.safetensors", half=True)


class Noisy(FactorizedPrior):
    def forward(self, x: Tensor) -> dict[str, Any]:
        Noisy.calls += 1
        return super().forward(x + 0.01 * Noisy.calls)

    calls = 0


def test_a_codec_that_is_never_the_same_twice_is_compared_by_its_layers(tmp_path: Path) -> None:
    codec = stock(Noisy)
    save(codec, tmp_path / "a.safetensors")
    codec.g_a[0].padding_mode = "circular"
    with pytest.raises(CodecError, match="padding_mode"):
        save(codec, tmp_path / "a.safetensors")


def test_a_class_that_has_changed_since_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(leaky(), tmp_path / "a.safetensors")
    assert read_header(file)["structure"]["g_s.1"] == ["LeakyReLU", {"negative_slope": 0.2}]

    class Newer(FactorizedPriorReLU):
        def __init__(self, N: int, M: int):
            super().__init__(N, M)
            self.g_s[1] = nn.LeakyReLU(0.3)

    Newer.__name__ = "Leaky"
    monkeypatch.setattr(sys.modules[__name__], "Leaky", Newer)
    with pytest.raises(CodecError, match=r"g_s.1 has negative_slope 0.3 instead of 0.2"):
        load(file)
    with pytest.raises(CodecError, match="another codec than factory= makes"):
        load(file, factory=lambda: Newer(8, 12))
    with pytest.raises(CodecError, match="g_s.1 is ReLU instead of LeakyReLU"):
        load(file, factory=lambda: renamed(FactorizedPriorReLU))


def renamed(kind: Any) -> Any:
    codec = stock(kind)
    codec.__class__ = type("Leaky", (kind,), {})
    return codec


def test_other_widths_are_the_same_structure(tmp_path: Path) -> None:
    """A file's widths are those of its tensors; a factory may be of any."""
    for name in ("bmshj2018-hyperprior", "mbt2018"):
        codec, groups = built(name)
        small = prune(codec, random_keep(groups, 3), groups, verify=False)
        assert not differences(structure(codec), structure(small))
        file = save(small, tmp_path / "a.safetensors")
        assert same_state(state_of(load(file, factory=lambda n=name: built(n)[0])), state_of(small))


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("side", [1, 4])
def test_norms_over_several_dimensions_are_made_again(
    kind: Callable[..., nn.Module], side: int, tmp_path: Path
) -> None:
    def make() -> Any:
        size = nn.AdaptiveAvgPool2d(side), nn.Upsample(scale_factor=16 // side)
        return BlockCodec(nn.Sequential(size[0], kind([C, side, side]), size[1]))

    codec = make().eval()
    for value in codec.g_a[1][1].parameters():
        nn.init.uniform_(value)
    file = save(codec, tmp_path / "a.safetensors", factory=make)
    assert same_state(state_of(load(file, factory=make)), state_of(codec))
    norm = codec.g_a[1][1]
    resize(norm, {key: value[:5] for key, value in norm.state_dict().items()})
    assert norm.normalized_shape == (5, side, side)


class Picky(FactorizedPrior):
    """Made from a configuration, which it does not keep."""

    def __init__(self, configuration: dict[str, int]):
        super().__init__(configuration["N"], configuration["M"])


def test_what_a_class_cannot_be_made_from_asks_for_a_factory(
    tmp_path: Path, hyperprior: nn.Module
) -> None:
    codec, file = Picky({"N": 8, "M": 12}), tmp_path / "a.safetensors"
    with pytest.raises(CodecError, match=r"Picky cannot be saved.*configuration.*pass factory="):
        save(codec, file)

    def make() -> nn.Module:
        return Picky({"N": 8, "M": 12})

    save(codec, file, factory=make)
    with pytest.raises(CodecError, match=r"that makes it, as .*:.*make did"):
        load(file)
    load(file, factory=make)

    def broken() -> nn.Module:
        raise KeyError("no such preset")

    with pytest.raises(CodecError, match="factory= does not make: 'no such preset'"):
        load(file, factory=broken)
    with pytest.raises(FileError, match="does not fit ScaleHyperprior: missing"):
        load(file, factory=lambda: hyperprior)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        ({"class": f"{__name__}:Picky", "kwargs": {}}, "configuration.*pass factory="),
        ({"class": f"{__name__}:Own", "kwargs": {"act": 3}}, "pass factory="),
        (
            {"class": "compressai.models.google:ScaleHyperprior", "kwargs": {"N": 8, "M": 12}},
            "does not fit ScaleHyperprior: missing .*pass factory=",
        ),
    ],
)
def test_errors_of_loading_name_the_factory(
    build: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    """Files of before the check."""
    import json

    from safetensors.torch import save_file

    header = {"format": "nicprune", "version": 1, "name": "x", "build": build}
    state = {key: value.clone() for key, value in Picky({"N": 8, "M": 12}).state_dict().items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"nicprune": json.dumps(header)})
    with pytest.raises(NicpruneError, match=expected) as told:
        load(tmp_path / "a.safetensors")
    assert "\n" not in str(told.value)
