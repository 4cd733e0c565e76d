"""The front page of an overview: claims, the plot of methods, and the bases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers import TESTS
from helpers_overview import broken_links, points_of, reports
from helpers_report import BPP, PSNR, record, sweep

from nicprune.common.errors import NicpruneError, RecipeError
from nicprune.report.bd_rate import bjontegaard
from nicprune.report.overview import PLOT, overview_files, write_overview
from nicprune.report.overview_figures import FIGURES
from nicprune.report.plots import cost_curves as plot

SECTION = "sections: [{title: A section, report: one, rows: [{arm: control}]}]\n"
CLAIM = "{claim: C, published: P | Q, goal: G, verdict: reproduced, because: B, ours: [%s]}"
OURS = "{figure: cost_over_control, report: one, arm: mask_decay}"


def front(folder: Path, content: str, **records: list[dict[str, Any]]) -> str:
    """The front page of an overview with this content, its spaces all alike."""
    records = {"one": sweep((1, 2, 3, 4))} | records
    page = write_overview(reports(folder, f"title: Reports\n{SECTION}{content}\n", **records))
    return page.read_text().replace("\u00a0", " ")


def ours(folder: Path, figures: str, **records: list[dict[str, Any]]) -> str:
    """The cell of our figures for a claim with these."""
    text = front(folder, f"claims: [{CLAIM % figures}]", **records)
    line = next(line for line in text.splitlines() if line.startswith("| C<br>"))
    return re.split(r"(?<!\\)\|", line)[3].strip()


def over_control(drop: float, quality: int, control: float = -0.1) -> float:
    """Cost over the control, in per cent, of records with these drops at the same rate."""
    costs = [
        0.01 * 255**2 * 10 ** (-(PSNR[quality] - one) / 10) + BPP[quality]
        for one in (drop, control)
    ]
    return 100 * (costs[0] / costs[1] - 1)


def test_a_claim_stands_with_its_figures_verdict_and_links(tmp_path: Path) -> None:
    second = OURS.replace("one", "two").replace("}", ", caption: ours}")
    text = front(tmp_path, f"claims: [{CLAIM % f'{OURS}, {second}'}]", two=sweep((3, 4)))
    line = next(line for line in text.splitlines() if line.startswith("| C<br>"))
    assert r"| P \| Q " in line and "| **reproduced**: B " in line
    costs = [over_control(0.7, q) for q in (1, 2, 3, 4)]
    assert f"| cost over control **{sum(costs) / 4:+.1f} %** (q1–q4)<br>ours **" in line
    assert f"<br>ours **{sum(costs[2:]) / 2:+.1f} %** (q3, q4) " in line
    assert "| C<br>[one](one/README.md)<br>[two](two/table.md) |" in line, (
        "to its page if it has one"
    )
    assert "Claims: 1, of which 1 reproduced (as published, under our conditions)." in text


def test_a_unit_stays_on_the_line_of_its_number(tmp_path: Path) -> None:
    front(tmp_path, f"claims: [{CLAIM % OURS}]")
    pages = "\n".join(page.read_text() for page in tmp_path.rglob("README.md"))
    cell = next(line for line in pages.splitlines() if line.startswith("| C<br>"))
    assert re.search(r"\*\*[+-][\d.]+\u00a0%\*\*", cell)


def test_claims_are_counted_by_verdict(tmp_path: Path) -> None:
    other = CLAIM.replace("reproduced", "not seen")
    claims = [CLAIM % OURS, other % OURS, other % OURS, "{claim: D, ours: [], because: later}"]
    text = front(tmp_path, f"claims: [{', '.join(claims)}]")
    told = next(line for line in text.splitlines() if line.startswith("Claims: "))
    parts = ["4, of which 1 reproduced (", "), 2 not seen (", "), 1 not measured."]
    assert all(part in told for part in parts) and "not reached" not in told


def test_goals_and_what_was_tried_stand_on_a_page_of_their_own(tmp_path: Path) -> None:
    tried = OURS.replace("one", "two").replace("}", ", caption: longer}")
    claims = f"claims: [{CLAIM[:-1] % OURS}, tried: [{tried}]}}, {CLAIM % OURS}]"
    text = front(tmp_path, claims, two=sweep((3, 4)))
    (page,) = tmp_path.rglob("tried.md")
    assert "](tried.md)" in text and "longer" not in text and "| G " not in text
    costs = [over_control(0.7, q) for q in (3, 4)]
    first, second = [
        line
        for line in page.read_text().replace("\u00a0", " ").splitlines()
        if line.startswith("| C ")
    ]
    assert "| G " in first and f"| longer **{sum(costs) / 2:+.1f} %**<br>(q3, q4)" in first
    assert "[two](two/table.md)" in first and "one" not in first
    assert "| G " in second and "| – " in second, "a goal that nothing was tried for stands too"
    none = (CLAIM % OURS).replace("goal: G, ", "")
    assert none != CLAIM % OURS and "tried.md" not in front(tmp_path / "none", f"claims: [{none}]")
    assert not list((tmp_path / "none").rglob("tried.md"))
    with pytest.raises(NicpruneError, match="claim 'C': no arm 'x' in report 'one'"):
        front(tmp_path / "wrong", claims.replace(tried, OURS.replace("mask_decay", "x")))


def test_every_figure(tmp_path: Path) -> None:
    qualities = (1, 2, 3, 4)
    records = sweep(qualities, drop=0.7, rate=0.9)
    records += [
        record("pruned", q, drop=drop, label=label, method="scratch", steps=steps)
        for q in qualities
        for drop, label, steps in ((1.9, "a", 200), (1.7, "b", 200), (1.8, "c", 200), (1, "d", 9))
    ]
    for one in records:
        one["file_bytes"] = 1000 if one["role"] == "original" else 800
    all_rates = [
        record("modulated", q, drop=0.2, file_bytes=1500, method="BM", label="BM")
        for q in qualities
    ]
    curve = [(BPP[q], PSNR[q]) for q in qualities]
    pruned = [(0.9 * bpp, psnr - 0.7) for bpp, psnr in curve]
    control = [(bpp, psnr + 0.1) for bpp, psnr in curve]
    costs, gaps = [], []
    for q in qualities:
        own, fine_tuned, scratch = (
            0.01 * 255**2 * 10 ** (-(PSNR[q] - drop) / 10) + rate * BPP[q]
            for drop, rate in ((0.7, 0.9), (-0.1, 1), (1.7, 1))
        )
        costs.append(100 * (own / fine_tuned - 1))
        gaps.append(100 * (scratch - own) / (scratch - fine_tuned))
    expected = {
        "cost_over_control": f"{sum(costs) / 4:+.1f} %",
        "bd_rate": f"{bjontegaard(control, pruned)['bd_rate_pct']:+.1f} %",
        "bd_rate_against_original": f"{bjontegaard(curve, pruned)['bd_rate_pct']:+.1f} %",
        "gap_closed": f"{sum(gaps) / 4:.0f} %",
        "flop_reduction": "2.00×",
        "psnr_drop": "0.70 dB",
        "psnr_drop_pct": f"{70 / 34:.2f} to {70 / 28:.2f} %",
        "bpp_change": "-10.0 %",
        "decode_speedup": "2.00×",
        "storage_saved": f"{100 * (1 - 1500 / 4000):.0f} %",
    }
    assert set(expected) == set(FIGURES)
    arms = dict.fromkeys(expected, "mask_decay") | {"storage_saved": "BM"}
    figures = ", ".join(
        f"{{figure: {name}, report: one, arm: {arm}}}" for name, arm in arms.items()
    )
    cell = ours(tmp_path, figures, one=records + all_rates)
    assert cell == "<br>".join(
        [*(f"{FIGURES[name].title} **{text}**" for name, text in expected.items()), "(q1–q4)"]
    )


def test_several_arms_give_a_range_each_over_its_control(tmp_path: Path) -> None:
    drops = {"a": 0.3, "b": 0.9, "alone a": 0.2, "alone b": 0.4}
    records = [record("original", 3), record("control", 3, drop=-0.1)]
    records += [record("pruned", 3, drop=drop, label=label) for label, drop in drops.items()]
    figure = "{figure: cost_over_control, report: one, arm: [b, a]%s, caption: x}"
    cell = ours(
        tmp_path, ", ".join([figure % "", figure % ", control: [alone b, alone a]"]), one=records
    )
    wide = [over_control(drop, 3) for drop in (0.3, 0.9)]
    own = [over_control(0.3, 3, 0.2), over_control(0.9, 3, 0.4)]
    texts = [f"x **{low:+.1f} to {high:+.1f} %**" for low, high in (wide, own)]
    assert cell == "<br>".join([*texts, "(q3)"])


def test_seeds_give_a_spread_where_all_qualities_have_them(tmp_path: Path) -> None:
    records = [record("original", q) for q in (3, 4)]
    for q, seeds in ((3, (0, 1)), (4, (0,))):
        for seed in seeds:
            records.append(record("control", q, seed=seed, drop=-0.1))
            records.append(record("pruned", q, seed=seed, drop=0.7 + 0.2 * seed))
    at_three = [r for r in records if r["quality"] == 3]
    every = [over_control(0.7, 3), over_control(0.9, 3)]
    text = ours(tmp_path / "a", OURS, one=at_three)
    mean, spread = sum(every) / 2, abs(every[0] - every[1]) / 2**0.5
    assert text == f"cost over control **{mean:+.1f} ±{spread:.1f} %**<br>(q3, 2 seeds)"
    text = ours(tmp_path / "b", OURS, one=records)
    assert text == f"cost over control **{(mean + over_control(0.7, 4)) / 2:+.1f} %**<br>(q3, q4)"


def test_a_claim_without_figures_says_why(tmp_path: Path) -> None:
    text = front(tmp_path, "claims: [{claim: C, ours: [], because: to follow}]")
    assert re.search(r"\| C +\| – +\| – +\| \*\*not measured\*\*: to follow +\|", text)


def test_a_figure_of_some_qualities(tmp_path: Path) -> None:
    some = OURS.replace("}", ", qualities: [3, 1]}")
    cell = ours(tmp_path / "cost", some)
    mean = (over_control(0.7, 1) + over_control(0.7, 3)) / 2
    assert cell == f"cost over control **{mean:+.1f} %**<br>(q1, q3)"
    every = "{figure: bd_rate, report: one, arm: mask_decay%s}"
    wider = sweep((1, 2, 3, 4), drop=0.7) + [
        record(role, 4, drop=drop, rate=1.6) | {"quality": 5}
        for role, drop in (("control", -0.5), ("pruned", -0.1))
    ]
    (tmp_path / "bd").mkdir()
    four = ours(tmp_path / "bd" / "a", every % ", qualities: [1, 2, 3, 4]", one=wider)
    assert (
        four
        == ours(tmp_path / "bd" / "b", every % "")
        != ours(tmp_path / "bd" / "c", every % "", one=wider)
    ), "neither curve has another point"


PLOT_OF = (
    "plot: {title: All, report: one, text: As drawn., methods: [{name: first, arms: [mask_decay]},"
    " {name: second, report: two, arms: [half, less]}]}"
)


def test_the_plot_has_the_points_of_the_reports(tmp_path: Path) -> None:
    two = [
        record(role, q, drop=drop, label=label)
        for q in (1, 2, 3, 4)
        for role, drop, label in (
            ("control", -0.1, None),
            ("pruned", 0.2, "half"),
            ("pruned", 0.5, "less"),
        )
    ]
    text = front(tmp_path, PLOT_OF, two=two)
    assert f"]({PLOT})" in text
    assert "From [one](one/README.md), [two](two/table.md). As drawn." in text

    def cost(drop: float) -> str:
        return f"{sum(over_control(drop, q) for q in (1, 2, 3, 4)) / 4:+.1f} % at 2.00×"

    picture = (tmp_path / PLOT).read_bytes()
    assert points_of(picture) == f"first: {cost(0.7)}; second: {cost(0.2)}, {cost(0.5)}"


def test_the_plot_draws_negative_costs_and_many_methods(tmp_path: Path) -> None:
    looks = {(plot.HUES[n % len(plot.HUES)], plot.MARKERS[n % len(plot.MARKERS)]) for n in range(9)}
    assert len(looks) == 9, "no two methods look alike"
    assert len(set(plot.HUES)) == len(plot.HUES)
    curves = [
        plot.CostCurve(f"${n}", ((2.0, n - 3.0, 0.1), (4.0, 20.0 * n, 0.0))) for n in range(9)
    ]
    picture = plot.cost_curves("$Title", curves)
    assert points_of(picture).startswith("$0: -3.0 % at 2.00×, +0.0 % at 4.00×; $1: -2.0 %")
    assert len(picture) < 100_000


OFFICIAL = (
    "{1: {psnr_db: 28.4, bpp: 0.18}, 2: {psnr_db: 30.5, bpp: 0.33}, 3: {psnr_db: 32.6, bpp: 0.57},"
    " 4: {psnr_db: 34.5, bpp: 0.9}}"
)


def test_the_distance_of_the_bases_is_computed(tmp_path: Path) -> None:
    bases = (
        f"bases: [{{name: ours, report: one, official: &o {OFFICIAL}}}, {{name: twin, report: two,"
        " official: *o}]\nbases_text: Behind."
    )
    text = front(tmp_path, bases, two=sweep((2, 3, 4)))
    anchor = [(0.18, 28.4), (0.33, 30.5), (0.57, 32.6), (0.9, 34.5)]
    found = bjontegaard(anchor, [(BPP[q], PSNR[q]) for q in (1, 2, 3, 4)])
    line = next(line for line in text.splitlines() if line.startswith("| ours"))
    assert f"| {found['bd_rate_pct']:+.1f} % |" in re.sub(" +", " ", line)
    assert "28.00 dB, 0.200" in line and "(one/README.md)" in line
    assert text.count("| official weights of ") == 1 and "28.40 dB, 0.180" in text
    twin = next(line for line in text.splitlines() if line.startswith("| twin"))
    assert "only 3 points" in twin, "cautions stand beside"
    assert text.index("| twin") < text.index("Behind.")


def test_links_resolve_and_reports_without_a_page_are_linked_too(tmp_path: Path) -> None:
    folder = reports(
        tmp_path,
        "title: R\nsections: [{title: A, report: a/deep, rows: [{arm: mask_decay},"
        " {arm: control, report: one}]}]\n",
        one=sweep((3,)),
        **{"a/deep": sweep((3,))},
    )
    files = overview_files(folder)
    assert set(files) == {"README.md", "conditions.md", "a/deep/README.md"}
    assert b"[How to read these tables](../../conditions.md)" in files["a/deep/README.md"]
    assert b"Cost over control: " in files["conditions.md"]
    assert b"[R](../../README.md)" in files["a/deep/README.md"]
    assert b"- [a/deep](a/deep/README.md): A\n- Others: [one](one/table.md)" in files["README.md"]
    assert broken_links(folder, files) == []
    (folder / "one" / "table.md").unlink()
    assert broken_links(folder, files) == [
        "README.md: one/table.md",
        "a/deep/README.md: ../../one/table.md",
    ]


def claim(change: str, by: str = "", figure: str = OURS) -> str:
    """A claim with something replaced."""
    return f"claims: [{(CLAIM % figure).replace(change, by)}]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (claim("report: one", "report: onE"), "claim 'C': no report 'onE'; did you mean 'one'?"),
        (claim("mask_decay", "mask decay"), "claim 'C': no arm 'mask decay' in report 'one'; did"),
        (claim("mask_decay}", "mask_decay, control: contrl}"), "no arm 'contrl' in report 'one'"),
        (claim("cost_over_control", "cost_over"), "did you mean 'cost_over_control'"),
        (claim("cost_over_control", "gap_closed"), "has no gap_closed of 'mask_decay'; it needs a"),
        (claim("mask_decay", "later"), "has no cost_over_control of 'later'; it needs a control"),
        (claim("mask_decay", "[mask_decay, later]"), "of ['mask_decay', 'later']; it needs a"),
        (claim("cost_over_control", "bd_rate").replace("one", "three"), "it needs 4 qualities"),
        (claim("cost_over_control", "bd_rate").replace("one", "part"), "it needs 4 qualities"),
        (claim("cost_over_control", "psnr_drop").replace("one", "part"), "needs the original on"),
        (
            claim("cost_over_control", "storage_saved").replace("one", "rates"),
            "needs one codec for",
        ),
        (claim("mask_decay}", "mask_decay, control: [a, b]}"), "one control for all arms, or one"),
        (claim("mask_decay}", "[]}"), "give an arm"),
        (claim("arm: mask", "arms: mask"), "unknown key 'claims.0.ours.0.arms'; did you mean 'arm"),
        (claim("verdict: reproduced", "verdict: seen"), "verdict: input should be 'beaten'"),
        (claim("verdict: reproduced, "), "a claim with figures has a verdict"),
        (claim("", figure=""), "one without figures has none"),
        (claim(", because: B"), "because is missing"),
        (claim("because: B", "because: ''"), "because: string should have at least 1"),
        (PLOT_OF, "plot: no report 'two'"),
        (PLOT_OF.replace("report: two, ", ""), "plot: no arm 'half' in report 'one'"),
        (PLOT_OF.replace("two, arms: [half", "one, arms: [original"), "'original' has no cost"),
        (PLOT_OF.replace("two, arms: [half, less", "three, arms: [mask_decay"), "differ in base"),
        (PLOT_OF.replace("two, arms: [half, less", "four, arms: [mask_decay"), "q1–q4 and q4; say"),
        (PLOT_OF.replace("two, arms: [half, less", "weak, arms: [mask_decay"), "different weights"),
        (PLOT_OF.replace("text:", "qualities: [4, 5], text:"), "'one' has no quality 5"),
        (
            claim("}]", ", qualities: [2, 7]}]"),
            "claim 'C': arm 'mask_decay' of report 'one' has no",
        ),
        (claim("}]", ", qualities: []}]"), "qualities: list should have at least 1"),
        ("bases: [{name: B, report: one, official: {}}]", "bases.0.official: dictionary should"),
        (f"bases: [{{name: B, report: four, official: {OFFICIAL}}}]", "base 'B': no BD-rate; 1 po"),
    ],
)
def test_a_wrong_front_page_gives_one_line(tmp_path: Path, content: str, message: str) -> None:
    records = sweep((1, 2, 3, 4)) + [
        record("pruned", q, label="later", steps=100 if q < 4 else 7) for q in (1, 2, 3, 4)
    ]
    three = [one | {"codec": "mbt2018-mean"} for one in sweep((1, 2, 3))]
    weak = [one | {"psnr_db": one["psnr_db"] - 0.1} for one in sweep((1, 2, 3, 4))]
    part = [r for r in sweep((1, 2, 3, 4)) if r["quality"] < 4 or r["role"] == "pruned"]
    rates = [one | {"file_bytes": 9} for one in [*sweep((3,)), record("modulated", 3)]]
    with pytest.raises(RecipeError) as error:
        front(
            tmp_path,
            content,
            one=records,
            three=three,
            four=sweep((4,)),
            weak=weak,
            part=part,
            rates=rates,
        )
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("README.md")) and isinstance(error.value, NicpruneError)


def test_the_example_of_the_documentation_is_an_overview(tmp_path: Path) -> None:
    text = (TESTS.parent / "docs" / "results.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    folder = reports(
        tmp_path,
        example,
        evidence_hyperprior=[
            *sweep((1, 2, 3, 4), label="mask_decay 2x"),
            *(record("pruned", q, drop=0.8, label="l1 2x") for q in (1, 2, 3, 4)),
        ],
        base_hyperprior_soap=sweep((1, 2, 3, 4)),
    )
    page = write_overview(folder).read_text()
    assert "**reproduced**" in page and "**not measured**: to follow" in page
    assert all(f"`{name}`" in text for name in FIGURES), "every figure is documented"
    assert broken_links(folder, overview_files(folder)) == []
