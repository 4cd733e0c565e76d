"""Records matched with their originals and controls, and arms told apart."""

from __future__ import annotations

import pytest
from helpers_report import record

from nicprune.report import table
from nicprune.report.aggregate import aggregate
from nicprune.report.matching import arms, as_records, reference_for


def test_the_original_of_the_same_recipe_is_preferred() -> None:
    other = record("original", recipe="b", recipe_sha256="cd" * 32, psnr_db=20.0)
    for order in ([other, record("original")], [record("original"), other]):
        assert table([*order, record("pruned", drop=0.7)]).query("role == 'pruned'").iloc[0][
            "psnr_drop_db"
        ] == pytest.approx(0.7)


def test_the_seed_counts_before_the_text_of_the_recipe() -> None:
    """A recipe may grow by an arm and a seed together."""
    grown = "cd" * 32
    controls = [
        record("control", psnr_db=27.0),
        record("control", seed=1, recipe_sha256=grown, psnr_db=26.0),
    ]
    arm = as_records([record("pruned", recipe_sha256=grown)])[0]
    for order in (controls, controls[::-1]):
        found = reference_for(arm, as_records(order), "control")
        assert found is not None and found.seed == 0


def test_one_label_for_two_results_is_told_apart() -> None:
    ready = as_records(
        [
            record("pruned"),
            record("pruned", psnr_db=20.0, recipe="b"),
            record("pruned", psnr_db=21.0, recipe="b"),
            record("pruned", 2),
        ]
    )
    names = arms(ready)
    assert len({(r.quality, name) for r, name in zip(ready, names, strict=True)}) == 4
    assert len(aggregate(ready)) == 4
    same = [record("pruned"), record("pruned", date="2026-11-22T10:00:00")]
    assert set(arms(as_records(same))) == {"mask_decay"} and len(aggregate(same)) == 1
