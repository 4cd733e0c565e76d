"""Exit codes, one-line errors without a traceback, help, start-up."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib import metadata

import pytest
from helpers_cli import fails
from typer.testing import CliRunner

from nicprune.cli.application import app, main
from nicprune.common.errors import FileError, InterruptedRun

PRUNE = ["prune", "demo-hyperprior", "a.safetensors", "-q", "1"]


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
        (PRUNE, "give either budget"),
        ([*PRUNE, "--method", "fisher", "--set", "budget.macs=0.5"], "--images folder"),
        (
            [*PRUNE, "--method", "mask_decay", "--set", "budget.macs=0.5"],
            "'mask_decay' needs training: use it in a recipe",
        ),
        (
            [*PRUNE, "--method", "bit_rate_modulator", "--set", "qualities=[1, 2]"],
            "without training go fisher, magnitude, netadapt, random",
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


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"nicprune {metadata.version('nicprune')}\n")


@pytest.mark.parametrize(("error", "status"), [
    (InterruptedRun("interrupted at step 1 of 2", signal.SIGTERM), 143),
    (InterruptedRun("interrupted at step 1 of 2", signal.SIGINT), 130),
    (KeyboardInterrupt(), 130),
    (FileError("no such file"), 1),
    (ZeroDivisionError("a bug"), 2),
])  # fmt: skip
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
) -> None:
    def raises() -> None:
        raise error

    monkeypatch.setattr("nicprune.cli.application.app", raises)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == status
    assert capsys.readouterr().err.count("\n") == 1


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
from nicprune.cli.application import main
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
