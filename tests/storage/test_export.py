"""Export: other tools get the same function, or a clear word why not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from compressai.models import ScaleHyperprior
from helpers import built, image, random_keep, same_state, state_of
from torch import nn

from nicprune.common.errors import CodecError, FileError
from nicprune.methods import attach
from nicprune.pruning.surgery import prune
from nicprune.storage.export import export_compressai, export_onnx


def test_uniform_widths_load_in_stock_compressai(tmp_path: Path, hyperprior: nn.Module) -> None:
    widths = {"g_a.*": 8, "g_s.*": 8, "h_a.*": 8, "h_s.*": 8, "g_a.6": 12}
    small = attach(hyperprior, "magnitude", widths=widths, latents=True).harden().eval()
    content = torch.load(export_compressai(small, tmp_path / "c.pth.tar"), weights_only=True)
    assert (content["N"], content["M"]) == (8, 12)
    stock = ScaleHyperprior.from_state_dict(content["state_dict"]).eval()
    x = image(small)
    first, second = stock(x), small(x)
    assert torch.equal(first["x_hat"], second["x_hat"])
    assert all(
        torch.equal(first["likelihoods"][key], second["likelihoods"][key]) for key in ("y", "z")
    )
    sent = stock.compress(x)
    small.update(force=True)
    assert sent["strings"] == small.compress(x)["strings"]


def test_whole_codecs_of_every_kind_export_or_say_why(architecture: str, tmp_path: Path) -> None:
    codec, _ = built(architecture)
    before = state_of(codec)
    try:
        path = export_compressai(codec, tmp_path / "c.pth.tar")
    except FileError as error:
        assert architecture.startswith("elic") and "use nicprune.load" in str(error), (
            "stock ELIC reads only N"
        )
    else:
        assert "state_dict" in torch.load(path, weights_only=True)
    assert same_state(before, state_of(codec))


def test_other_widths_are_refused_by_layer(tmp_path: Path) -> None:
    codec, groups = built("bmshj2018-hyperprior")
    small = prune(codec, {"g_a.2": list(range(7))}, groups)
    expected = (
        r"cannot load this ScaleHyperprior.*g_a.2.weight is \[7, 16, 5, 5\] where \[16, 16, 5, 5\]"
        r" would follow.*nicprune.load"
    )
    with pytest.raises(FileError, match=expected):
        export_compressai(small, tmp_path / "c.pth.tar")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_pruned_transforms_run_in_onnx_runtime(tmp_path: Path) -> None:
    """Attention here; GDN in the example on the command line, every day."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    codec, groups = built("cheng2020-attn")
    small = prune(codec, random_keep(groups, 1), groups, verify=False)
    before, told = state_of(small), []
    files = export_onnx(small, tmp_path, say=told.append)  # compares at two sizes
    assert [f.name for f in files] == ["g_a.onnx", "g_s.onnx", "h_a.onnx", "h_s.onnx"]
    assert all(
        line.startswith(f"{file.name}: ONNX Runtime = torch to ")
        for line, file in zip(told, files, strict=True)
    )
    assert same_state(before, state_of(small))
    # Beside what the export checked itself: a size that it never saw.
    x = image(small, size=256)[:, :, :192]
    with torch.no_grad():
        expected = small.g_a(x)
    (found,) = onnxruntime.InferenceSession(str(files[0]), providers=["CPUExecutionProvider"]).run(
        None, {"input": x.numpy()}
    )
    assert float((torch.from_numpy(found) - expected).abs().max()) <= 1e-4 * float(
        expected.abs().max()
    )


def test_a_wrong_file_is_noticed(
    tmp_path: Path, hyperprior: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import nicprune.storage.export as module

    real = module.write_onnx
    monkeypatch.setattr(
        module,
        "write_onnx",
        lambda m, x, path: real(nn.Sequential(m, nn.Hardtanh(-0.1, 0.1)), x, path),
    )
    with pytest.raises(FileError, match="g_a.onnx does not compute what g_a does"):
        export_onnx(hyperprior, tmp_path)
    assert not list(tmp_path.iterdir()), "a file that failed its check never gets its name"


def test_what_cannot_be_traced_is_said_in_one_line(
    tmp_path: Path, hyperprior: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def fails(*args: object) -> None:
        raise RuntimeError("no such operator\nand a long explanation")

    monkeypatch.setattr("nicprune.storage.export.write_onnx", fails)
    with pytest.raises(
        FileError, match="g_a cannot be exported to ONNX: RuntimeError: no such operator$"
    ):
        export_onnx(hyperprior, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(
    tmp_path: Path, hyperprior: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(CodecError, match=r"needs onnx, .*pip install 'nicprune\[export\]'"):
        export_onnx(hyperprior, tmp_path)


def test_masks_do_not_go_to_other_tools(tmp_path: Path, hyperprior: nn.Module) -> None:
    masked = attach(hyperprior, "mask_decay", widths={"g_a.0": 8}, decay_steps=10)
    for codec in (masked, hyperprior):
        with pytest.raises(CodecError, match=r"export harden"):
            export_compressai(codec, tmp_path / "c.pth.tar")
        with pytest.raises(CodecError, match=r"export harden"):
            export_onnx(codec, tmp_path)


def test_likelihoods_that_differ_are_noticed(
    tmp_path: Path, hyperprior: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image does not show what the hyper-synthesis computes."""

    def loads_another(state: dict[str, torch.Tensor]) -> nn.Module:
        stock = ScaleHyperprior(16, 24)
        stock.load_state_dict(
            {key: value * 2 if key == "h_s.4.weight" else value for key, value in state.items()}
        )
        return stock

    monkeypatch.setattr(ScaleHyperprior, "from_state_dict", staticmethod(loads_another))
    with pytest.raises(FileError, match="computes something else"):
        export_compressai(hyperprior, tmp_path / "c.pth.tar")


def test_classes_without_a_loader_are_refused(tmp_path: Path) -> None:
    from compressai.models import CompressionModel

    with pytest.raises(FileError, match="has no from_state_dict"):
        export_compressai(CompressionModel(), tmp_path / "c.pth.tar")


def test_codecs_without_transforms_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from compressai.models import CompressionModel

    with pytest.raises(CodecError, match="has none of g_a"):
        export_onnx(CompressionModel(), tmp_path)
