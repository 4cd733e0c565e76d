"""`nicprune time`, and other commands on a file with several widths."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from helpers_cli import call
from typer.testing import CliRunner

from nicprune.cli.application import app


def test_a_file_with_widths_is_profiled_evaluated_and_coded(tmp_path: Path) -> None:
    from nicprune import attach, load_codec, save
    from nicprune.data.images import write_png

    file = str(
        save(
            attach(load_codec("demo-hyperprior", 3), "slimmable", widths=[1.0, 0.5]),
            tmp_path / "slim.safetensors",
        )
    )
    picture = str(write_png(torch.rand(3, 64, 64), tmp_path / "a.png"))
    assert "g_a.0" in call("profile", file)
    assert "width 1: " in call("eval", file, picture, "--width", "1")
    whole, half = (
        call("time", file, "--image", picture, "--seconds", "0", "--width", width).splitlines()[2]
        for width in "01"
    )
    assert float(whole.split("|")[2]) > 1.5 * float(half.split("|")[2]), (
        "kMAC/pixel of the width that was timed"
    )
    named = call(
        "time",
        f"whole={file}@0",
        f"half={file}@1",
        "--image",
        picture,
        "--seconds",
        "0",
        "--width",
        "0",
        "--out",
        str(tmp_path / "times"),
    )
    assert [line.split("|")[2] for line in named.splitlines()[2:4]] == [
        whole.split("|")[2],
        half.split("|")[2],
    ]
    assert "| half" in (tmp_path / "times" / "times.md").read_text()
    result = CliRunner().invoke(app, ["time", "demo-hyperprior@1", "--quality", "1"])
    assert "has no widths" in str(result.exception)
    call("encode", file, picture, str(tmp_path / "a.nic"), "--width", "1")
    call("decode", file, str(tmp_path / "a.nic"), str(tmp_path / "b.png"))
    result = CliRunner().invoke(app, ["export", file, str(tmp_path / "onnx")])
    assert "extract(0)" in str(result.exception)


def test_codecs_are_timed_by_several_backends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each codec by each backend, at the width that is asked for; the first is the reference."""
    from nicprune import attach, load_codec, save
    from nicprune.data.images import write_png

    monkeypatch.setenv("NICPRUNE_CACHE", str(tmp_path))
    demo = load_codec("demo-hyperprior", 3)
    slim = str(save(attach(demo, "slimmable", widths=[1.0, 0.5]), tmp_path / "slim.safetensors"))
    picture = str(write_png(torch.rand(3, 64, 64), tmp_path / "a.png"))
    backends = ["--backend", "eager", "--backend", "torch", "--seconds", "0", "--image", picture]
    shown = call("time", "demo-hyperprior", f"half={slim}@1", "--quality", "3", *backends)
    table = shown[shown.index("| encode, s") :].splitlines()[2:6]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert [row[0] for row in rows] == [
        "demo-hyperprior, eager", "half, eager", "demo-hyperprior, torch", "half, torch",
    ]  # fmt: skip
    assert rows[0][1] == rows[2][1] != rows[1][1] == rows[3][1], "kMAC/pixel, by any backend"
    assert "g_s: output differs by" in shown and "convolution and pixel shuffle" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "tensorrt"], "unknown backend 'tensorrt'"),
        (["--backend", "torch", "--precision", "int8"], "has no precision 'int8'"),
        (["--precision", "bf16"], "needs a --backend"),
    ],
)
def test_backends_that_cannot_be_are_one_line(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["time", "demo-hyperprior", "--quality", "1", *options])
    assert message in str(result.exception) and "\n" not in str(result.exception)


def test_a_report_of_backends_compares_within_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each codec with the first of its family; gates are timed by PyTorch alone, bf16 where a
    backend has it.
    """
    from nicprune import attach, load_codec, save
    from nicprune.data.images import write_png

    monkeypatch.setenv("NICPRUNE_CACHE", str(tmp_path))
    demo = load_codec("demo-hyperprior", 3)
    slim = str(save(attach(demo, "slimmable", widths=[1.0, 0.5]), tmp_path / "slim.safetensors"))
    gated = attach(load_codec("demo-hyperprior", 3).eval(), "channel_gating", alpha=0.9)
    gates = str(save(gated, tmp_path / "gates.safetensors"))
    picture = str(write_png(torch.rand(3, 64, 64), tmp_path / "a.png"))
    folder = tmp_path / "report"
    shown = call(
        "time", "a/whole=demo-hyperprior", f"a/gates={gates}", f"b/full={slim}@0",
        f"b/half={slim}@1", "--quality", "3", "--backend", "eager", "--backend", "torch",
        "--precision", "float32", "--precision", "bf16", "--seconds", "0", "--image", picture,
        "--report", str(folder),
    )  # fmt: skip
    assert "a/gates: not by torch, as methods stay on it" in shown
    assert "entropy parameters in float64" in (folder / "runtime.md").read_text()
    with open(folder / "runtime.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(r["family"], r["codec"], r["backend"], r["precision"]) for r in rows]
    assert found[:4] == [
        ("a", "whole", "eager", "float32"), ("a", "gates", "eager", "float32"),
        ("a", "whole", "torch", "float32"), ("a", "whole", "torch", "bf16"),
    ]  # fmt: skip
    assert len(rows) == 2 * (4 + 6) and {r["side"] for r in rows} == {"encode", "decode"}
    half = [r for r in rows if r["codec"] == "half"]
    assert len(half) == 6 and all(float(r["flop_reduction"]) > 2 for r in half)
    first = [r for r in rows if r["codec"] in ("whole", "full")]
    assert all(float(r["speed_up"]) == float(r["flop_reduction"]) == 1 for r in first)
    assert len(json.loads((folder / "runtime.json").read_text())["times"]) == 10
