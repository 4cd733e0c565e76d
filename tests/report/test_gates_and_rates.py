"""The report of codecs with gates (MACs per image) and of one codec for all rates: compared, drawn,
counted and stored.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers_report import BPP, PSNR, record, store, sweep
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nicprune.common.errors import FileError
from nicprune.report import bd_table, collect, table, text_table, write_report
from nicprune.report.aggregate import aggregate, compact_rows
from nicprune.report.cautions import cautions
from nicprune.report.file_sizes import file_sizes
from nicprune.report.headline import headline
from nicprune.report.latex import latex
from nicprune.report.mac_spread import mac_spreads
from nicprune.report.markdown import markdown
from nicprune.report.matching import as_records
from nicprune.report.plots.drop_against_reduction import drop_against_reduction
from nicprune.report.plots.lambda_schedule import lambda_schedule
from nicprune.report.plots.rd_curves import rd_curves
from nicprune.report.plots.widths import rows_with_widths
from nicprune.report.scratch_gap import scratch_gaps
from nicprune.report.transforms import transforms

SIZE = 5_000_000
GATED = {
    "macs": [17_000_000, 15_000_000, 20_000_000],
    "g_a": [12e6, 11e6, 14e6],
    "g_s": [9e6, 8e6, 10e6],
    "h_s": [1e6, 1e6, 1e6],
}


def sized(qualities: tuple[int, ...] = (1, 2, 3), **pruned: Any) -> list[dict[str, Any]]:
    """Originals, controls and pruned codecs, with the size of their files."""
    return [r | {"file_bytes": SIZE} for r in sweep(qualities, **pruned)]


def gated(quality: int = 1, role: str = "pruned", **other: Any) -> dict[str, Any]:
    """A codec with gates: half of the channels gone, the rest open or closed by image."""
    made = record("pruned", quality, drop=0.7)
    transforms = {"g_a": [12_000_000, 10], "h_s": [1_000_000, 4], "g_s": [9_000_000, 10]}
    return (
        made
        | {
            "cost": made["cost"] | {"macs": 17_000_000},
            "dynamic": GATED,
            "by_transform": transforms,
            "label": "gates",
            "role": role,
        }
        | other
    )


def modulated(
    qualities: tuple[int, ...] = (1, 2, 3), drop: float = 0.5, **other: Any
) -> list[dict[str, Any]]:
    """One codec for all rates as a run records it: at each quality, and half-way between two."""
    made = []
    for n, quality in enumerate(qualities):
        one = {
            "role": "modulated",
            "label": "all rates",
            "level": float(n),
            "file_bytes": SIZE // 2,
            "steps": 100,
        } | other
        made.append(record("pruned", quality, drop=drop) | one)
        if quality != qualities[-1]:
            after = qualities[n + 1]
            middle = {
                "bpp": math.sqrt(BPP[quality] * BPP[after]),
                "psnr_db": (PSNR[quality] + PSNR[after]) / 2 - drop,
            }
            made.append(made[-1] | middle | {"quality": None, "level": n + 0.5, "crops": []})
    return made


def test_a_rate_at_a_quality_is_compared_with_the_codec_trained_for_it() -> None:
    rows = table(sized() + modulated()).query("role == 'modulated'")
    assert len(rows) == 5
    at = rows[rows["quality"].notna()]
    assert list(at["psnr_drop_db"]) == pytest.approx([0.5] * 3) and list(
        at["bpp_change_pct"]
    ) == pytest.approx([0] * 3)
    assert list(at["decode_speedup"]) == pytest.approx([2] * 3)
    between = rows[rows["quality"].isna()]
    assert list(between["level"]) == [0.5, 1.5] and between[
        ["psnr_drop_db", "bpp_change_pct", "decode_speedup"]
    ].isna().all(axis=None)


def test_rates_between_qualities_are_not_averaged_and_stay_out_of_tables_for_people() -> None:
    ready = sized() + modulated()
    assert [line.mean["bpp"] for line in aggregate(ready) if line.between()] == pytest.approx(
        [math.sqrt(0.2 * 0.35), math.sqrt(0.35 * 0.6)]
    )
    for text in (text_table(ready), markdown(ready), latex(ready)):
        assert (
            sum(
                "all rates" in row
                and ("& " in row or "  " in row)
                and "odulated" not in row
                and "torage" not in row
                for row in text.splitlines()
            )
            == 3
        )
    assert not any(line.between() for group in compact_rows(ready).values() for line in group)


def test_between_has_no_counterpart_even_among_codecs_without_a_quality() -> None:
    loose = [r | {"quality": None} for r in sized((1,))]
    assert (
        table(loose + modulated())
        .query("role == 'modulated' and quality.isna()")["psnr_drop_db"]
        .isna()
        .all()
    )


def test_another_architecture_at_a_quality_is_said_and_not_compared() -> None:
    larger = {"macs": 80_000_000, "encoder": 50_000_000, "decoder": 40_000_000, "params": 2_000_000}
    ready = sized() + [r | {"original_cost": larger} for r in modulated((1, 2))]
    ready += [
        record("original", 4, cost=larger, original_cost=larger),
        *(r | {"original_cost": larger} for r in modulated((4,), label="top")),
    ]
    rows = table(ready).query("role == 'modulated' and quality.notna()").set_index("quality")
    assert rows.loc[[1, 2], "psnr_drop_db"].isna().all() and rows.loc[
        4, "psnr_drop_db"
    ] == pytest.approx(0.5)
    at = [line for group in compact_rows(ready).values() for line in group]
    said = [note for note in cautions(as_records(ready), at) if "all rates" in note]
    assert len(said) == 2 and all("another architecture" in note for note in said), (
        "the control is of the other architecture too: no second note"
    )
    assert "No drop where the codec of that quality has another architecture." in text_table(
        ready
    ).replace("\n", " ")
    assert "another architecture" in " ".join(headline(at))


def test_a_gated_row_shows_the_mean_and_the_range() -> None:
    ready = [*sized((1,)), gated()]
    row = table(ready).query("label == 'gates'").iloc[0]
    assert (row["kmac_per_pixel_min"], row["kmac_per_pixel_max"]) == pytest.approx(
        (15e6 / 4096e3, 20e6 / 4096e3)
    )
    assert row["flop_reduction"] == pytest.approx(40.96 / 17)
    assert (
        "2.41x (2.0-2.7)" in text_table(ready)
        and "2.41× (2.0–2.7)" in markdown(ready)
        and r"2.41$\times$ (2.0--2.7)" in latex(ready)
    )
    assert "range over the images" in text_table(ready).replace("\n", " ")
    alone = gated(dynamic={key: [mean, mean, mean] for key, (mean, _, _) in GATED.items()})
    assert "2.41x  " in text_table([*sized((1,)), alone]), "one image has no range"
    narrow = gated(dynamic=GATED | {"macs": [17_000_000, 16_900_000, 17_100_000]})
    assert "2.41x (2.40-2.42)" in text_table([*sized((1,)), narrow])


def test_seeds_of_a_gated_codec_span_one_range() -> None:
    other = gated(seed=1, dynamic=GATED | {"macs": [19_000_000, 16_000_000, 24_000_000]})
    assert aggregate([gated(), other])[0].macs_over_images() == (18_000_000, 15_000_000, 24_000_000)


def test_per_image_is_against_the_original_by_transform() -> None:
    original = record(
        "original",
        by_transform={"g_a": [24_000_000, 10], "h_s": [1_000_000, 4], "g_s": [20_000_000, 10]},
    )
    (group,) = compact_rows([original, gated()]).values()
    spreads = mac_spreads(group)
    assert [s.part for s in spreads] == [
        "all",
        "g_a",
        "g_s",
    ], "a transform without gates is not listed"
    assert spreads[1].percent() == pytest.approx((50, 100 * 11 / 24, 100 * 14 / 24)) and spreads[
        0
    ].original == pytest.approx(10)
    text = markdown([original, gated()])
    assert (
        "**Per image**" in text
        and "over 2 images" in text
        and "50.0 %" in text
        and "46 to 58 %" in text
    )
    (group,) = compact_rows([gated()]).values()
    assert [s.original is None for s in mac_spreads(group)] == [
        False,
        True,
        True,
        True,
    ] and "–" in markdown([gated()])
    assert "Per image" not in markdown(sized())


def test_the_speed_of_skipping_stands_beside_everything() -> None:
    timed = gated(skipping={"images": 6, "encode_s": [0.1, 0.12], "decode_s": [0.1, 0.15]})
    text = markdown([record(), timed])
    assert (
        "over 6 images" in text
        and sum("1.20×" in row and "1.50×" in row for row in text.splitlines()) == 1
    )
    assert "kipping" not in markdown([record(), gated()])


def test_one_file_in_place_of_many() -> None:
    ready = sized() + modulated()
    assert (
        "Storage. all rates: one file of 2.5 MB instead of 3 of 15.0 MB: 83 % less."
        in text_table(ready)
    )
    assert "one file of 2.5 MB instead of 3 of 15.0 MB" in markdown(
        ready
    ) and r"83 \% less" in latex(ready)
    (group,) = compact_rows(ready).values()
    assert {s.arm: (s.files, s.size, s.originals) for s in file_sizes(group)} == {
        "original": (3, 15_000_000, 15_000_000),
        "mask_decay": (3, 15_000_000, 15_000_000),
        "all rates": (1, 2_500_000, 15_000_000),
    }
    assert "not known" in text_table(sized((1, 2)) + modulated()), (
        "the file of quality 3 is missing: no saving"
    )
    assert "20 % more" in text_table([*sized((1,)), *modulated((1,), file_bytes=6_000_000)])
    assert "torage" not in text_table(sized()) + text_table(sweep() + modulated(file_bytes=None))


def test_bd_takes_all_rates_and_says_how_many() -> None:
    frame = bd_table(sized((1, 2, 3, 4)) + modulated((1, 2, 3, 4)))
    rows = frame.query("role == 'modulated'")
    assert (
        list(rows["against"]) == ["original", "control"]
        and list(rows["rates"]) == [7, 7]
        and list(rows["points"]) == [4, 4]
    )
    assert (
        rows.iloc[0]["bd_psnr_db"] == pytest.approx(-0.5, abs=0.05)
        and rows.iloc[0]["caution"] == ""
    )
    assert frame.query("role != 'modulated'")["rates"].isna().all() and list(
        dict.fromkeys(frame["role"])
    ) == ["pruned", "modulated", "control"]
    assert (
        "only 3 points"
        in bd_table(sized() + modulated()).query("role == 'modulated'").iloc[0]["caution"]
    ), "five rates do not mend three points"


def test_one_curve_through_all_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[float], dict[str, Any]]] = []
    plain = Axes.plot

    def plot(self: Any, x: Any, *rest: Any, **look: Any) -> Any:
        drawn.append((list(x), look))
        return plain(self, x, *rest, **look)

    monkeypatch.setattr(Axes, "plot", plot)
    legends: list[list[str]] = []
    monkeypatch.setattr(
        Figure, "legend", lambda self, handles, names, **rest: legends.append(names)
    )
    assert rd_curves(aggregate(sized() + modulated()[::-1])) is not None
    curves = [(x, look) for x, look in drawn if len(x) == 5]
    assert len(curves) == 2 and all(
        x == sorted(x) and look["markersize"] < 6 for x, look in curves
    ), "PSNR and MS-SSIM"
    assert legends == [["original", "control", "mask_decay", "all rates"]]


def test_cost_against_quality_has_a_bar_over_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []
    plain = Axes.errorbar

    def errorbar(self: Any, x: Any, y: Any, **look: Any) -> Any:
        bars.append((x, look["xerr"]))
        return plain(self, x, y, **look)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    assert drop_against_reduction(aggregate([*sized((1,)), gated()])) is not None
    ((x, ((left,), (right,))),) = bars
    assert (x - left, x + right) == pytest.approx((40.96 / 20, 40.96 / 15))


def test_a_modulator_alone_saves_no_macs() -> None:
    whole = {"cost": record()["cost"]}
    ready = [record(), *modulated((1,), label="BM", **whole)]
    assert drop_against_reduction(aggregate(ready)) is None
    (group,) = compact_rows(ready).values()
    assert headline(group)[0].startswith(
        "BM, one codec for all rates, needs as many MACs as the original at quality 1: PSNR"
        " drops by"
    )
    assert [arm for arm, _ in transforms(group).columns] == ["original"]


def test_widths_of_one_codec_are_drawn_once() -> None:
    shown = rows_with_widths(aggregate(sized((1,)) + modulated()))
    assert [(line.role, line.quality) for line in shown] == [("pruned", 1), ("modulated", 3)]


def test_report_folder_with_gates_and_rates(tmp_path: Path) -> None:
    runs = store(tmp_path / "runs", [*sized(), gated(2)])
    (runs / "one").mkdir()
    (runs / "one/record.json").write_text(
        json.dumps(modulated(dynamic=GATED, label="gates for all rates"))
    )
    page = write_report(collect([runs]), tmp_path / "report").read_text(encoding="utf-8")
    for words in (
        "Per image",
        "Storage",
        "2.41× (2.0–2.7)",
        "one file of",
        "<dt>modulated</dt>",
        "3 (5 rates)",
        "in the mean over images",
        "the bar goes",
    ):
        assert words in page.replace("\u00a0", " "), words
    with open(tmp_path / "report/table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[-5:] == [
        "level",
        "kmac_per_pixel_min",
        "kmac_per_pixel_max",
        "file_bytes",
        "busy",
    ]
    assert [(r["quality"], r["level"], r["file_bytes"]) for r in rows[-2:]] == [
        ("", "0.5", "2500000"),
        ("", "1.5", "2500000"),
    ]
    assert rows[0]["quality"] == "1"
    again = tmp_path / "again"
    write_report(collect([tmp_path / "report"]), again)
    for name in ("records.json", "table.csv", "table.md", "bd.csv", "index.html", "rd.png"):
        assert (again / name).read_bytes() == (tmp_path / "report" / name).read_bytes(), name


@pytest.mark.usefixtures("undrawn")
def test_records_without_the_new_keys_leave_no_trace_of_them(tmp_path: Path) -> None:
    page = write_report(sweep(), tmp_path).read_text(encoding="utf-8")
    page = page.partition("The columns of")[0]  # which define the roles
    assert not any(
        word in page for word in ("odulated", "Per image", "Storage", "rates)", "gates", "skipping")
    )
    old = [r | {"busy": None} for r in sweep()]
    assert (
        list(table(old).columns)[-1] == "date" and list(bd_table(sweep()).columns)[-1] == "caution"
    )
    kept = json.loads((tmp_path / "records.json").read_text(encoding="utf-8"))
    assert not {"level", "dynamic", "skipping", "file_bytes"} & set(kept[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("level", "high"),
        ("file_bytes", "5 MB"),
        ("dynamic", {"macs": [1, 2]}),
        ("dynamic", {"g_a": [1, 1, 1]}),
        ("dynamic", {"macs": [1, 0, 1]}),
        ("dynamic", {"macs": [1, 3, 2]}),
        ("skipping", {"images": 2}),
        ("skipping", {"encode_s": [0, 1], "decode_s": [1, 1]}),
        ("skipping", [1]),
    ],
)
def test_damaged_gates_and_rates_are_named_in_one_line(key: str, value: Any) -> None:
    with pytest.raises(FileError, match=f"damaged record: {key}") as caught:
        as_records([record() | {key: value}])
    assert "\n" not in str(caught.value)


# -- several widths -------------------------------------------------------------------------------


def slimmable(widths: int = 3, **other: Any) -> list[dict[str, Any]]:
    """One codec of several widths as a run records it: all at the quality that it started from."""
    made = []
    for width in range(widths):
        one = record("pruned", 3, drop=0.2 + width)
        cost = {name: round(count * 0.6**width) for name, count in one["original_cost"].items()}
        log = [
            {
                "step": 10.0 * n,
                "pair": n,
                "lambdas": [0.01, 0.008**n, 0.006],
                "bpp": [0.6, 0.4, 0.3],
                "psnr_db": [31.0, 30.0, 29.0],
            }
            for n in range(3)
        ]
        more = {
            "bpp": 0.6 - 0.1 * width,
            "lmbda": 0.01 / (1 + width),
            "cost": cost,
            "encode_peak_bytes": 75_000_000 - width,
            "decode_peak_bytes": 77_000_000,
        }
        made.append(
            one
            | more
            | {
                "role": "modulated",
                "label": "slim",
                "width": width,
                "file_bytes": SIZE,
                "schedule": [] if width else log,
            }
            | other
        )
    return made


def test_each_width_has_a_line_and_all_are_one_curve() -> None:
    ready = sized() + slimmable()
    rows = table(ready).query("role == 'modulated'")
    assert list(rows["width"]) == [0, 1, 2] and list(rows["psnr_drop_db"]) == pytest.approx(
        [0.2, 1.2, 2.2]
    )
    assert list(rows["encode_peak_bytes"]) == [75_000_000, 74_999_999, 74_999_998]
    for text in (text_table(ready), markdown(ready), latex(ready)):
        assert all(f"slim, width {width}" in text for width in range(3))
    assert "several widths, each with a lambda of its own" in " ".join(
        text_table(ready).split()
    ) and "for all rates" not in text_table(ready)
    bd = bd_table(ready).query("label == 'slim'")
    assert len(bd) == 2 and list(bd["rates"]) == [3, 3]
    said = "\n".join(headline(next(iter(compact_rows(ready).values()))))
    assert "one codec of 3 widths" in said
    (stored,) = [s for s in file_sizes(next(iter(compact_rows(ready).values()))) if s.arm == "slim"]
    assert stored.size == SIZE and stored.originals == sum(
        4 * r["cost"]["params"] for r in slimmable()
    )
    assert "(parameters alone): " in stored.summary()


def test_widths_and_their_schedule_are_on_the_page(tmp_path: Path) -> None:
    page = write_report(sized() + slimmable(), tmp_path / "with").read_text(encoding="utf-8")
    assert (tmp_path / "with" / "schedule.png").stat().st_size > 10_000
    for text in ("Widths of slimmable codecs", "Schedule of λ", "75.0", "slim, width 2", "0.00333"):
        assert text in page
    plain = write_report(sized(), tmp_path / "without").read_text(encoding="utf-8")
    assert (
        not (tmp_path / "without" / "schedule.png").exists()
        and "Schedule of λ" not in plain
        and "slimmable" not in plain
    )
    assert lambda_schedule(aggregate(sized())) is None


def scratched(
    psnr: float, rate: float, label: str, method: str, steps: int, seed: int = 0
) -> dict[str, Any]:
    """A pruned codec, or one from scratch, at one PSNR on both images."""
    made = record("pruned", 1, label=label, method=method, seed=seed, steps=steps, lmbda=0.01)
    return made | {
        "bpp": rate,
        "psnr_db": psnr,
        "images": [image | {"psnr_db": psnr} for image in made["images"]],
    }


@pytest.mark.usefixtures("undrawn")
def test_the_share_of_the_gap_that_is_closed(tmp_path: Path) -> None:
    original = record("original", 1, lmbda=0.01)
    original |= {"bpp": 0.3, "images": [image | {"psnr_db": 30.0} for image in original["images"]]}
    records = [
        original,
        scratched(28.0, 0.4, "from scratch", "scratch", 900),
        scratched(29.0, 0.3, "pruned", "mask_decay", 50),
        scratched(29.0, 0.34, "pruned", "mask_decay", 50, 1),
        scratched(27.0, 0.4, "worse", "magnitude", 50),
    ]
    smaller = scratched(20.0, 0.1, "much smaller", "mask_decay", 50)
    records.append(smaller | {"cost": smaller["cost"] | {"macs": smaller["cost"]["macs"] // 2}})
    ((_, group),) = compact_rows(records).items()
    found = {gap.arm: gap for gap in scratch_gaps(group)}
    assert set(found) == {"pruned", "worse"} and all(
        gap.scratch == "from scratch" and gap.steps == 900 for gap in found.values()
    )

    def by_hand(psnr: float, rate: float) -> float:
        return 0.01 * 255**2 * 10 ** (-psnr / 10) + rate

    whole = by_hand(28, 0.4) - by_hand(30, 0.3)
    assert found["pruned"].closed() == pytest.approx(
        100 * (by_hand(28, 0.4) - by_hand(29, 0.32)) / whole
    )
    assert (
        found["worse"].closed()
        == pytest.approx(100 * (by_hand(28, 0.4) - by_hand(27, 0.4)) / whole)
        and (found["worse"].closed() or 0) < 0
    )
    # The control of as many steps takes the original's place; one of more or fewer does not.
    for steps, top in ((50, by_hand(30.5, 0.3)), (49, by_hand(30, 0.3)), (51, by_hand(30, 0.3))):
        control = scratched(30.5, 0.3, "control", "none", steps) | {"role": "control"}
        ((_, with_control),) = compact_rows([*records, control]).items()
        gap = next(gap for gap in scratch_gaps(with_control) if gap.arm == "pruned")
        assert gap.whole == ("control" if steps == 50 else "original")
        assert gap.closed() == pytest.approx(
            100 * (by_hand(28, 0.4) - by_hand(29, 0.32)) / (by_hand(28, 0.4) - top)
        )
    bare = scratched(30.5, 0.3, "longer", "none", 50)
    elsewhere = scratched(31, 0.3, "control", "none", 50) | {"role": "control", "lmbda": 0.02}
    bigger = elsewhere | {"lmbda": 0.01, "original_cost": dict.fromkeys(original["cost"], 10**9)}
    for others in ([bare], [bare, elsewhere], [bigger, bare]):
        ((_, with_bare),) = compact_rows([*records, *others]).items()
        assert {gap.arm: gap.whole for gap in scratch_gaps(with_bare)} == dict.fromkeys(
            ("pruned", "worse", "longer"), "longer"
        )
    both = [bare, elsewhere | {"lmbda": 0.01}]
    ((_, with_both),) = compact_rows([*records, *both]).items()
    assert {gap.whole for gap in scratch_gaps(with_both)} == {"control"}
    ((_, other),) = compact_rows(
        [r | {"lmbda": 0.02} if r["label"] == "pruned" else r for r in records]
    ).items()
    assert {gap.arm for gap in scratch_gaps(other)} == {"worse"}, (
        "costs by another lambda are not compared"
    )
    folder = write_report(records, tmp_path).parent
    for file in ("index.html", "table.md"):
        text = (folder / file).read_text()
        assert (
            "Against training from scratch" in text
            and "900" in text
            and f"{found['pruned'].closed():.0f} %" in text
        )
    write_report([r for r in records if r["method"] != "scratch"], tmp_path)
    assert (
        "Against training from scratch"
        not in (folder / "index.html").read_text() + (folder / "table.md").read_text()
    )
