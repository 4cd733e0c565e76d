"""`nicprune prune`."""

from __future__ import annotations

from pathlib import Path

from helpers_cli import call
from typer.testing import CliRunner

from nicprune.cli.application import app


def test_a_codec_is_pruned_in_one_shot(tmp_path: Path) -> None:
    from nicprune import load, load_codec, measure

    before = measure(load_codec("demo-hyperprior", 3))
    out = call(
        "prune",
        "demo-hyperprior",
        str(tmp_path / "a.safetensors"),
        "-q",
        "3",
        "--set",
        "budget.encoder=0.6",
        "--set",
        "side=encoder",
    )
    after = measure(load(tmp_path / "a.safetensors"))
    assert after.encoder <= 0.6 * before.encoder and after.decoder == before.decoder
    assert (
        f"{before.encoder / after.encoder:.2f}x fewer" in out
        and "masked = pruned" in out
        and f"{after.params:,}" in out
    )
    call(
        "prune",
        "demo-hyperprior",
        str(tmp_path / "b.safetensors"),
        "-q",
        "3",
        "--method",
        "fisher",
        "--set",
        "budget.macs=0.5",
        "--images",
        "samples",
    )
    assert measure(load(tmp_path / "b.safetensors")).macs <= 0.5 * before.macs
    asked = [
        "bmshj2018-factorized",
        str(tmp_path / "c.safetensors"),
        "-q",
        "1",
        "--weights",
        "none",
        "--set",
        "budget.macs=0.5",
    ]
    twice = [
        (call("prune", *asked), (tmp_path / "c.safetensors").read_bytes())[1] for _ in range(2)
    ]
    assert twice[0] == twice[1], "random weights are the same each time"


def test_a_codec_is_not_written_where_no_command_would_read_it(tmp_path: Path) -> None:
    """Before any work: the codec is not even there."""
    for name in ("out.pth", "out", "out.pth.tar", "out.safetensor"):
        asked = ["prune", "no_such_module:codec", str(tmp_path / name), "--set", "budget.macs=0.5"]
        result = CliRunner().invoke(app, asked)
        assert f"{name} must end in .safetensors" in str(result.exception)
