"""Export: other tools get the same function, or a clear word why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressai.models import ScaleHyperprior
from conftest import built, image, random_keep, same_state, state_of
from torch import nn

from nicprune.errors import CodecError, FileError
from nicprune.export import export_compressai, export_onnx
from nicprune.methods import attach
from nicprune.surgery import prune


def test_uniform_widths_load_in_stock_compressai(tmp_path: Path, hyperprior: nn.Module) -> None:
    widths = {"g_a.*": 8, "g_s.*": 8, "h_a.*": 8, "h_s.*": 8, "g_a.6": 12}
    small = attach(hyperprior, "magnitude", widths=widths, latents=True).harden().eval()
    state = torch.load(export_compressai(small, tmp_path / "c.pth.tar"), weights_only=True)["state_dict"]
    stock = ScaleHyperprior.from_state_dict(state).eval()
    x = image(small)
    assert torch.equal(stock(x)["x_hat"], small(x)["x_hat"])
    sent = stock.compress(x)
    small.update(force=True)
    assert sent["strings"] == small.compress(x)["strings"]


def test_whole_codecs_of_every_kind_export_or_say_why(architecture: str, tmp_path: Path) -> None:
    codec, _ = built(architecture)
    before = state_of(codec)
    try:
        path = export_compressai(codec, tmp_path / "c.pth.tar")
    except FileError as error:
        assert architecture.startswith("elic") and "use nicprune.load" in str(error), "stock ELIC reads only N"
    else:
        assert "state_dict" in torch.load(path, weights_only=True)
    assert same_state(before, state_of(codec))


def test_other_widths_are_refused_by_layer(tmp_path: Path) -> None:
    codec, groups = built("bmshj2018-hyperprior")
    small = prune(codec, {"g_a.2": list(range(7))}, groups)
    expected = r"cannot load this ScaleHyperprior.*g_a.2.weight is \[7, 16, 5, 5\] where \[16, 16, 5, 5\] would follow.*nicprune.load"
    with pytest.raises(FileError, match=expected):
        export_compressai(small, tmp_path / "c.pth.tar")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "cheng2020-attn"])
def test_pruned_transforms_run_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    codec, groups = built(name)
    small = prune(codec, random_keep(groups, 1), groups, verify=False)
    files = export_onnx(small, tmp_path)  # compares at two sizes
    assert [f.name for f in files] == ["g_a.onnx", "g_s.onnx", "h_a.onnx", "h_s.onnx"]


def test_a_wrong_file_is_noticed(tmp_path: Path, hyperprior: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import nicprune.export as module

    real = module._write
    monkeypatch.setattr(module, "_write", lambda m, x, path: real(nn.Sequential(m, nn.Hardtanh(-0.1, 0.1)), x, path))
    with pytest.raises(FileError, match="g_a.onnx does not compute what g_a does"):
        export_onnx(hyperprior, tmp_path)


def test_codecs_without_transforms_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from compressai.models import CompressionModel

    with pytest.raises(CodecError, match="has none of g_a"):
        export_onnx(CompressionModel(), tmp_path)
