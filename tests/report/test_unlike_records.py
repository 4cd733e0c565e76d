"""What was not made or measured alike is not compared, or it is said."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from helpers_report import record, sweep
from test_runtime_table import QUARTER, WHOLE, times
from test_video import CLIP, evaluation, sample

from nicprune.common.errors import FileError
from nicprune.evaluation.times import taken_under
from nicprune.report.adaptations import adaptations
from nicprune.report.aggregate import aggregate
from nicprune.report.bd_rate import bd_table
from nicprune.report.cautions import cautions
from nicprune.report.crops import no_crops
from nicprune.report.derived import derive
from nicprune.report.matching import as_records
from nicprune.report.overview_figures import bd_rate
from nicprune.report.overview_reports import Arm
from nicprune.report.runtime_table import runtime_rows, runtime_table
from nicprune.report.video import bd_rates, video_record, write_video_report
from nicprune.runtime.variants import EAGER, Variant


def said(records: list[dict[str, Any]]) -> str:
    ready = as_records(records)
    return " ".join(cautions(ready, aggregate(ready), no_crops(ready)))


# -- images ---------------------------------------------------------------------------------------


def test_images_of_equal_names_and_other_sizes_are_another_test_set() -> None:
    small = record("pruned")
    small["images"] = [image | {"width": 4} for image in small["images"]]
    ready = as_records([record("original"), small])
    original, pruned = (next(r for r in ready if r.role == role) for role in ("original", "pruned"))
    assert original.setup() != pruned.setup() and str(original.setup()) == str(pruned.setup())
    assert math.isnan(derive(pruned, ready).psnr_drop_db)


CHANGES = [
    {"steps": 900},
    {"lmbda": 0.02},
    {"train_images": 5},
    {"settings": {"mask_decay": {"budget": {"macs": 0.3}, "seed": 0}}},
]
MADE = {"settings": {"mask_decay": {"budget": {"macs": 0.5}, "seed": 0}}, "train_images": None}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_seeds_that_were_not_made_alike_are_arms_of_their_own(change: dict[str, Any]) -> None:
    alike = {"mask_decay": {"budget": {"macs": 0.5}, "seed": 1}}
    first = [record("pruned", quality, drop=0.5, **MADE) for quality in (1, 2)]
    second = [
        record("pruned", quality, drop=1.5, **(MADE | {"settings": alike, "seed": 1}))
        for quality in (1, 2)
    ]
    rows = aggregate([*first, *second])
    assert [(row.seeds, row.arm) for row in rows] == 2 * [(2, "mask_decay")]
    other = [one | change | {"seed": 1} for one in second]
    rows = aggregate([*first, *other])
    assert [row.seeds for row in rows] == 4 * [1]
    names = {row.arm for row in rows}
    assert names == {"mask_decay (quickstart) #1", "mask_decay (quickstart) #2"}
    for name in names:  # a curve is of one arm
        assert len({row.members[0].seed for row in rows if row.arm == name}) == 1


def test_a_seed_that_was_measured_twice_counts_once() -> None:
    drops = [0.0, 0.0, 1.0]
    records = [
        record("original"),
        *(record("pruned", drop=d, seed=int(d), machine=str(n)) for n, d in enumerate(drops)),
    ]
    row = aggregate(records)[-1]
    assert row.seeds == 2 and row.mean["psnr_drop_db"] == pytest.approx(0.5)
    assert row.spread["psnr_drop_db"] == pytest.approx(math.sqrt(0.5))


def test_unequal_steps_of_a_later_seed_are_said_too() -> None:
    records = [record("original")]
    for seed in (0, 1):
        records.append(record("control", seed=seed, steps=100 + 50 * seed))
        records.append(record("pruned", seed=seed))
    assert "trained for 100 steps, its control for 150" in said(records)
    assert "its control for" not in said([one | {"steps": 100} for one in records])


def adapted(lmbda: float) -> list[dict[str, Any]]:
    """An original, a control and an adapted codec whose source domain is the original's."""
    found = []
    for role, own in (("original", 0.01), ("control", 0.01), ("pruned", lmbda)):
        one = record(role, drop={"pruned": -1.0}.get(role, 0.0), lmbda=own)
        source = {"test": "source", "bpp": 0.2, "psnr_db": 28.0, "images": one["images"]}
        source["images"] = record("original")["images"]
        found.append(one | {"source": source | {"old_files": "bit-exact"}, "steps": 100})
    return found


def test_costs_of_adaptations_are_compared_at_one_lambda() -> None:
    for lmbda in (0.01, 0.02):
        rows = aggregate(adapted(lmbda))
        one = next(found for found in adaptations(rows) if found.arm == "mask_decay")
        assert one.forgetting == pytest.approx(0)  # the same pictures of the source
        compared = (one.gain, one.against_control)
        assert all(math.isnan(value) == (lmbda != 0.01) for value in compared)


def test_bd_rates_against_a_control_of_other_steps() -> None:
    records = as_records(sweep((1, 2, 3, 4)))
    unequal = as_records(
        [one | ({"steps": 9} if one["role"] == "control" else {}) for one in sweep((1, 2, 3, 4))]
    )
    for ready, fair in ((records, True), (unequal, False)):
        table = bd_table(ready)
        of = table[(table["role"] == "pruned") & (table["against"] == "control")]
        assert ("trained for 100 steps, the control for 9" in of["caution"].item()) is not fair
        rows = [row for row in aggregate(ready) if row.role == "pruned"]
        arm = Arm("mask_decay", rows, list(ready))
        assert bool(bd_rate(arm, "control")) is fair and bd_rate(arm, "original")
        assert bd_rate(replace(arm, own_control=True), "control")


# -- videos ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"name": "b.mp4"}, {"width": 128}, {"frames": 9}, {"fps": 50.0}], ids=str
)
def test_codecs_on_other_clips_are_no_report(change: dict[str, Any], tmp_path: Any) -> None:
    other = video_record(
        evaluation(None, 0.2, 30.0, clips=(replace(CLIP, **change),)), "codec", "a"
    )
    with pytest.raises(FileError, match=r"measured on the same clips: \S+ \(.*write a report for"):
        write_video_report([*sample(), other], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_groups_of_other_lengths_are_other_curves() -> None:
    def with_groups(role: str, gop: int) -> list[Any]:
        return [one.model_copy(update={"gop": gop}) for one in sample() if one.role == role]

    codec, intra, classical = (with_groups(role, 32) for role in ("codec", "intra", "classical"))
    equal = bd_rates([*codec, *intra, *classical])
    assert not equal["caution"].str.contains("groups").any()
    unequal = bd_rates([*codec, *intra, *with_groups("classical", 8)])
    against = unequal[unequal["against"] == "x265"]
    assert "groups of 32 frames against 8" in against["caution"].item()
    both = bd_rates([*codec, *with_groups("codec", 8), *classical])
    assert list(both["codec"]) == ["slim, groups of 32", "slim, groups of 8"]


# -- times ----------------------------------------------------------------------------------------


def test_without_the_first_codec_by_a_backend_there_is_no_speed_up() -> None:
    rows = runtime_rows(
        {
            Variant("f/whole", EAGER, "float32"): times(WHOLE, 8, 6),
            Variant("f/small", "torch", "float32"): times(QUARTER, 4, 2),
        }
    )
    small = next(row for row in rows if (row.codec, row.side) == ("small", "decode"))
    assert (small.flop_reduction, small.speed_up, small.efficiency) == (5, None, None)
    assert small.speed_up_over_eager == 3
    line = next(x for x in runtime_table(rows).splitlines() if "small" in x)
    assert [cell.strip() for cell in line.strip("|").split("|")][-3:] == ["", "", "2.00×"]


@pytest.mark.parametrize(("busy", "known"), [(True, True), (False, False)])
def test_times_are_quiet_where_all_are(busy: bool, known: bool) -> None:
    quiet = times(WHOLE, 8, 6)
    other = replace(quiet, busy=busy, known=known, kept=3)
    for given in ([quiet, other], [other, quiet]):
        text = taken_under(given, "it")
        assert "medians of 3 turns" in text and "at most" not in text
    assert "at most" in taken_under([quiet, quiet], "it")
