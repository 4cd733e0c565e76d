"""`nicprune profile`."""

from __future__ import annotations

from helpers_cli import call


def test_profile() -> None:
    out = call("profile", "bmshj2018-hyperprior", "--quality", "1", "--weights", "none")
    assert (
        "12 channel groups" in out
        and "34.242" in out
        and "g_a.1" in out
        and "decoder" in out
        and "fvcore" in out
    )
