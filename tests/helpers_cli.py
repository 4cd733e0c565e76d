"""Calls of the command line, for its tests."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from nicprune.cli.application import app, main


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
