"""The table of how much of a codec can be pruned."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import reach as command
from reach import BEFORE, FULL, codecs, reach
from zoo_of_blocks import BLOCKS, BlockCodec, block_codec

from nicprune.pruning.cost import measure
from nicprune.pruning.surgery import analyse, prune


@pytest.mark.parametrize("name", ["NAF", "Swin", "heads"])
def test_reach_is_what_pruning_leaves(name: str) -> None:
    codec = block_codec(name)
    share, free, count = reach(codec)
    groups = analyse(codec)
    widths = {group.name: [0] for group in groups.prunable()}
    assert (free, count) == (len(widths), len(groups))
    small = prune(codec, widths, groups, verify=False)
    assert 1 - measure(small).macs / measure(codec).macs == pytest.approx(share)


def test_every_codec_of_the_tests_has_a_row() -> None:
    names = [name for name, _ in codecs()]
    assert {f"block: {name}" for name in BLOCKS} | {FULL} <= set(names)
    assert len(set(names)) == len(names)
    small = dict(codecs(full=False))
    assert FULL not in small and isinstance(small["block: NAF"](), BlockCodec)
    assert "block: NAF" in BEFORE


def test_the_table_goes_between_the_marks_of_a_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [("block: NAF", lambda: block_codec("NAF"))]
    monkeypatch.setattr(command, "codecs", lambda full: iter(rows))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{command.START}old\n{command.END}after\n")
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["reach.py", "--write", str(page)])
        command.main()
    text = page.read_text()
    assert text.startswith(f"before\n{command.START}") and text.endswith(f"{command.END}after\n")
    assert "old" not in text and text.count("| block: NAF") == 1
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="has no lines"):
        command.main()
