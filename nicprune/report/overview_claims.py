"""The parts of an overview's front page: claims, the plot of methods, and the bases."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from nicprune.common.errors import RecipeError
from nicprune.report.aggregate import Row
from nicprune.report.bd_rate import bjontegaard
from nicprune.report.overview_cells import plain, point, table
from nicprune.report.overview_config import (
    NO_GOAL,
    VERDICTS,
    Base,
    Claim,
    ClaimFigure,
    MethodsPlot,
)
from nicprune.report.overview_figures import FIGURES, cost_over_control
from nicprune.report.overview_pages import PAGE
from nicprune.report.overview_reports import Arm, Reports
from nicprune.report.plots.cost_curves import CostCurve, cost_curves

NOT_MEASURED = "not measured"

NOTE = (
    "A range goes over qualities or over arms; ± is the sample standard deviation over seeds, and"
    " figures without a number of seeds are of one."
)


def claims_table(claims: Sequence[Claim], reports: Reports, pages: Mapping[str, str]) -> str:
    """Return the number of claims of each verdict, and the table of claims.

    Args:
        pages: pages of the reports, by path.
    """
    rows = [
        [
            "<br>".join(
                filter(
                    None,
                    [plain(claim.claim), _links((one.report for one in claim.ours), pages)],
                )
            ),
            plain(claim.published),
            _figures(claim.claim, claim.ours, reports),
            f"**{claim.verdict or NOT_MEASURED}**: {plain(claim.because)}",
        ]
        for claim in claims
    ]
    columns = ["claim", "published", "ours", "verdict"]
    return f"{_counted(claims)}\n\n{table(columns, rows, text=columns)}\n\n{NOTE}"


def _counted(claims: Sequence[Claim]) -> str:
    """Return how many claims have each verdict, with its meaning."""
    numbers = Counter(claim.verdict for claim in claims)
    parts = [
        f"{numbers[verdict]} {verdict} ({meaning})"
        for verdict, meaning in VERDICTS.items()
        if numbers[verdict]
    ]
    if numbers[None]:
        parts.append(f"{numbers[None]} {NOT_MEASURED}")
    return f"Claims: {len(claims)}, of which {', '.join(parts)}."


def tried_table(claims: Sequence[Claim], reports: Reports, pages: Mapping[str, str]) -> str:
    """Return the table of goals and of what was tried to come closer to them, empty if nothing is
    told.

    Args:
        pages: pages of the reports, by path.
    """
    rows = [
        [
            plain(claim.claim),
            plain(claim.goal),
            _figures(claim.claim, claim.tried, reports),
            _links((figure.report for figure in claim.tried), pages),
        ]
        for claim in claims
        if claim.tried or claim.goal != NO_GOAL
    ]
    columns = ["claim", "goal", "tried", "details"]
    return table(columns, rows, text=columns) if rows else ""


def _figures(claim: str, figures: Sequence[ClaimFigure], reports: Reports) -> str:
    """Return a line for each of these figures of a claim, with its qualities and number of
    seeds.
    """
    texts, extents = [], []
    for config in figures:
        where, figure = f"claim {claim!r}", FIGURES[config.figure]
        arms = [
            reports.arm(config.report, arm, control, qualities=config.qualities, where=where)
            for arm, control in config.arms()
        ]
        if not (text := figure.text(arms)):
            raise RecipeError(
                f"overview, {where}: report {config.report!r} has no {config.figure} of"
                f" {config.arm!r}; it needs {figure.needs}"
            )
        shown = text.replace(" %", "\u00a0%")  # a unit stays on the line of its number
        texts.append(f"{plain(config.caption or figure.title)} **{shown}**")
        extents.append(_extent(arms))
    if len(set(extents)) == 1:  # said once
        return "<br>".join(filter(None, [*texts, extents[0]]))
    lines = [f"{text} {extent}".strip() for text, extent in zip(texts, extents, strict=True)]
    return "<br>".join(lines) or "–"


def _extent(arms: Sequence[Arm]) -> str:
    """Return qualities and number of seeds, for example "(q1–q4)" or "(q3, 3 seeds)"."""
    rows = [row for arm in arms for row in arm.rows]
    seeds = min(row.seeds for row in rows)
    named = _qualities(rows)
    parts = [*named, *([f"{seeds} seeds"] if seeds > 1 else [])]
    return f"({', '.join(parts)})" if parts else ""


def _qualities(rows: Sequence[Row]) -> list[str]:
    """Return the qualities of rows in words: one text, or none."""
    found = sorted({row.quality for row in rows if row.quality is not None})
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return [f"q{found[0]}–q{found[-1]}"]
    return [", ".join(f"q{quality}" for quality in found)] if found else []


def methods_plot(config: MethodsPlot, reports: Reports) -> bytes:
    """Return the PNG file of cost over control against FLOP reduction.

    Raises:
        RecipeError: an arm has no control, or arms differ in base, test images or qualities.
    """
    curves, arms = [], []
    for method in config.methods:
        points = []
        for name in method.arms:
            arm = reports.arm(
                method.report or config.report, name, qualities=config.qualities, where="plot"
            )
            if not (costs := cost_over_control(arm)):
                needs = FIGURES["cost_over_control"].needs
                raise RecipeError(
                    f"overview, plot: arm {name!r} has no cost over control; it needs {needs}"
                )
            arms.append(arm)
            reduction = statistics.fmean(row.mean["flop_reduction"] for row in arm.rows)
            points.append((reduction, costs[0].mean, costs[0].spread or 0.0))
        curves.append(CostCurve(method.name, tuple(points)))
    _check_comparable(arms)
    return cost_curves(config.title, curves)


def _check_comparable(arms: Sequence[Arm]) -> None:
    """Raise RecipeError unless all arms have the test, the qualities and originals of the first."""
    first = arms[0]
    for arm in arms[1:]:
        both = f"overview, plot: arms {first.name!r} and {arm.name!r}"
        if arm.rows[0].setup != first.rows[0].setup:
            raise RecipeError(
                f"{both} differ in base or test images: {first.rows[0].setup} and"
                f" {arm.rows[0].setup}"
            )
        ours, theirs = (", ".join(_qualities(one.rows)) for one in (first, arm))
        if ours != theirs:
            raise RecipeError(
                f"{both} differ in qualities: {ours} and {theirs}; say which in plot.qualities,"
                " as [1, 4]"
            )
        if not _same_originals(first, arm):
            raise RecipeError(f"{both} start from different weights")


def _same_originals(one: Arm, other: Arm) -> bool:
    """Return True unless the originals of a quality differ by more than machines do."""
    points = [
        {r.quality: (r.bpp or 0, r.psnr_db or 0) for r in arm.records if r.role == "original"}
        for arm in (one, other)
    ]
    return all(
        math.isclose(a, b, rel_tol=1e-3)
        for quality in points[0].keys() & points[1].keys()
        for a, b in zip(points[0][quality], points[1][quality], strict=True)
    )


def plot_caption(config: MethodsPlot, pages: Mapping[str, str]) -> str:
    """Return the text below the plot, with links to the reports that it is made from."""
    names = [method.report or config.report for method in config.methods]
    made = f"From {_links(names, pages, ', ')}."
    return " ".join(filter(None, [made, config.text.strip()]))


def bases_table(bases: Sequence[Base], reports: Reports, pages: Mapping[str, str]) -> str:
    """Return the table of bases: PSNR and bpp at each quality, and BD-rate against the official.

    Raises:
        RecipeError: a base has no BD-rate against its official weights.
    """
    qualities = sorted({q for base in bases for q in base.official})
    rows: list[list[str]] = []
    above = None
    for base in bases:
        arm = reports.arm(base.report, base.arm, where=f"base {base.name!r}")
        measured = {row.quality: row for row in arm.rows}
        found = bjontegaard(
            [(one.bpp, one.psnr_db) for one in base.official.values()],
            [(row.mean["bpp"], row.mean["psnr_db"]) for row in arm.rows],
        )
        if math.isnan(found["bd_rate_pct"]):
            raise RecipeError(f"overview, base {base.name!r}: no BD-rate; {found['caution']}")
        if base.official != above:  # bases of one architecture stand below the same points
            above = base.official
            points = (
                f"{one.psnr_db:.2f} dB, {one.bpp:.3f}" if (one := above.get(q)) else ""
                for q in qualities
            )
            rows.append([f"official weights of {arm.rows[0].setup.codec}", *points, "", ""])
        caution = f" ({found['caution']})" if found["caution"] else ""
        rows.append(
            [
                plain(base.name),
                *(point(measured[q]) if q in measured else "" for q in qualities),
                f"{found['bd_rate_pct']:+.1f} %{caution}",
                _links([base.report], pages),
            ]
        )
    columns = ["", *(f"q{q}" for q in qualities), "BD-rate against official", "details"]
    return table(columns, rows, text=("", "details"))


def _links(names: Iterable[str], pages: Mapping[str, str], between: str = "<br>") -> str:
    """Return links to the pages of reports, or to their tables where they have no page."""
    targets = {
        name: page if (page := f"{name}/{PAGE}") in pages else f"{name}/table.md" for name in names
    }
    return between.join(f"[{name}]({target})" for name, target in targets.items())
