"""`nicprune list`."""

from __future__ import annotations

from helpers_cli import call


def test_list() -> None:
    out = call("list")
    assert "bmshj2018-hyperprior" in out and "mask_decay" in out and "quickstart" in out
    assert "quickstart" not in call("list", "methods")
