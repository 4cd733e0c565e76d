"""The sentences above the first table: results and cautions."""

from __future__ import annotations

from helpers_report import sweep

from nicprune.report.aggregate import aggregate
from nicprune.report.cautions import cautions
from nicprune.report.headline import headline
from nicprune.report.matching import as_records


def test_headline_is_made_of_the_numbers() -> None:
    said = headline(aggregate(sweep()))
    assert (
        said[0].replace("\u00a0", " ")
        == "mask_decay needs 2.00× fewer MACs at qualities 1 to 3: PSNR drops by 0.70 dB (2.19 to"
        " 2.50 %) while bpp changes by +0.0 %; decoding is 2.00× as fast."
    )
    assert (
        "control (the original fine-tuned without pruning)" in said[1]
        and "PSNR rises by 0.10" in said[1]
    )


def test_codecs_that_are_not_smaller_are_told_so() -> None:
    for factor, told in ((1.0, "as many MACs as the original"), (1.3, "1.30× the original's MACs")):
        records = sweep((3,))
        for one in records:
            if one["role"] == "pruned":
                one["cost"] = {
                    **one["cost"],
                    "macs": round(factor * records[0]["cost"]["macs"]),
                }
        said = headline(aggregate(records))[0].replace("\u00a0", " ")
        assert said.startswith(f"mask_decay needs {told} at quality 3: PSNR drops by"), said


def test_unequal_training_is_said() -> None:
    ready = sweep((1,), steps=300)
    assert any(
        "300 steps, its control for 100" in note
        for note in cautions(as_records(ready), aggregate(ready))
    )
    assert cautions(as_records(sweep()), aggregate(sweep())) == []
