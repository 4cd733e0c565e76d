"""Codecs with the blocks of published designs: how much of their MACs can be pruned, and that what
is pruned is what is masked, counted and saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checks import check_pruning
from torch import nn
from zoo_of_blocks import BlockCodec, TorchAttention
from zoo_of_designs import DESIGNS, design

from nicprune.channels.find_groups import find_groups
from nicprune.channels.groups import Groups
from nicprune.methods import attach
from nicprune.pruning.cost import CostModel
from nicprune.pruning.surgery import analyse

REACH: dict[str, tuple[float, float]] = {
    "TCM": (0.93, 0.95),
    "STF": (0.35, 0.91),
    "WACNN": (0.96, 0.96),
    "TinyLIC": (0.47, 0.93),
    "MLIC++": (0.68, 0.97),
    "FTIC": (0.40, 0.91),
    "ELIC": (0.97, 0.97),
}
"""Share of MACs that goes with every free group at a width of 1, at least: norms pinned, and with
`norms: adapt`.
"""


def reach(codec: nn.Module, groups: Groups) -> float:
    """The share of MACs that goes with every free group as narrow as can be, latents whole."""
    cost = CostModel(codec, groups)
    return 1 - cost.totals({g.name: 1 for g in groups.prunable()}).macs / cost.totals().macs


@pytest.mark.filterwarnings("ignore:MACs of fft")  # which no counter counts, as it says
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("STF", "TinyLIC", "ELIC") else pytest.mark.slow)
        for name in DESIGNS
    ],
)
def test_most_of_a_design_can_be_pruned(name: str) -> None:
    codec = design(name)
    groups = analyse(codec, "adapt")  # tries three random prunings
    assert not [(g.name, g.pinned) for g in groups if g.pinned or g.width == 1]
    assert reach(codec, groups) >= REACH[name][1]
    # The groups without norms are those whose channels no norm computes over: the rest is pinned.
    assert reach(codec, find_groups(codec)) >= REACH[name][0]


def test_heads_go_under_the_usual_rounding() -> None:
    """A head counts as the channels that it has: 16 of them are a step."""
    codec = BlockCodec(TorchAttention(width=48, heads=6), out=48, width=48).eval()
    attached = attach(codec, "magnitude", budget={"macs": 0.4}, norms="adapt")
    group, kept = attached.groups["g_a.0"], attached.keep()["g_a.0"]
    assert group.width == 6 and [group.step(n) for n in (1, 4, 8, 16, 64)] == [1, 1, 1, 2, 8]
    assert len(kept) in (2, 4)
    small: Any = attached.harden()
    assert small.g_a[1].attention.num_heads == len(kept)
    slim = attach(codec, "slimmable", widths=[1.0, 0.3], norms="adapt").extract(1)
    assert slim.g_a[1].attention.num_heads == 2  # type: ignore[union-attr, index]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MACs of fft")
@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("seed", range(4))
def test_keep_lists_of_a_design(name: str, seed: int, tmp_path: Path) -> None:
    codec = design(name)
    check_pruning(codec, analyse(codec, "adapt"), seed, tmp_path)
