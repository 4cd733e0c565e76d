"""Speed-up and FLOP reduction of codecs by backends: by which reference, and of which seconds."""

from __future__ import annotations

import pytest

from nicprune.common.errors import CodecError, RecipeError
from nicprune.evaluation.times import REST, Times
from nicprune.pruning.totals import Totals
from nicprune.report.runtime_table import runtime_rows, runtime_table
from nicprune.runtime.variants import EAGER, Variant, engines

WHOLE = Totals(macs=4000, encoder=2000, decoder=2000, params=10)
QUARTER = Totals(macs=1000, encoder=500, decoder=400, params=3)


def times(cost: Totals, encode: float, decode: float) -> Times:
    spent = {"g_a": encode - 0.25, REST: 0.25}, {"g_s": decode - 0.25, REST: 0.25}
    return Times("", cost, *spent, encode, decode, 5, False)


def test_each_is_compared_with_the_first_of_its_family_by_the_same_backend() -> None:
    given = {
        Variant("f/whole", EAGER, "float32"): times(WHOLE, 8, 6),
        Variant("f/small", EAGER, "float32"): times(QUARTER, 4, 2),
        Variant("f/whole", "torch", "bf16"): times(WHOLE, 2, 3),
        Variant("f/small", "torch", "bf16"): times(QUARTER, 1, 0.5),
        Variant("g/other", "torch", "bf16"): times(QUARTER, 1, 1),
    }
    rows = runtime_rows(given)
    assert [(r.family, r.side) for r in rows] == (
        [("f", "encode")] * 4 + [("f", "decode")] * 4 + [("g", "encode"), ("g", "decode")]
    )
    small = next(r for r in rows if (r.codec, r.backend, r.side) == ("small", "torch", "decode"))
    assert (small.flop_reduction, small.speed_up, small.efficiency) == (5, 6, 1.2)
    assert (small.speed_up_over_eager, small.seconds, small.coding) == (12, 0.5, 0.25)
    assert rows[-1].speed_up_over_eager is None and rows[-1].flop_reduction == 1
    text = runtime_table(rows)
    assert "| f, decode" in text and "| g, encode" in text
    cells = [c.strip() for c in text.splitlines()[-1].strip("|").split("|")]
    assert cells[:2] == ["other", "torch bf16"] and cells[-1] == ""
    line = next(x for x in text.splitlines() if "small" in x and "bf16" in x and "6.00×" in x)
    assert [c.strip() for c in line.strip("|").split("|")][3:] == [
        "5.00×", "500.0", "250.0", "6.00×", "1.20", "12.00×",
    ]  # fmt: skip


def test_backends_are_left_out_of_precisions_that_they_lack() -> None:
    assert engines([EAGER, "torch"], ["float32", "bf16"]) == [
        (EAGER, "float32"), ("torch", "float32"), ("torch", "bf16"),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="needs a --backend"):
        engines([EAGER], ["bf16"])
    with pytest.raises(CodecError, match="has no precision 'int8'"):
        engines([EAGER, "torch"], ["int8"])
    with pytest.raises(RecipeError, match="unknown precision"):
        engines(["torch"], ["fp8"])
