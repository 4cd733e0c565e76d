"""The command line as a user meets it: exit codes, one-line errors, no tracebacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import built
from typer.testing import CliRunner

from nicprune.cli.commands import app, main
from nicprune.storage.checkpoint import save


def call(*arguments: str) -> str:
    """Run a command in this process; return what it printed."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """Run `main` with arguments that must fail; return its one line."""
    monkeypatch.setattr(sys, "argv", ["nicprune", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code not in (0, None)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


@pytest.fixture(autouse=True)
def _keep_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` sets warning filters for its process; tests keep their own."""
    monkeypatch.setattr("nicprune.cli.commands.warnings.simplefilter", lambda *a, **k: None)
    monkeypatch.setattr("nicprune.cli.commands.warnings.showwarning", None, raising=False)


def test_list() -> None:
    out = call("list")
    assert "bmshj2018-hyperprior" in out and "mask_decay" in out and "quickstart" in out
    assert "quickstart" not in call("list", "methods")


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


def test_profile() -> None:
    out = call("profile", "bmshj2018-hyperprior", "--quality", "1", "--weights", "none")
    assert (
        "12 channel groups" in out
        and "34.242" in out
        and "g_a.1" in out
        and "decoder" in out
        and "fvcore" in out
    )


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


def test_encode_and_decode(tmp_path: Path) -> None:
    import torch

    from nicprune.data.images import read_image, write_png
    from nicprune.evaluation.evaluate import evaluate
    from nicprune.methods import attach
    from nicprune.storage.container import decode, encode

    picture = write_png(torch.rand(3, 67, 130), tmp_path / "a.png")
    codec = built("bmshj2018-hyperprior")[0]
    path = str(save(codec, tmp_path / "c.safetensors"))
    coded, decoded = tmp_path / "a.nic", tmp_path / "out.png"
    coded.write_text("something older")
    out = call("encode", path, str(picture), str(coded))
    size = coded.stat().st_size
    assert (
        f"{size:,} bytes" in out and f"{8 * size / (67 * 130):.4f} bpp" in out and "130x67" in out
    )
    assert coded.read_bytes() == encode(codec, picture)
    assert "wrote" in call("decode", path, str(coded), str(decoded))
    assert torch.equal(read_image(decoded), decode(codec, coded))
    modulated = attach(codec, "bit_rate_modulator", lambdas=[0.0018, 0.0067, 0.025])
    path = str(save(modulated, tmp_path / "m.safetensors"))
    for rate in (["--level", "0.5"], ["--lmbda", "0.0067"]):
        call("encode", path, str(picture), str(coded), *rate)
        assert coded.read_bytes() == encode(
            modulated, picture, **{rate[0].removeprefix("--"): float(rate[1])}
        )
        call("decode", path, str(coded), str(decoded))
        assert torch.equal(read_image(decoded), decode(modulated, coded))
        assert str(
            evaluate(modulated, str(picture), **{rate[0].removeprefix("--"): float(rate[1])})
        ).split(" dB")[0] in call("eval", path, str(picture), *rate)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.nic",
        "a.png",
        "c.safetensors",
        "m.safetensors",
        "out.png",
    ]


def test_encode_and_decode_fail_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from nicprune.data.images import write_png

    picture = str(write_png(torch.rand(3, 64, 64), tmp_path / "a.png"))
    codec = str(save(built("bmshj2018-hyperprior")[0], tmp_path / "c.safetensors"))
    out, png = tmp_path / "a.nic", tmp_path / "b.png"
    for arguments, expected in (
        (["encode", codec, str(tmp_path / "nowhere.png"), str(out)], "no such image"),
        (["encode", codec, picture, str(out), "--level", "1"], "without a modulator"),
        (["decode", codec, picture, str(png)], "not an image that nicprune encoded"),
        (["decode", codec, str(out), str(png)], "no such file"),
        (["decode", codec, picture, str(tmp_path / "b.jpg")], "must end in .png"),
    ):
        err = fails(monkeypatch, capsys, *arguments)
        assert expected in err and err.startswith("nicprune: ") and err.count("\n") == 1
    assert not out.exists() and not png.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["profile", "bmshj2018-hyperpior"], "did you mean 'bmshj2018-hyperprior'"),
        (["profile", "mbt2018", "--quality", "12"], "has no quality 12; it has 1 to 8"),
        (["run", "quickstrat"], "did you mean 'quickstart'"),
        (["run", "quickstart", "--set", "finetune.stepps=3"], "did you mean 'steps'"),
        (
            ["check", "quickstart", "--set", "photographs.train=/nowhere"],
            "no such folder: /nowhere",
        ),
        (["eval", "nowhere.safetensors", "samples"], "no such file"),
        (["prune", "demo-hyperprior", "a.safetensors", "-q", "1"], "give either budget"),
        (
            [
                "prune",
                "demo-hyperprior",
                "a.safetensors",
                "-q",
                "1",
                "--method",
                "fisher",
                "--set",
                "budget.macs=0.5",
            ],
            "--images folder",
        ),
        (
            [
                "prune",
                "demo-hyperprior",
                "a.safetensors",
                "-q",
                "1",
                "--method",
                "mask_decay",
                "--set",
                "budget.macs=0.5",
            ],
            "masks are not at zero yet",
        ),
        (
            [
                "prune",
                "demo-hyperprior",
                "a.safetensors",
                "-q",
                "1",
                "--method",
                "bit_rate_modulator",
                "--set",
                "qualities=[1, 2]",
            ],
            "stays on the codec",
        ),
        (["list", "codec"], "did you mean 'codecs'"),
        (["report", "/nowhere"], "/nowhere"),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    err = fails(monkeypatch, capsys, *arguments)
    assert expected in err and err.startswith("nicprune: ") and err.count("\n") == 1


def test_unknown_commands_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "prnue" in fails(monkeypatch, capsys, "prnue")


def test_help_says_what_is_written() -> None:
    out = (
        CliRunner().invoke(app, ["time", "--help"]).output
        + CliRunner().invoke(app, ["decode", "--help"]).output
    )
    assert "[label=]codec[@width]" in out and "package.module:factory" in out


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
sys.argv = ["nicprune", "--help"]
from nicprune.cli.commands import main
try:
    main()
except SystemExit:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nicprune", "report", "nowhere"], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("nicprune: ")
        and done.stderr.count("\n") == 1
    )


def test_a_codec_is_not_written_where_no_command_would_read_it(tmp_path: Path) -> None:
    """Before any work: the codec is not even there."""
    for name in ("out.pth", "out", "out.pth.tar", "out.safetensor"):
        asked = ["prune", "no_such_module:codec", str(tmp_path / name), "--set", "budget.macs=0.5"]
        result = CliRunner().invoke(app, asked)
        assert f"{name} must end in .safetensors" in str(result.exception)
