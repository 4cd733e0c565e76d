"""Methods on codecs whose analysis and synthesis are not called g_a and g_s."""

from __future__ import annotations

import copy
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import METHOD_SETTINGS, hook_count, image
from renamed_codecs import CODECS, ENDS, Renamed, renamed_codec
from torch import Tensor, nn
from zoo_of_blocks import BlockCodec

from nicprune import attach, load, save
from nicprune.codecs.roles import roles_of, transform_in
from nicprune.common.errors import CodecError, FileError
from nicprune.methods import METHODS
from nicprune.pruning.cost import CostModel
from nicprune.pruning.surgery import analyse, prune
from nicprune.storage.container import decode, encode
from nicprune.storage.identity import earlier_mark, fingerprint, mark

_shared: dict[str, Any] = {}


def shared(name: str) -> Any:
    """A codec that tests leave as it was, analysed once."""
    if name not in _shared:
        _shared[name] = renamed_codec(name)
    return _shared[name].eval()


@pytest.mark.parametrize("name", CODECS)
def test_roles_are_what_coding_shows(name: str) -> None:
    codec = renamed_codec(name)
    roles = roles_of(codec)
    assert roles.analysis and roles.synthesis and not roles.reason
    assert (roles.analysis.module, roles.synthesis.module) == ENDS[name]
    whole = name in ("renamed", "nested", "method")
    assert roles.analysis.whole is whole and roles.synthesis.whole is whole
    assert {end.dim for end in (roles.analysis, roles.synthesis)} == {2 if name == "tokens" else 1}
    assert transform_in(codec, "hyper_encoder.0") == transform_in(codec, "hyper_encoder") == "h_a"
    assert transform_in(codec, "hyper_decoder.0.weight") == "other"
    assert hook_count(codec) == (1 if name == "flat" else 0)
    assert roles_of(copy.deepcopy(codec)) == roles


@pytest.mark.parametrize("coded", ["by keywords", "centred"])
def test_roles_are_found_however_entropy_models_are_called(coded: str) -> None:
    codec = renamed_codec("renamed")
    codec.coded = coded
    assert roles_of(codec) == roles_of(shared("renamed"))


@pytest.mark.parametrize("name", CODECS)
def test_costs_are_told_by_transform(name: str) -> None:
    codec = shared(name)
    groups = analyse(codec)
    cost = CostModel(codec, groups)
    table, total = cost.by_transform(), cost.totals()
    assert set(table) >= {"g_a", "g_s", "h_a", "other"}
    assert sum(macs for macs, _ in table.values()) == total.macs
    assert total.macs - total.decoder == table["g_a"][0] + table["h_a"][0]
    assert total.macs - total.encoder == table["g_s"][0]
    assert {g.name for g in groups.on_side("decoder") if not g.pinned} and groups.on_side("encoder")


BY_NAME = ("bit_rate_modulator", "channel_gating", "distillation", "scalable_encoder", "slimmable")
"""Methods that ask what a module does; of each sort one."""

DAILY = {*(("renamed", method) for method in (*BY_NAME, "mask_decay")), ("flat", "slimmable")}
"""What is tried in the daily run."""


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) in DAILY else pytest.mark.slow)
        for name in CODECS
        for method in (sorted(METHODS) if name == "renamed" else BY_NAME)
    ],
)
def test_every_method_goes_on_every_codec(name: str, method: str, tmp_path: Path) -> None:
    codec, x = shared(name), image(nn.Linear(1, 1), 2)
    settings = METHOD_SETTINGS.get(method, {})
    if method == "scalable_encoder" and name in ("flat", "tokens"):
        with pytest.raises(CodecError, match="not one module of") as error:
            attach(codec, method, **settings)
        assert "\n" not in str(error.value) and hook_count(codec) == (name == "flat")
        return
    with torch.no_grad():
        before = codec(x)["x_hat"]
        both = [("none", {}), (method, settings)] if method == "distillation" else None
        attached = attach(codec, both) if both else attach(codec, method, **settings)
        assert torch.equal(attached.eval()(x)["x_hat"], before)
    attached.train()
    for parameter in attached.methods.parameters():
        if attached.levels is not None:  # a modulator that has learnt something
            parameter.data += 0.1 * torch.rand(parameter.shape, generator=torch.manual_seed(0))
    for _ in range(8):
        for width in attached.widths_per_step() or [None]:  # type: ignore[list-item]
            out = attached(x, width=width)
            (attached.loss(out, x) + (out["x_hat"] - x).square().mean()).backward()
        attached.after_step()
    attached.prepare([x])
    small: Any = attached.harden() if method != "distillation" else attached.codec
    attached.detach()
    small.eval().update(force=True)
    sent = small.compress(x)
    decoded = small.decompress(sent["strings"], sent["shape"])["x_hat"]
    with torch.no_grad():
        assert (decoded - small(x)["x_hat"].clamp(0, 1)).abs().max() < 1e-4
    again = load(save(small, tmp_path / "small.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(x)["x_hat"], small(x)["x_hat"])


@pytest.mark.parametrize("name", CODECS)
def test_a_modulator_scales_the_latents_and_nothing_else(name: str) -> None:
    codec, x = renamed_codec(name), image(nn.Linear(1, 1), 2)
    attached = attach(codec, "bottleneck_scaling", qualities=[1, 3]).eval()
    seen: list[Tensor] = []
    codec.gaussian_conditional.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        attached(x, level=1)
        attached(x, level=0)
    scale = (0.0018 / 0.0067) ** 0.5
    assert torch.allclose(seen[1], scale * seen[0], rtol=1e-5, atol=1e-6)
    if name in ("renamed", "nested", "method", "flat"):
        plain = attached.plain(level=0)
        with torch.no_grad():
            assert torch.allclose(plain(x)["x_hat"], attached(x, level=0)["x_hat"], atol=1e-4)


@pytest.mark.parametrize("name", CODECS)
def test_gates_and_sides_reach_what_the_names_do_not_say(name: str) -> None:
    codec = shared(name)
    attached = attach(codec, "channel_gating", alpha=1.0, gating_steps=4)
    gated = attached.methods[0].gated  # type: ignore[union-attr]
    assert {transform_in(codec, one) for one in gated} == {"g_a", "h_a", "g_s"}
    attached.detach()
    one_sided = attach(codec, "magnitude", budget={"decoder": 0.9}, round_to=1, side="decoder")
    small = one_sided.harden()
    assert one_sided.methods[0].trains(f"{ENDS[name][1]}.weight")  # type: ignore[operator]
    assert not one_sided.methods[0].trains(f"{ENDS[name][0]}.weight")  # type: ignore[operator]
    x = image(nn.Linear(1, 1), 2)
    small.update(force=True)
    codec.update(force=True)
    assert small.compress(x) == one_sided.detach().compress(x)


# -- where it cannot be found ---------------------------------------------------------------------


class Silent(Renamed):
    """No compress and decompress."""

    @property
    def compress(self) -> Any:
        raise AttributeError("compress")


class Forked(Renamed):
    """Latents that come from two modules, and go to two."""

    def make(self) -> None:
        super().make()
        self.second = nn.Conv2d(3, 12, 16, 16)
        self.other = nn.ConvTranspose2d(12, 3, 16, 16)

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) + self.second(x)

    def decode(self, y: Tensor) -> Tensor:
        return super().decode(y) + self.other(y)


class Shared(BlockCodec):
    """The latents are read by modules of both sides alone."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.encoder, self.decoder = self.g_a, self.g_s
        del self.g_a, self.g_s

    def forward(self, x: Tensor) -> dict[str, Any]:
        y_hat, likelihoods = self.entropy_bottleneck(self.encoder(x))
        return {"x_hat": self.decoder(y_hat), "likelihoods": {"y": likelihoods}}

    def compress(self, x: Tensor) -> dict[str, Any]:
        y = self.encoder(x)
        self.decoder(y)
        return {"strings": [self.entropy_bottleneck.compress(y)], "shape": y.shape[-2:]}

    def decompress(self, strings: Any, shape: Any) -> dict[str, Tensor]:
        y_hat = self.entropy_bottleneck.decompress(strings[0], shape)
        return {"x_hat": self.decoder(y_hat).clamp(0, 1)}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Silent, "no compress and decompress that work"),
        (Forked, "come from encoder, second, not one module"),
        (Shared, "are read by no module that runs in decompress alone"),
    ],
)
@pytest.mark.parametrize("method", ["bit_rate_modulator", "scalable_encoder"])
def test_one_line_says_what_is_not_found(make: Any, says: str, method: str) -> None:
    codec = make().eval()
    if make is Shared and method == "scalable_encoder":
        assert attach(codec, method, **METHOD_SETTINGS[method]) is not None
        return
    with pytest.raises(CodecError, match=says) as error:
        attach(codec, method, **METHOD_SETTINGS[method])
    assert "\n" not in str(error.value) and not hook_count(codec)


def test_a_method_by_the_name_of_a_transform_is_no_module() -> None:
    """`M` follows g_s where it is a module; a method has no layers to look at."""
    codec = renamed_codec("method")
    groups = analyse(codec)
    small = prune(codec, {"g_a.4": list(range(8))}, groups)
    assert small(image(codec))["x_hat"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name", CODECS)
def test_the_original_decoder_reads_what_a_pruned_encoder_writes(name: str) -> None:
    codec = renamed_codec(name).eval()
    settings = {"side": "encoder", "budget": {"encoder": 0.7}, "round_to": 1}
    small = attach(codec, "magnitude", **settings).harden().eval()
    picture = (torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3)) * 255).byte()
    assert torch.equal(decode(codec, encode(small, picture)), decode(small, encode(small, picture)))
    other = copy.deepcopy(codec)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if transform_in(other, n) == "g_s").mul_(1.5)
    with pytest.raises(FileError, match="another codec"):
        decode(other, encode(small, picture))


@pytest.mark.parametrize("name", ["renamed", "flat"])
def test_files_of_before_the_encoder_was_known_are_read(name: str) -> None:
    """Earlier versions counted the weights of an encoder that is not called g_a."""
    codec = renamed_codec(name).eval()
    picture = (torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3)) * 255).byte()
    data = encode(codec, picture)
    now, before = mark(fingerprint(codec), codec), earlier_mark(codec)
    assert now != before and data.count(now) == 1
    body = data[:-4].replace(now, before)
    old = body + zlib.crc32(body).to_bytes(4, "big")
    assert torch.equal(decode(codec, old), decode(codec, data))
