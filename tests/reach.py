"""How much of a codec can be pruned: the share of its MACs that go with every free channel group at
width 1. Run it to see the table, or to write it into the documentation:

    python tests/reach.py
    python tests/reach.py --write docs/howto/foreign_codecs.md

The codecs are the small ones of the tests, in files called zoo_of_*.py, and one of full size.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))

from channelwise_codec import ChannelwiseCodec  # noqa: E402

from nicprune.common.errors import CodecError  # noqa: E402
from nicprune.pruning.cost import CostModel  # noqa: E402
from nicprune.pruning.surgery import analyse  # noqa: E402

ZOOS = {"zoo_of_designs": ("DESIGNS", "design"), "zoo_of_blocks": ("BLOCKS", "block_codec")}
"""Files with small codecs: their names, and the function that makes one by its name."""

FULL = "channel-wise context, window attention (75 M parameters)"

BEFORE = {
    "TCM": "refused; 85 % with 256-pixel images by hand",
    "STF": "64 %",
    "WACNN": "93 %",
    "TinyLIC": "6.7 %",
    "MLIC++": "refused",
    "FTIC": "refused",
    "ELIC": "98 to 99.9 %",
    "block: NAF": "72 % (NAFNet)",
    FULL: "93 %",
}
"""What version 0.1 reached on the public codecs of these designs, with random weights."""

START, END = "<!-- reach: begin -->\n", "<!-- reach: end -->\n"


def codecs(full: bool = True) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Give the names of all codecs, and functions that make them. A block in a codec that is
    otherwise of plain convolutions is called so.
    """
    for file, (table, function) in ZOOS.items():
        if (TESTS / f"{file}.py").exists():
            zoo = importlib.import_module(file)
            make: Callable[[str], nn.Module] = getattr(zoo, function)
            for name in getattr(zoo, table):
                title = f"block: {name}" if function == "block_codec" else name
                yield title, partial(make, name)
    if full:
        yield FULL, lambda: ChannelwiseCodec().eval()


def reach(codec: nn.Module, **settings: Any) -> tuple[float, int, int]:
    """Return the share of MACs that go with every free group at width 1, and how many groups are
    free, of how many.
    """
    try:
        groups = analyse(codec, **settings)
    except CodecError as error:
        if "nothing in" not in str(error):
            raise
        return 0.0, 0, 0
    free = groups.prunable()
    cost = CostModel(codec, groups)
    left = cost.totals({group.name: 1 for group in free}).macs / cost.totals().macs
    return 1 - left, len(free), len(groups)


def table(full: bool = True) -> str:
    """Return the table, as Markdown."""
    adapts = "norms" in inspect.signature(analyse).parameters
    rows = []
    for name, make in codecs(full):
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            share, free, count = reach(make())
            row = [name, BEFORE.get(name, "–"), f"{share:.1%}", f"{free} of {count}"]
            if adapts:
                row.append(f"{reach(make(), norms='adapt')[0]:.1%}")
        rows.append(row)
    headers = ["codec", "version 0.1", "now", "free groups"]
    headers += ["with `norms: adapt`"] if adapts else []
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True) + "\n"


def main() -> None:
    """Print the table, or write it between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="page with the marks of the table")
    page: Path | None = parser.parse_args().write
    made = table()
    print(made)
    if page is not None:
        before, _, rest = page.read_text(encoding="utf-8").partition(START)
        _, found, after = rest.partition(END)
        if not found:
            sys.exit(f"{page} has no lines {START.strip()} and {END.strip()}")
        page.write_text(f"{before}{START}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
