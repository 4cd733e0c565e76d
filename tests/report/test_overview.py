"""The overview: claims on one page, a page for each report; no figure of ours is typed by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import TESTS
from helpers_overview import broken_links, points_of, reports
from helpers_report import record, sweep

from nicprune.common.errors import FileError, NicpruneError, RecipeError
from nicprune.evaluation.times import REST, Times
from nicprune.pruning.totals import Totals
from nicprune.report.overview import overview_files, write_overview
from nicprune.report.overview_config import read_overview_config
from nicprune.report.runtime_table import write_runtime
from nicprune.report.times import write_times
from nicprune.runtime.variants import EAGER, Variant

HEAD = "title: Reports\nsections:\n"


def page(folder: Path, content: str, **records: list[dict[str, Any]]) -> str:
    """The page of the report "one" in an overview with these sections."""
    write_overview(reports(folder, HEAD + content, **records))
    return (folder / "one" / "README.md").read_text()


def cells(text: str, start: str) -> list[str]:
    """The cells of the line that starts with this."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_figures_are_those_of_the_reports(tmp_path: Path) -> None:
    rows = (
        "- {title: A codec, report: one, rows: [{arm: control}, {arm: mask_decay, name: mask decay,"
        " published: EVC 2 %}]}\n"
    )
    text = page(tmp_path, rows, one=sweep((1, 2, 3, 4), drop=0.7, rate=0.9))
    assert (
        text.startswith("# one\n")
        and "## A codec" in text
        and "`nicprune run one`" in text
        and "(table.md)" in text
        and "[Reports](../README.md)" in text
    )
    name, reduction, *qualities, cost, bd, published = cells(text, "mask decay")
    assert (name, reduction, published) == ("mask decay", "2.00×", "EVC 2 %")
    assert qualities == ["0.70 dB, -10.0 %"] * 4
    # By hand: lambda 0.01, PSNR 28, 30, 32, 34 dB, the control 0.1 dB better at the same rates
    ratios = []
    for psnr, bpp in ((28, 0.2), (30, 0.35), (32, 0.6), (34, 1.0)):
        pruned, control = (
            0.01 * 255**2 * 10 ** (-value / 10) + rate
            for value, rate in ((psnr - 0.7, 0.9 * bpp), (psnr + 0.1, bpp))
        )
        ratios.append(100 * (pruned / control - 1))
    assert cost == f"{sum(ratios) / 4:+.1f} %"
    assert bd.count("%") == 2 and float(bd.split(" %")[0]) < float(bd.split(", ")[1].split(" %")[0])
    assert (
        cells(text, "control")[1] == cells(text, "control")[6] == ""
        and cells(text, "control")[2] == "-0.10 dB, +0.0 %"
    )


def test_a_bd_rate_over_little_of_the_range_says_so(tmp_path: Path) -> None:
    rows = "- {title: A codec, report: one, rows: [{arm: control}, {arm: mask_decay}]}\n"
    text = page(tmp_path, rows, one=sweep((1, 2, 3, 4), drop=3.5, rate=0.9))
    assert re.fullmatch(
        r"[+-][\d.]+ % \(over \d\d % of the range\), [+-][\d.]+ % \(over \d\d % of the range\)",
        cells(text, "mask_decay")[-1],
    )
    assert "range" not in cells(text, "control")[-1]


def test_seeds_give_means_with_their_spread(tmp_path: Path) -> None:
    found = [
        record("original", 3),
        *(
            record(role, 3, seed=seed, drop=drop)
            for role in ("control", "pruned")
            for seed, drop in ((0, 0.2), (1, 0.4))
        ),
    ]
    text = page(tmp_path, "- {title: A, report: one, rows: [{arm: mask_decay}]}\n", one=found)
    assert cells(text, "mask_decay")[2] == "0.30 ±0.14 dB, +0.0 %"
    assert cells(text, "mask_decay")[3] == "+0.0 ±0.0 %", "each seed against its own control"
    assert "| BD-rate" not in text and "| published" not in text, "no column without a figure"


def test_costs_by_different_lambdas_are_not_compared(tmp_path: Path) -> None:
    found = [record("original", 3), record("control", 3), record("pruned", 3, lmbda=0.005)]
    text = page(tmp_path, "- {title: A, report: one, rows: [{arm: mask_decay}]}\n", one=found)
    assert "| cost" not in text


def test_a_control_is_one_of_as_many_steps_or_the_one_named(tmp_path: Path) -> None:
    found = [
        record("original", 3),
        record("control", 3, steps=50),
        record("pruned", 3),
        record("pruned", 3, drop=0.2, label="control longer"),
    ]
    rows = (
        "- {title: A, report: one, rows: [{arm: mask_decay}, {arm: mask_decay, name: again,"
        " control: control longer}]}\n"
    )
    text = page(tmp_path, rows, one=found)
    assert cells(text, "mask_decay")[3] == ""
    ratio = (0.01 * 255**2 * 10**-3.2 + 0.6) / (0.01 * 255**2 * 10**-3.18 + 0.6)
    assert cells(text, "again")[3] == f"{100 * (ratio - 1):+.1f} %"


def test_the_gap_to_scratch_stands_beside(tmp_path: Path) -> None:
    found = [
        record("original", 3),
        record("control", 3, drop=-0.1),
        record("pruned", 3, drop=0.5),
        record("pruned", 3, drop=1.5, label="worse"),
    ]
    found += [
        record("pruned", 3, drop=drop, label=f"scratch {steps}", method="scratch", steps=steps)
        for drop, steps in ((4.0, 10), (1.0, 1000))
    ]
    rows = "- {title: A, report: one, rows: [{arm: mask_decay}, {arm: worse}, {arm: control}]}\n"
    text = page(tmp_path, rows, one=found)
    assert cells(text, "worse")[4] == "none"
    costs = [0.01 * 255**2 * 10 ** (-(32 - drop) / 10) + 0.6 for drop in (-0.1, 0.5, 1.0)]
    assert (
        cells(text, "mask_decay")[4]
        == f"{100 * (costs[2] - costs[1]) / (costs[2] - costs[0]):.0f} %"
        and cells(text, "control")[4] == ""
    )


def test_points_are_shown_as_they_are(tmp_path: Path) -> None:
    rows = "- {title: A, report: one, show: point, after: [base], rows: [{arm: original}]}\n"
    text = page(tmp_path, rows, one=sweep((1, 3)))
    assert cells(text, "original") == ["original", "28.00 dB, 0.200", "32.00 dB, 0.600"]
    assert "`nicprune run base`, then `nicprune run one`" in text


def test_costs_stand_by_quality_too(tmp_path: Path) -> None:
    rows = (
        "- {title: A, report: one, show: cost, rows: [{arm: original, control: control}, {arm:"
        " control}, {arm: mask_decay}]}\n"
    )
    text = page(tmp_path, rows, one=sweep((1, 3), drop=0.7, rate=0.9))
    base = {1: (28, 0.2), 3: (32, 0.6)}

    def over(drop: float, rate: float) -> list[float]:
        each = [
            (
                0.01 * 255**2 * 10 ** (-(psnr - drop) / 10) + rate * bpp,
                0.01 * 255**2 * 10 ** (-(psnr + 0.1) / 10) + bpp,
            )
            for psnr, bpp in base.values()
        ]
        return [100 * (ours / control - 1) for ours, control in each]

    for arm, costs in (("original", over(0, 1)), ("mask_decay", over(0.7, 0.9))):
        assert cells(text, arm)[-3:] == [f"{cost:+.1f} %" for cost in (*costs, sum(costs) / 2)]
    assert cells(text, "control")[-3:] == ["+0.0 %"] * 3


def test_what_has_not_been_run_says_so(tmp_path: Path) -> None:
    rows = (
        "- {title: A, report: one, rows: [{arm: mask_decay}, {arm: mask_decay 7x, published: a | b,"
        " run: false}]}\n"
    )
    text = page(tmp_path, rows, one=sweep((3,)))
    line = next(line for line in text.splitlines() if line.startswith("| mask_decay 7x"))
    assert "not run" in line and r"a \| b" in line


def test_times_by_backends_stand_in_a_section_of_their_own(tmp_path: Path) -> None:
    times = {
        Variant(f"f/{name}", EAGER, "float32"): Times(
            "",
            Totals(2 * side, side, side, 7),
            {REST: 0.5},
            {REST: 0.5},
            seconds,
            seconds,
            5,
            False,
        )
        for name, side, seconds in (("whole", 400, 4.0), ("small", 100, 2.0))
    }
    write_runtime(times, tmp_path / "fast", conditions="On a Tuesday.", command="nicprune time a")
    folder = reports(tmp_path, HEAD + "- {title: Backends, runtime: fast}\n")
    write_overview(folder)
    text = (folder / "fast" / "README.md").read_text()
    assert cells(text, "small")[3:8] == ["4.00×", "2000.0", "500.0", "2.00×", "0.50"]
    assert "| f, encode" in text and "| f, decode" in text and "On a Tuesday." in text
    assert "Made by `nicprune time a`" in text and "(runtime.csv)" in text
    (tmp_path / "fast" / "runtime.json").write_text('{"times": [{}]}')
    with pytest.raises(FileError, match="is not a file of nicprune time --report"):
        overview_files(folder)


def test_times_stand_in_a_section_of_their_own(tmp_path: Path) -> None:
    cost = Totals(400, 200, 100, 7)
    times = [
        Times("a", cost, {"g_a": 2.0}, {"g_s": 2.0}, 2.0, 2.0, 5, False),
        Times("b", cost, {"g_a": 1.0}, {"g_s": 1.0}, 1.0, 1.0, 5, False),
    ]
    write_times(
        times, tmp_path / "seconds", conditions="On a Tuesday.", command="nicprune time a b"
    )
    section = "- {title: Times, times: seconds, text: Before., below: Behind.}\n"
    write_overview(reports(tmp_path, HEAD + section))
    text = (tmp_path / "seconds" / "README.md").read_text()
    assert cells(text, "b") == [
        "b",
        "1.00×",
        "1.00 + 0.00 s",
        "2.00×",
        "1.00×",
        "1.00 + 0.00 s",
        "2.00×",
    ]
    assert (
        text.index("Before.")
        < text.index("| b")
        < text.index("Behind.")
        < text.index("On a Tuesday.")
    )
    assert "Made by `nicprune time a b`" in text and "(times.md)" in text


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, FileError, "cannot read"),
        ("- 1", FileError, "not an overview"),
        ("a: [", FileError, "not YAML"),
        ("title: A", RecipeError, "sections is missing"),
        (HEAD + "- {title: A, rows: [{arm: mask_decay}]}", RecipeError, "names its report"),
        (
            HEAD + "- {title: A, report: two, rows: [{arm: mask_decay}]}",
            RecipeError,
            "no report 'two'",
        ),
        (
            HEAD + "- {title: A, report: one, rows: [{arm: mask decay}]}",
            RecipeError,
            "did you mean 'mask_decay'?",
        ),
        (
            HEAD + "- {title: A, report: one, rows: [{arm: mask_decay, runs: 1}]}",
            RecipeError,
            "unknown key",
        ),
        (
            HEAD + "- {title: A, report: one, rows: [{arm: original}], steps_plot: true}",
            RecipeError,
            "section 'A': arm 'original' has no cost over control after so many",
        ),
        (
            HEAD
            + "- &a {title: A, report: one, rows: [{arm: mask_decay}], steps_plot: true}\n- *a",
            RecipeError,
            "has a plot against steps already",
        ),
        (HEAD + "- {title: A, times: one, steps_plot: true}", RecipeError, "shows rows"),
        (HEAD + "- {title: A, report: ., rows: [{arm: control}]}", RecipeError, "folder below"),
        (HEAD + "- {title: A, report: a/../.., rows: [{arm: c}]}", RecipeError, "folder below"),
        (
            HEAD + "- {title: A, report: one, rows: []}",
            RecipeError,
            "either rows or times or runtime",
        ),
        (
            HEAD + "- {title: A, report: one, times: one, rows: [{arm: mask_decay}]}",
            RecipeError,
            "either rows or times or runtime",
        ),
        (HEAD + "- {title: A, times: one}", FileError, "nicprune time --out writes it"),
        (HEAD + "- {title: A, runtime: one}", FileError, "nicprune time --report writes it"),
        (HEAD + "- {title: A, runtime: one, times: one}", RecipeError, "times or runtime"),
        (
            HEAD + "- {title: A, report: one, rows: [{arm: mask_decay, control: long}]}",
            RecipeError,
            "no arm 'long'",
        ),
        (
            HEAD + "- {title: A, report: both, rows: [{arm: mask_decay}]}",
            RecipeError,
            "several sets of images",
        ),
    ],
)
def test_a_wrong_overview_gives_one_line(
    tmp_path: Path, content: str | None, kind: type[NicpruneError], message: str
) -> None:
    folder = reports(
        tmp_path,
        content or "",
        one=sweep((3,)),
        both=sweep((3,)) + [r | {"test": "kodak"} for r in sweep((3,))],
    )
    if content is None:
        (folder / "overview.yaml").unlink()
    with pytest.raises(kind, match=message) as error:
        write_overview(folder)
    assert "\n" not in str(error.value) and not list(folder.rglob("README.md"))


def test_sections_of_one_report_share_a_page(tmp_path: Path) -> None:
    text = page(
        tmp_path,
        "- {title: A, report: one, rows: [{arm: mask_decay}]}\n"
        "- {title: B, report: two, rows: [{arm: mask_decay, report: one}, {arm: control}]}\n"
        "- {title: C, report: one, rows: [{arm: control}]}\n",
        one=sweep((3,)),
        two=sweep((3,)),
    )
    assert re.findall("^## (.)$", text, re.M) == ["A", "C"]
    other = (tmp_path / "two" / "README.md").read_text()
    assert "[one](../one/table.md), [two](table.md)" in other


def test_costs_are_plotted_against_steps(tmp_path: Path) -> None:
    def trained(steps: int, drop: float) -> list[dict[str, Any]]:
        return [
            record("original", 3),
            *(record("control", 3, seed=seed, steps=steps) for seed in (0, 1)),
            *(
                record("pruned", 3, seed=seed, steps=steps, drop=drop * (1 + seed / 10))
                for seed in (0, 1)
            ),
        ]

    rows = "{arm: mask_decay, report: two}, {arm: mask_decay}, {arm: later, run: false}"
    text = page(
        tmp_path,
        f"- {{title: A, report: one, rows: [{rows}], steps_plot: true, below: After.}}\n"
        "- {title: B, report: two, rows: [{arm: mask_decay}]}\n",
        one=trained(500, 0.7),
        two=trained(10_000, 0.3),
    )
    assert text.index("| mask_decay") < text.index("](steps.png)") < text.index("After.")
    found = re.findall(r"([+-][\d.]+) ±", text)
    assert points_of((tmp_path / "one" / "steps.png").read_bytes()) == (
        f"A: {found[1]} % at 500 steps, {found[0]} % at 10,000 steps"
    )
    assert "steps.png" not in (tmp_path / "two" / "README.md").read_text()
    assert not (tmp_path / "two" / "steps.png").exists()


def test_the_project_s_own_overview_is_up_to_date() -> None:
    folder = TESTS.parent / "reports"
    files = overview_files(folder)
    for name, content in files.items():
        found = (folder / name).read_bytes()
        if name.endswith(".png"):  # its pixels depend on the version of matplotlib
            assert points_of(found) == points_of(content), "run nicprune overview"
            assert len(found) < 100_000
        else:
            assert found == content, f"{name}: run nicprune overview"
    for claim in read_overview_config(folder).claims:  # read in a minute
        assert len(claim.because) <= 240 and len(claim.ours) <= 6, claim.claim
    pages = {path.relative_to(folder).as_posix() for path in folder.rglob("README.md")}
    assert pages <= set(files), "a page of a section that is gone: delete it"
    assert broken_links(folder, files) == []
