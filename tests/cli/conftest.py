"""Set-up of every test of the command line."""

from __future__ import annotations

import warnings

import pytest


@pytest.fixture(autouse=True)
def _keep_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` sets warning filters for its process; tests keep their own."""
    monkeypatch.setattr(warnings, "simplefilter", lambda *a, **k: None)
    monkeypatch.setattr(warnings, "showwarning", None)
