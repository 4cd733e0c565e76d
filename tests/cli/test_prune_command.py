"""`nicprune prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cli import call
from helpers_latency import table_of
from typer.testing import CliRunner

from nicprune.cli.application import app
from nicprune.data.images import write_png
from nicprune.methods import METHODS
from nicprune.runtime import latency_refinement


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


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].one_shot()])
def test_every_method_without_training_is_named_in_the_help(method: str, tmp_path: Path) -> None:
    from nicprune import load, load_codec, measure

    told = " ".join(CliRunner().invoke(app, ["prune", "--help"]).output.split())
    assert method in told.partition("A method without training: ")[2].partition(".")[0].split(", ")
    output, picture = str(tmp_path / "a.safetensors"), tmp_path / "a.png"
    write_png(torch.rand(3, 64, 64), picture)
    call(
        "prune", "demo-hyperprior", output, "-q", "1", "--method", method, "--set",
        "budget.macs=0.9", "--images", str(picture),
        "--set", "rounds=1" if method == "netadapt" else "budget.split=auto",
    )  # fmt: skip
    assert measure(load(output)).macs <= 0.9 * measure(load_codec("demo-hyperprior", 1)).macs


def test_a_codec_is_not_written_where_no_command_would_read_it(tmp_path: Path) -> None:
    """Before any work: the codec is not even there."""
    for name in ("out.pth", "out", "out.pth.tar", "out.safetensor"):
        asked = ["prune", "no_such_module:codec", str(tmp_path / name), "--set", "budget.macs=0.5"]
        result = CliRunner().invoke(app, asked)
        assert f"{name} must end in .safetensors" in str(result.exception)


def test_budgets_of_time_show_what_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def made_up(codec: Any, *runtime: Any, **more: Any) -> Any:
        asked.append((*runtime, more["size"]))
        return table_of(codec)

    def half_as_long(codecs: Any, table: Any) -> Any:
        """The pruned codec takes half of the whole one's time in every part."""
        return [dict.fromkeys(table.parts, 2.0), dict.fromkeys(table.parts, 1.0)]

    monkeypatch.setattr("nicprune.runtime.latency.measure_latency", made_up)
    monkeypatch.setattr(latency_refinement, "seconds_of_parts", half_as_long)
    output = str(tmp_path / "small.safetensors")
    told = call(
        "prune", "demo-hyperprior", output, "--quality", "3", "--set", "budget.decode_s=0.6",
        "--backend", "openvino", "--size", "384x256",
    )  # fmt: skip
    assert asked == [("openvino", "float32", (256, 384))]
    assert "ms predicted, 0.5" in told and "as fast by a budget of MACs: budget.decoder=0." in told
    result = CliRunner().invoke(
        app, ["prune", "demo-hyperprior", output, "--quality", "3", "--backend", "torch", "--force"]
    )
    assert "--backend is for budget.encode_s" in str(result.exception)
