"""`nicprune eval` and `nicprune export`."""

from __future__ import annotations

from pathlib import Path

from helpers import built
from helpers_cli import call

from nicprune.storage.checkpoint import save


def test_eval_and_export(tmp_path: Path) -> None:
    path = save(built("bmshj2018-hyperprior")[0], tmp_path / "c.safetensors")
    import torch

    from nicprune.data.images import write_png

    write_png(torch.rand(3, 64, 64), tmp_path / "a.png")
    out = call(
        "eval",
        str(path),
        str(tmp_path / "a.png"),
        "--per-image",
        "--output",
        str(tmp_path / "r.json"),
    )
    assert "dB" in out and "a.png" in out and (tmp_path / "r.json").exists()
    assert "wrote" in call("export", str(path), str(tmp_path / "c.pth.tar"))
