"""Code in the current folder, or that a recipe names: it runs where it is asked for, alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers_cli import call, fails

from nicprune.cli.application import main
from nicprune.codecs.zoo import build_from_path
from nicprune.common.errors import CodecError
from nicprune.data.images import write_png


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a search path of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose codec lies beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "codec_of_a_recipe", raising=False)
    Path("codec_of_a_recipe.py").write_text(
        "from pathlib import Path\n"
        "from compressai.models import FactorizedPrior\n"
        "Path('ran').touch()\n"
        "def make():\n    return FactorizedPrior(2, 3)\n"
    )
    write_png(torch.rand(3, 64, 64), "a.png")
    content = {
        "version": 1,
        "codec": "codec_of_a_recipe:make",
        "qualities": [1],
        "photographs": {"train": "a.png", "test": "a.png", "overlap": True},
        "training": {"patch_size": 64},
        "methods": [{"name": "none"}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_files_of_the_current_folder_do_not_stand_for_libraries(tmp_path: Path) -> None:
    for name in ("yaml", "typer", "PIL", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the folder ran')\n")
    done = subprocess.run(
        [sys.executable, "-m", "nicprune", "check", "nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "no recipe 'nowhere'" in done.stderr and done.returncode == 1


def test_the_search_path_stays_until_a_factory_is_named(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(sys.path)
    fails(monkeypatch, capsys, "check", "nowhere")
    assert sys.path == before
    build_from_path("codec_of_a_recipe:make")
    assert sys.path == [*before, str(recipe.parent)]
    build_from_path("codec_of_a_recipe:make")
    assert sys.path == [*before, str(recipe.parent)]


@pytest.mark.parametrize("command", [["check"], ["run"], ["run", "--dry-run"]])
def test_no_import_refuses_before_anything_runs(
    recipe: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    err = fails(monkeypatch, capsys, *command, "--no-import", str(recipe))
    assert "codec: codec_of_a_recipe:make runs code" in err and err.count("\n") == 1
    assert not Path("ran").exists()


def test_check_says_what_runs(recipe: Path) -> None:
    out = call("check", str(recipe))
    assert "it runs the code of codec_of_a_recipe:make" in out and Path("ran").exists()
    out = call(
        "check", "--no-import", str(recipe), "--set", "codec=demo-hyperprior"
    )  # nothing of its own
    assert "fine" in out and "runs the code" not in out


def test_a_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "no recipe" in fails(monkeypatch, capsys, "check", "nowhere")
    with pytest.raises(CodecError, match="cannot import"):
        build_from_path("nowhere:make")


def test_names_that_are_not_utf8_are_printed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def show() -> None:
        print("caf\udce9.png")

    monkeypatch.setattr("nicprune.cli.application.app", show)
    with open(os.dup(1), "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        main()
        stdout.flush()
    assert capfd.readouterr().out == "caf\\udce9.png\n"
