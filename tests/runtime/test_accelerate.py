"""An accelerated codec codes the same files, by every backend, and is refused where its layers
would be changed.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.models import (
    CompressionModel,
    FactorizedPrior,
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperprior,
    ScaleHyperprior,
)
from torch import nn

import nicprune as nip
from nicprune.common.errors import CodecError, NicpruneError
from nicprune.pruning.cost import measure
from nicprune.runtime.backends import BACKENDS
from nicprune.runtime.layer_forms import ORIGINAL, cache_file, choose_forms
from nicprune.storage.export import export_onnx

FAMILIES = {
    "factorized": FactorizedPrior,
    "scale": ScaleHyperprior,
    "mean-scale": MeanScaleHyperprior,
    "autoregressive": JointAutoregressiveHierarchicalPriors,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NICPRUNE_CACHE", str(tmp_path))


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    for package in BACKENDS[request.param].packages:
        pytest.importorskip(package)
    return str(request.param)


def codec_of(family: str = "scale") -> CompressionModel:
    torch.manual_seed(0)
    codec = FAMILIES[family](8, 12).eval()
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.startswith("g_a") and name.endswith("weight"):
                parameter.mul_(1.5)  # latents that do not all round to zero
    codec.update(force=True)
    return codec


IMAGE = (torch.rand(3, 100, 150, generator=torch.Generator().manual_seed(0)) * 255).byte()
SMALL = IMAGE[:, :64, :128]


PAIRS = [
    pytest.param(
        backend,
        family,
        marks=() if backend == "torch" else pytest.mark.slow,
    )
    for backend in sorted(BACKENDS)
    for family in FAMILIES
]


@pytest.mark.parametrize(("backend", "family"), PAIRS, indirect=["backend"])
def test_each_codes_what_the_other_reads(family: str, backend: str) -> None:
    codec = codec_of(family)
    fast = nip.accelerate(codec, backend, image=SMALL)
    ours, theirs = nip.encode(codec, IMAGE), nip.encode(fast, IMAGE)
    for data in (ours, theirs):
        pictures = [nip.decode(one, data).int() for one in (codec, fast)]
        assert int((pictures[0] - pictures[1]).abs().max()) <= 1
    assert [t.name for t in fast.acceleration.transforms] == [
        name for name in ("g_a", "g_s", "h_a") if hasattr(codec, name)
    ]
    assert abs(len(ours) - len(theirs)) <= 0.01 * len(ours)


@pytest.mark.slow
def test_every_layer_may_be_rewritten(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the measured times say: the slowest form of each layer computes the same."""
    monkeypatch.setattr("nicprune.runtime.layer_forms.min", max, raising=False)
    codec = codec_of()
    fast = nip.accelerate(codec, backend, image=SMALL)
    forms = [layer.form for t in fast.acceleration.transforms for layer in t.layers]
    assert forms
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert (fast.g_a(x) - codec.g_a(x)).abs().max() < 1e-5


def test_cost_and_weights_are_the_codecs_own() -> None:
    codec = codec_of()
    fast = nip.accelerate(codec, image=SMALL)
    assert measure(fast) == measure(codec)
    for key, value in codec.state_dict().items():
        assert torch.equal(value, fast.state_dict()[key])


REFUSED = {
    "attach": lambda codec, path: nip.attach(codec, "mask_decay", widths={"g_a.0": 4}),
    "prune": lambda codec, path: nip.prune(codec, {}),
    "analyse": lambda codec, path: nip.analyse(codec),
    "save": lambda codec, path: nip.save(codec, path / "codec.safetensors"),
    "fit": lambda codec, path: nip.fit(codec, steps=1, lmbda=0.01, train=path),
    "accelerate": lambda codec, path: nip.accelerate(codec),
    "export": lambda codec, path: export_onnx(codec, path),
    "pickle": lambda codec, path: pickle.dumps(codec),
    "weights": lambda codec, path: codec.load_state_dict(codec_of().state_dict()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_layers_is_refused(name: str, tmp_path: Path) -> None:
    fast = nip.accelerate(codec_of(), image=SMALL)
    with pytest.raises(NicpruneError, match="this codec is accelerated") as error:
        REFUSED[name](fast, tmp_path)
    assert "\n" not in str(error.value)


def test_nothing_of_it_learns() -> None:
    fast = nip.accelerate(codec_of(), image=SMALL)
    assert not any(parameter.requires_grad for parameter in fast.parameters())


class Branch(nn.Module):
    """Compute something else where maps are larger than a window, or of a size of their own."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.layer = nn.Conv2d(12, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.shape[-1]
        if self.kind == "branch":
            return self.layer(x * 2 if wide > 8 else x)
        return self.layer(x) + torch.linspace(-1, 1, int(wide)).view(1, 1, 1, -1)


@pytest.mark.parametrize("kind", ["branch", "length"])
def test_what_depends_on_the_size_is_refused_or_right_at_every_size(
    kind: str, backend: str
) -> None:
    codec: Any = codec_of()
    codec.g_s = nn.Sequential(Branch(kind), *codec.g_s)
    codec.update(force=True)
    try:
        fast = nip.accelerate(codec, backend)
    except CodecError as error:
        assert "g_s" in str(error) and "\n" not in str(error) and backend != "torch"
        return
    for size in ((64, 64), (64, 192), (256, 128)):
        image = torch.rand(3, *size).mul(255).byte()
        data = nip.encode(codec, image)
        apart = (nip.decode(codec, data).int() - nip.decode(fast, data).int()).abs().max()
        assert apart <= 1


def test_a_copy_is_accelerated_too() -> None:
    from nicprune.codecs.copying import copy_codec
    from nicprune.codecs.replaced_forward import replaced

    fast = nip.accelerate(codec_of(), image=SMALL)
    assert len(replaced(copy_codec(fast))) == len(replaced(fast)) == 3


def test_bad_requests_are_one_line() -> None:
    codec = codec_of()
    masked = nip.attach(codec_of(), "mask_decay", widths={"g_a.0": 4})
    for call, message in [
        (lambda: nip.accelerate(codec, "tensorrt"), "unknown backend 'tensorrt'"),
        (lambda: nip.accelerate(codec, precision="fp16"), "unknown precision 'fp16'"),
        (lambda: nip.accelerate(codec, "torch", "int8"), "backend 'torch' has no precision 'int8'"),
        (lambda: nip.accelerate(masked.codec), "methods on it"),
        (lambda: nip.accelerate(nn.Identity()), "expected a compressai CompressionModel"),
    ]:
        with pytest.raises(NicpruneError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_int8_needs_images() -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(NicpruneError, match="'int8' needs images"):
        nip.accelerate(codec_of(), "onnxruntime", "int8")


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_layers_are_measured_in_the_precision_that_they_will_run_in(precision: str) -> None:
    asked = []

    class Noting(type(BACKENDS["torch"]())):  # type: ignore[misc]
        name = "noting"

        def compile(self, transform, example, precision, calibration):  # type: ignore[no-untyped-def]
            asked.append((precision, [x.shape for x in calibration]))
            return transform

    codec = codec_of()
    x = SMALL[None].float() / 255
    choose_forms(codec.g_a, "g_a", x, Noting(), precision)
    assert {one for one, _ in asked} == {precision}
    assert all(len(shapes) == 1 for _, shapes in asked), "int8 finds ranges by the layer's input"


@pytest.mark.slow
def test_int8_decodes_what_it_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantisation changes the latents that are sent, not whether they are read. Layers are
    measured in int8 too: transposed convolutions do not gain by it, convolutions do.
    """
    pytest.importorskip("onnxruntime")
    compile_, asked = BACKENDS["onnxruntime"].compile, []

    def noted(self, transform, example, precision, calibration):  # type: ignore[no-untyped-def]
        asked.append((precision, len(calibration)))
        return compile_(self, transform, example, precision, calibration)

    monkeypatch.setattr(BACKENDS["onnxruntime"], "compile", noted)
    codec = codec_of()
    fast = nip.accelerate(codec, "onnxruntime", "int8", image=SMALL, calibration=[SMALL] * 2)
    assert set(asked) == {("int8", 1), ("int8", 2)}, "layers, and whole transforms"
    data = nip.encode(fast, IMAGE)
    first, second = nip.decode(codec, data).float(), nip.decode(fast, data).float()
    assert first.shape == IMAGE.shape
    assert (first - second).abs().mean() < 16
    assert any(t.difference > 1e-4 for t in fast.acceleration.transforms)


def test_a_backend_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_ = BACKENDS["torch"].compile

    def wrong(self, transform, example, precision, calibration):  # type: ignore[no-untyped-def]
        function = compile_(self, transform, example, precision, calibration)
        return lambda x: function(x) * 1.001

    monkeypatch.setattr(BACKENDS["torch"], "compile", wrong)
    with pytest.raises(CodecError, match="compiled by torch does not compute what g_a does"):
        nip.accelerate(codec_of(), image=SMALL)


def test_layers_are_measured_once() -> None:
    codec = codec_of()
    first = nip.accelerate(codec, image=SMALL).acceleration
    stored = cache_file().read_text()
    assert nip.accelerate(codec, image=SMALL).acceleration == first
    assert cache_file().read_text() == stored
    assert ORIGINAL in str(first) and "convolution and pixel shuffle" in str(first)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}'])
def test_a_damaged_cache_is_measured_again(text: str) -> None:
    cache_file().write_text(text)
    assert nip.accelerate(codec_of(), image=SMALL).acceleration.transforms
