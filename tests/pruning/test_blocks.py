"""Blocks of published designs: what can be free is, and pruned is masked, counted and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checks import check_pruning
from torch import nn
from zoo_of_blocks import BLOCKS, NEVER, BlockCodec, block_codec

from nicprune.channels.groups import Groups
from nicprune.pruning.surgery import analyse


def reasons(groups: Groups) -> dict[str, str | None]:
    return {m.module: g.pinned for g in groups for m in g.members if m.axis in ("out", "both")}


@pytest.mark.parametrize("name", [name for name in BLOCKS if BLOCKS[name][2]])
def test_norms_that_adapt_leave_all_free(name: str, tmp_path: Path) -> None:
    codec = block_codec(name)
    groups = analyse(codec, "adapt")
    held = [f"g_a.1.{layer}" for layer in NEVER.get(name, ())]
    found = reasons(groups)
    assert all(bool(found[layer]) == (layer in held) for layer in found), found
    check_pruning(codec, groups, 0, tmp_path)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_as_free_as_it_can_be(name: str, tmp_path: Path) -> None:
    codec = block_codec(name)
    groups = analyse(codec)
    reason = reasons(groups)
    _, free, held = BLOCKS[name]
    for layer in free:
        assert reason[f"g_a.1.{layer}" if layer else "g_a.0"] is None, (layer, reason)
    assert held or not any(reason.values()), reason
    for layer in held:
        assert reason[f"g_a.1.{layer}" if layer else "g_a.0"], layer
    check_pruning(codec, groups, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BLOCKS))
@pytest.mark.parametrize("seed", range(1, 10))
def test_more_keep_lists_of_a_block(name: str, seed: int, tmp_path: Path) -> None:
    codec = block_codec(name)
    check_pruning(codec, analyse(codec, "adapt"), seed, tmp_path)


def test_a_mask_on_another_modules_parameter_cannot_be_put() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.scale = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inner.scale

    groups = analyse(BlockCodec(Outer()).eval())
    found = next(g for g in groups if any(m.module == "g_a.0" for m in g.members))
    assert "another module" in str(found.pinned)
