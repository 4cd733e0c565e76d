"""`nicprune profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import built
from helpers_cli import call

from nicprune.methods import attach
from nicprune.pruning.cost import measure
from nicprune.storage.checkpoint import save


def test_profile() -> None:
    out = call("profile", "bmshj2018-hyperprior", "--quality", "1", "--weights", "none")
    assert (
        "12 channel groups" in out
        and "34.242" in out
        and "g_a.1" in out
        and "decoder" in out
        and "fvcore" in out
    )


@pytest.mark.parametrize(
    ("method", "settings", "rows"),
    [
        (
            "adaptation",
            {"domain": "screen", "grow": 0.25, "round_to": 1},
            ["domain source", "domain screen"],
        ),
        ("slimmable", {"widths": [1.0, 0.5], "round_to": 1}, ["width 0", "width 1"]),
        ("bit_rate_modulator", {"qualities": [1, 2]}, ["as it codes"]),
        ("channel_gating", {"alpha": 0.9}, ["as it codes"]),
    ],
)
def test_the_cost_with_methods_stands_beside_that_of_the_codec_alone(
    method: str, settings: dict[str, Any], rows: list[str], tmp_path: Path
) -> None:
    codec = built("bmshj2018-hyperprior")[0]
    alone = measure(codec)
    attached = attach(codec, method, **settings)
    out = call("profile", str(save(attached, tmp_path / "c.safetensors")))
    tables, found = out.split(f"the tables above are of the codec alone; with {method} on it:")
    assert f"{alone.kmac_per_pixel():.3f}" in tables and f"{alone.params:,}" in tables
    table = found.splitlines()[2 : 2 + len(rows)]
    assert [line[:22].strip() for line in table] == rows
    for value, line in enumerate(table):
        if len(rows) > 1:
            attached.set_width(value)
        cost = attached.totals()
        assert line[22:].split() == [
            *(f"{cost.kmac_per_pixel(side):.3f}" for side in ("macs", "encoder", "decoder")),
            f"{cost.params:,}",
        ]
    assert ("nicprune time counts what is left" in found) == (method == "channel_gating")
